"""Augmentation inside the jitted step: flips, turns, shifts, colours, zooms and Cutout.

What is random is drawn first (`draw`), then applied by pure functions to images (`apply`) and to
points in them (`move`), so that a task can change image and label together.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from paramshare.errors import ParamshareError
from paramshare.tasks.config import Fraction, Natural, checked_dataclass

Factor = Annotated[float, pydantic.Field(gt=0, le=10)]


class AugmentError(ParamshareError):
    """An augmentation that does not fit the inputs or the task."""


@checked_dataclass(AugmentError)
class Augment:
    """How training batches are augmented. Everything is off by default.

    In this order: flip, turn, crop, colours, zoom, Cutout.

    Raises:
      AugmentError: if a value has the wrong type or is negative.

    Example:
      >>> Augment(flip=True, pad_crop=4).cutout  # the usual recipe of CIFAR
      0
    """

    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    pad_crop: Natural = 0
    """Pad each image by this many zero pixels on each side and crop it back at a random offset; 0
    for none."""
    cutout: Natural = 0
    """Side of a square set to 0 after normalising, clipped at the border (DeVries and Taylor 2017);
    0 for none."""
    colour: Fraction = 0.0
    """Multiply brightness, contrast and saturation of each image by random factors, up to 1 plus or
    minus this; 0 for none. For pixels from 0 to 255."""
    zoom: tuple[Factor, Factor] = (1.0, 1.0)
    """Resize the content of each image by a random factor from this range and put it in a random
    place: a crop if the factor is above 1, else a smaller image on zeros; 1 1 for none."""
    turn: Annotated[float, pydantic.Field(ge=0, le=180)] = 0.0
    """Turn each image by a random angle between minus and plus this, in degrees; what comes from
    outside the image is black. 180 for any angle, 0 for none. Images become smoother, and a box
    becomes the upright one around its turned corners, at 45 degrees twice as large."""

    def __post_init__(self) -> None:
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"augment.zoom is {self.zoom}; the first factor must be the smaller")

    def check(self, input_shape: tuple[int, ...]) -> None:
        """Checks that inputs of this shape can be augmented.

        Raises:
          AugmentError: if anything is on and the inputs are not images (H, W, C), or the padding or
            the square is larger than they are.
        """
        if self == Augment():
            return
        if len(input_shape) != 3:
            raise AugmentError(
                f"augment is {self}, but inputs have shape {input_shape}; only images "
                "(H, W, C) are augmented: leave it out"
            )
        side = min(input_shape[:2])
        for name in ("pad_crop", "cutout"):
            if getattr(self, name) > side:
                raise AugmentError(
                    f"augment.{name} is {getattr(self, name)}, but images have shape "
                    f"{input_shape}; it must be at most {side}"
                )


class Draws(NamedTuple):
    """What is random in the augmentation of a batch; None where an operation is off."""

    mirrored_B: jax.Array | None
    """Which examples are mirrored, bool."""
    offset_Bx2: jax.Array | None
    """Offset (rows, columns) of each crop in the padded image, 0 to 2 pad_crop."""
    centre_Bx2: jax.Array | None
    """Centre (row, column) of each Cutout square."""
    colour_Bx3: jax.Array | None = None
    """Factors of brightness, contrast and saturation."""
    factor_B: jax.Array | None = None
    """Factor by which each image is resized."""
    corner_Bx2: jax.Array | None = None
    """Where its top left corner goes (row, column), in pixels; negative if it is cropped."""
    angle_B: jax.Array | None = None
    """Angle by which each image is turned counterclockwise, in degrees."""


def draw(
    key: jax.Array, config: Augment, shape: tuple[int, ...], first: int | jax.Array = 0
) -> Draws:
    """Draws what is random in the augmentation of a batch, example by example.

    Example i uses the key `fold_in(key, first + i)`, so that the result does not depend on how a
    batch is split over devices or processes.

    Args:
      key: PRNG key of the global batch.
      config: the augmentation.
      shape: (B, H, W, ...) of this device's part of the batch.
      first: position of this part's first example in the global batch.

    Raises:
      AugmentError: if the shape cannot be augmented like this.
    """
    batch, height, width = shape[:3]
    config.check(tuple(shape[1:]))
    positions = jnp.arange(batch, dtype=jnp.uint32) + jnp.asarray(first).astype(jnp.uint32)
    example_keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)
    # Each operation has its own key: turning one on does not change the others.
    keys = jax.vmap(lambda example_key: jax.random.split(example_key, 3))(example_keys)
    mirrored = offset = centre = colour = factor = corner = angle = None
    if config.flip:
        mirrored = jax.vmap(jax.random.bernoulli)(keys[:, 0])
    if config.pad_crop:
        offset = jax.vmap(lambda k: jax.random.randint(k, (2,), 0, 2 * config.pad_crop + 1))(
            keys[:, 1]
        )
    if config.cutout:
        centre = jax.vmap(
            lambda k: jax.random.randint(
                k, (2,), jnp.zeros(2, jnp.int32), jnp.array([height, width])
            )
        )(keys[:, 2])
    if config.colour:
        low, high = 1 - config.colour, 1 + config.colour
        colour = jax.vmap(
            lambda k: jax.random.uniform(jax.random.fold_in(k, 3), (3,), minval=low, maxval=high)
        )(example_keys)
    if config.zoom != (1.0, 1.0):
        low, high = np.log(config.zoom).astype(np.float32)
        uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 4), (3,)))(
            example_keys
        )
        factor = jnp.exp(low + uniform[:, 0] * (high - low))
        size = jnp.array([height, width], jnp.float32)
        corner = uniform[:, 1:] * (1 - factor[:, None]) * size[None]
    if config.turn:
        low, high = -config.turn, config.turn
        angle = jax.vmap(
            lambda k: jax.random.uniform(jax.random.fold_in(k, 5), minval=low, maxval=high)
        )(example_keys)
    return Draws(mirrored, offset, centre, colour, factor, corner, angle)


def apply(
    draws: Draws,
    image_BxHxWxC: jax.Array,
    config: Augment,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> jax.Array:
    """Augments and normalises a batch of images.

    Args:
      draws: as `draw` returns them.
      image_BxHxWxC: this device's part of the batch, as loaded.
      config: the augmentation.
      mean: mean of each channel; None to leave images as they are.
      std: standard deviation of each channel; None as for `mean`.

    Returns:
      (B, H, W, C) float32; where mean is None and no operation computes with pixels, the dtype of
      the images.

    Raises:
      AugmentError: if mean and std do not fit.

    Example:
      >>> image, config = jnp.full((2, 8, 8, 1), 10, jnp.uint8), Augment(flip=True)
      >>> draws = draw(jax.random.key(0), config, image.shape)
      >>> apply(draws, image, config, (4.0,), (2.0,))[0, 0, 0]
      Array([3.], dtype=float32)
    """
    image = image_BxHxWxC
    if draws.mirrored_B is not None:
        image = flip(image, draws.mirrored_B)
    if draws.angle_B is not None:
        image = turn(image, draws.angle_B)
    if draws.offset_Bx2 is not None:
        image = shift(image, draws.offset_Bx2, config.pad_crop)
    if draws.colour_Bx3 is not None:
        image = recolour(image, draws.colour_Bx3)
    image = normalise(image, mean, std)
    if draws.factor_B is not None and draws.corner_Bx2 is not None:
        image = zoom(image, draws.factor_B, draws.corner_Bx2)
    if draws.centre_Bx2 is not None:
        image = cutout(image, draws.centre_Bx2, config.cutout)
    return image


def move(draws: Draws, point_BxPx2: jax.Array, config: Augment, size: tuple[int, ...]) -> jax.Array:
    """Where `apply` puts points of the images.

    Args:
      draws: as `draw` returns them.
      point_BxPx2: (x, y) in pixels; the left edge of the image is at 0, the right one at its width.
      config: the augmentation.
      size: height and width of the images.

    Returns:
      (B, P, 2), which may be outside the image.

    Example:
      >>> config = Augment(flip=True)
      >>> draws = Draws(jnp.array([True]), None, None)
      >>> move(draws, jnp.array([[[1.0, 5.0]]]), config, size=(8, 8)).tolist()
      [[[7.0, 5.0]]]
    """
    (height, width), (x, y) = size, (point_BxPx2[..., 0], point_BxPx2[..., 1])
    if draws.mirrored_B is not None:
        x = jnp.where(draws.mirrored_B[:, None], width - x, x)
    if draws.angle_B is not None:
        angle = jnp.deg2rad(draws.angle_B)[:, None]
        x, y = x - width / 2, y - height / 2
        x, y = x * jnp.cos(angle) + y * jnp.sin(angle), y * jnp.cos(angle) - x * jnp.sin(angle)
        x, y = x + width / 2, y + height / 2
    if draws.offset_Bx2 is not None:
        moved = (config.pad_crop - draws.offset_Bx2).astype(x.dtype)
        x, y = x + moved[:, 1:], y + moved[:, :1]
    if draws.factor_B is not None and draws.corner_Bx2 is not None:
        factor = draws.factor_B[:, None]
        x, y = factor * x + draws.corner_Bx2[:, 1:], factor * y + draws.corner_Bx2[:, :1]
    return jnp.stack([x, y], axis=-1)


def flip(x_BxHxW: jax.Array, mirrored_B: jax.Array) -> jax.Array:
    """Mirrors the marked examples of (B, H, W, ...) left to right.

    Example:
      >>> flip(jnp.array([[[1, 2]], [[1, 2]]]), jnp.array([True, False])).tolist()
      [[[2, 1]], [[1, 2]]]
    """
    mirrored = mirrored_B.reshape(-1, *(1,) * (x_BxHxW.ndim - 1))
    return jnp.where(mirrored, x_BxHxW[:, :, ::-1], x_BxHxW)


FINER = 3  # images are turned at this many times their resolution


def turn(image_BxHxWxC: jax.Array, angle_B: jax.Array) -> jax.Array:
    """Turns images counterclockwise around their centres, by angles in degrees; 0 around.

    Images are enlarged three times, turned, and reduced again, each bilinearly, as in the code of
    Chavan et al. 2021. This smooths them, also at an angle of 0.

    Returns:
      (B, H, W, C) float32.

    Example:
      >>> x = jnp.zeros((1, 5, 5, 1)).at[0, 2, 4].set(1)  # at the right edge
      >>> turned = jax.jit(turn)(x, jnp.array([90.0]))
      >>> divmod(int(turned.argmax()), 5)  # row, column
      (0, 2)
    """
    B, H, W, C = image_BxHxWxC.shape
    large = jax.image.resize(
        image_BxHxWxC.astype(jnp.float32), (B, FINER * H, FINER * W, C), "linear"
    )
    row, column = ((size - 1) / 2 for size in large.shape[1:3])
    y, x = np.mgrid[: FINER * H, : FINER * W].astype(np.float32)
    y, x = y - np.float32(row), x - np.float32(column)

    def one(image: jax.Array, angle: jax.Array) -> jax.Array:
        cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
        places = [y * cos + x * sin + row, x * cos - y * sin + column]
        return jax.vmap(
            lambda channel: jax.scipy.ndimage.map_coordinates(channel, places, order=1),
            in_axes=-1,
            out_axes=-1,
        )(image)

    turned = jax.vmap(one)(large, angle_B)
    return jax.image.resize(turned, image_BxHxWxC.shape, "linear")


def shift(image_BxHxWxC: jax.Array, offset_Bx2: jax.Array, pad: int) -> jax.Array:
    """Pads each image by `pad` zeros on each side and crops it at its offset, 0 to 2 pad.

    On CPU, XLA copies whole windows here: for 512 images of 32x32 twice as fast as take_along_axis,
    nine times as fast as selecting among the static slices, and twenty times as fast as one-hot
    products (jaxlib 0.10).
    """
    padded = jnp.pad(image_BxHxWxC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    zero = jnp.zeros((), offset_Bx2.dtype)
    return jax.vmap(
        lambda image, offset: jax.lax.dynamic_slice(
            image, (offset[0], offset[1], zero), image_BxHxWxC.shape[1:]
        )
    )(padded, offset_Bx2)


def cutout(image_BxHxWxC: jax.Array, centre_Bx2: jax.Array, side: int) -> jax.Array:
    """Sets a square of each image to 0, clipped at the border.

    T. DeVries, G. W. Taylor, "Improved regularization of convolutional neural networks with Cutout"
    (2017).
    """
    _, height, width, _ = image_BxHxWxC.shape
    start_Bx2 = centre_Bx2 - side // 2
    rows_BxH = _within(jnp.arange(height), start_Bx2[:, 0], side)
    columns_BxW = _within(jnp.arange(width), start_Bx2[:, 1], side)
    square = (rows_BxH[:, :, None] & columns_BxW[:, None, :])[..., None]
    return jnp.where(square, jnp.zeros((), image_BxHxWxC.dtype), image_BxHxWxC)


def recolour(image_BxHxWxC: jax.Array, factor_Bx3: jax.Array) -> jax.Array:
    """Multiplies brightness, contrast and saturation, in this order, of pixels from 0 to 255.

    Brightness scales pixels; contrast their difference from the mean grey of the image; saturation
    their difference from their own grey. Results are clipped to 0 to 255 after each. Images without
    three channels have no saturation.

    Returns:
      (B, H, W, C) float32.
    """
    x = image_BxHxWxC.astype(jnp.float32)
    brightness, contrast, saturation = (f[:, None, None, None] for f in factor_Bx3.T)
    x = jnp.clip(x * brightness, 0, 255)
    mean = jnp.mean(_grey(x), axis=(1, 2), keepdims=True)
    x = jnp.clip(mean + contrast * (x - mean), 0, 255)
    if x.shape[-1] != 3:
        return x
    return jnp.clip(_grey(x) + saturation * (x - _grey(x)), 0, 255)


def _grey(x_BxHxWxC: jax.Array) -> jax.Array:
    """(B, H, W, 1): the luma of ITU-R 601 of three channels, the mean of any other number."""
    weights = (0.299, 0.587, 0.114) if x_BxHxWxC.shape[-1] == 3 else None
    return jnp.average(x_BxHxWxC, axis=-1, weights=weights and jnp.array(weights), keepdims=True)


def zoom(image_BxHxWxC: jax.Array, factor_B: jax.Array, corner_Bx2: jax.Array) -> jax.Array:
    """Resizes images by their factors, bilinearly, with their corner at `corner_Bx2`; 0 around."""

    def one(image: jax.Array, factor: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), jnp.stack([factor, factor]), corner, "linear"
        )

    return jax.vmap(one)(image_BxHxWxC, factor_B, corner_Bx2)


def normalise(
    x: jax.Array, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> jax.Array:
    """(x - mean) / std, channel by channel; x itself where mean and std are None.

    Args:
      x: (..., C).
      mean: mean of each channel, on the scale of x.
      std: standard deviation of each channel; None as for `mean`.

    Returns:
      float32 of the same shape; x unchanged, in its own dtype, if mean is None.

    Raises:
      AugmentError: if mean or std does not have one value per channel.

    Example:
      >>> normalise(jnp.array([[[[7, 5]]]], jnp.uint8), mean=(1.0, 5.0), std=(2.0, 1.0)).ravel()
      Array([3., 0.], dtype=float32)
    """
    if mean is None or std is None:
        return x
    channels = x.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise AugmentError(
            f"mean has {len(mean)} numbers and std {len(std)}, but inputs have {channels} "
            "channels; pass one value per channel"
        )
    shape = (1,) * (x.ndim - 1) + (channels,)  # written out: rank promotion may be an error
    return (x.astype(jnp.float32) - np.asarray(mean, np.float32).reshape(shape)) / np.asarray(
        std, np.float32
    ).reshape(shape)


def _within(position_N: jax.Array, start_B: jax.Array, length: int) -> jax.Array:
    """Whether each position is in start .. start + length - 1: (B, N) bool."""
    return (position_N[None, :] >= start_B[:, None]) & (
        position_N[None, :] < start_B[:, None] + length
    )
