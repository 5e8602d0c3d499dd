"""Learnable repetition: a kernel as transformed copies of a smaller one."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paramshare.schemes.initial import model_std
from paramshare.schemes.interface import (
    Initial,
    Scheme,
    SchemeError,
    Site,
    Weights,
    bank_dtype,
    check_choice,
    check_count,
)
from paramshare.schemes.repetition_fit import fit
from paramshare.schemes.repetition_transform import (
    PARAMETERS,
    Transform,
    identity,
    neutral,
    transform,
)

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Repeat(Scheme):
    r"""Kernels (..., ri, ro) tiled from smaller bases (..., bi, bo).

    .. math:: W'_{ij} = \alpha_{ij} W \sigma(-\beta_{ij} W)

    elementwise, for output tile i < ro div bo and input tile j < ri div bi, with two learned
    scalars for each tile. Where bo does not divide ro, the first ro mod bo output slices of the
    result are appended, transformed again with two additional scalars; then the same along the
    inputs. A kernel of its base's shape is the base itself, without learned scalars. Kernels
    are tiled in matrix form (`Site.matrix_shape`): the last two axes count inputs and outputs.

    A base comes from one of three places:

    * `like=small_model` (width): every kernel repeats its own base, shaped like the parameter
      at the same path in the small model.
    * `base=(..., bi, bo)` (width): the same, with one base shape for all sites.
    * `source="path"` (depth): all sites repeat one base, the kernel at that path. It must be one of
      the sites, and the first.

    The bank is `{site: base}` (one entry for `source`). A site's coefficients are `{"tiles":
    (ro div bo, ri div bi, m), "outputs": (m,), "inputs": (m,)}`, for the tiles and the two
    remainders, where present; m is 2 (0 for "linear", 1 for "scale", 6 for "fourier").

    Initialization with "paper": bases are Xavier-uniform, the scalars of n tiles are uniform within
    sqrt(6 / (n + 1)), and those of remainders are uniform in [0, 1]. With "model": bases are normal
    with the standard deviation of their site, beta is as in the paper, and alpha, with a random
    sign, gives each tile and remainder the site's standard deviation; for "scale", a does this, for
    "fourier" a_1, while a_2 is small and the rest are zero. Plain copies ("linear", or sites of the
    base's shape) have the base's standard deviation; with `source`, the source's.

    The paper's recipe decays coefficients like all other parameters:
    `Optimizer(decay_coefficients=True)`.

    Args:
      like: a Flax module, called with the same inputs as the model.
      base: the shape of every base, in matrix form.
      source: the path of the kernel that the other sites repeat.
      transform: "swish" (the paper's formula above), "linear" (plain copies, nothing learned),
        "scale" (a w: every copy is the base up to a learned factor), or "fourier" (a_0 + a_1 w +
        ... + a_5 w^5). Those but "scale" are named as in the reference code.
      initial: the initialization, as described above.

    Raises:
      SchemeError: unless exactly one of `like`, `base` and `source` is given, or if an argument is
        invalid.

    Example:
      >>> import jax
      >>> from paramshare import Repeat, Site
      >>> sites = (Site("a/kernel", (8, 8), std=0.3), Site("b/kernel", (8, 20), std=0.2))
      >>> scheme = Repeat(source="a/kernel")
      >>> weights = scheme.init(jax.random.key(0), sites)
      >>> jax.tree.map(jax.numpy.shape, weights.bank)
      {'a.kernel': (8, 8)}
      >>> jax.tree.map(jax.numpy.shape, weights.coefficients)
      {'b.kernel': {'outputs': (2,), 'tiles': (2, 1, 2)}}
      >>> [kernel.shape for kernel in scheme.expand(weights, sites)]
      [(8, 8), (8, 20)]

    References:
      Chavan et al., Rescaling CNN through Learnable Repetition of Network Parameters, ICIP 2021,
      arXiv:2101.05650
    """

    like: Any = None
    base: Shape | None = None
    source: str | None = None
    transform: Transform = "swish"
    initial: Initial = "model"
    # The shapes of `like`'s parameters, once bound.
    shapes_by_path: tuple[tuple[str, Shape], ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self):
        given = [name for name in ("like", "base", "source") if getattr(self, name) is not None]
        if len(given) != 1:
            raise SchemeError(
                "Repeat takes exactly one of like=small_model, base=shape and source=path, got "
                f"{' and '.join(given) or 'none of them'}"
            )
        check_choice("Repeat", "transform", self.transform, Transform)
        check_choice("Repeat", "initial", self.initial, Initial)
        if isinstance(self.like, str) and not self.shapes_by_path:
            raise SchemeError(
                f"Repeat(like={self.like!r}): like must be the small model itself, a Flax module"
            )
        if self.source is not None and not isinstance(self.source, str):
            raise SchemeError(
                f"Repeat(source={self.source!r}): source must be a path such as 'conv1/kernel'"
            )
        if self.base is not None:
            sizes = tuple(self.base) if isinstance(self.base, Sequence) else ()
            if len(sizes) < 2:
                raise SchemeError(
                    f"Repeat(base={self.base!r}): base must be a shape of two axes or more, the "
                    "last two for inputs and outputs"
                )
            sizes = tuple(check_count("Repeat", "base", size, 1) for size in sizes)
            object.__setattr__(self, "base", sizes)

    def __str__(self) -> str:
        if self.like is not None:
            name = self.like if isinstance(self.like, str) else type(self.like).__name__
            origin = f"like={name}"
        else:
            origin = f"base={self.base}" if self.base else f"source={self.source!r}"
        suffix = "" if self.transform == "swish" else f", transform={self.transform!r}"
        return f"Repeat({origin}{suffix})"

    def bind(self, shapes_of: Callable[[Any], Mapping[str, Shape]]) -> "Repeat":
        """The scheme with the name and the parameter shapes of the small model, instead of it."""
        if self.like is None or self.shapes_by_path:
            return self
        shapes = tuple(shapes_of(self.like).items())
        return dataclasses.replace(self, like=type(self.like).__name__, shapes_by_path=shapes)

    def _check(self, sites: tuple[Site, ...]) -> None:
        if self.source is not None and self.source not in map(str, sites):
            raise SchemeError(
                f"{self}: the source is not among the sites ({sites[0]}, ...); the rule must match "
                "it too"
            )
        for site in sites:
            if len(site.shape) < 2:
                raise SchemeError(
                    f"{self}: {site} is {site.shape}; repetition needs two axes or more, for "
                    "inputs and outputs"
                )
        for site, base in zip(sites, self._bases(sites), strict=True):
            target = site.matrix_shape
            if len(target) != len(base) or target[:-2] != base[:-2]:
                raise SchemeError(
                    f"{self}: {site} is {target} and its base {base}; all axes but the last two, "
                    "inputs and outputs, must be equal"
                )
            if base[-2] > target[-2] or base[-1] > target[-1]:
                raise SchemeError(
                    f"{self}: the base {base} of {site} is larger than its target {target}; use a "
                    "smaller base"
                )

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        dtype, paper = bank_dtype(sites), self.initial == "paper"
        base_shapes, coefficient_shapes = self._array_shapes(sites)
        bank, coefficients = {}, {}
        for number, site in enumerate(sites):
            base_key, *scalar_keys = jax.random.split(jax.random.fold_in(key, number), 4)
            if site.key in base_shapes:
                shape = base_shapes[site.key]
                if paper:
                    limit = math.sqrt(6 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1])))
                    bank[site.key] = jax.random.uniform(base_key, shape, dtype, -limit, limit)
                else:
                    bank[site.key] = model_std(site) * jax.random.normal(base_key, shape, dtype)
            if site.key in coefficient_shapes:
                shapes = coefficient_shapes[site.key]
                limit = math.sqrt(6 / (math.prod(shapes["tiles"][:2]) + 1))
                ranges = {"tiles": (-limit, limit), "outputs": (0.0, 1.0), "inputs": (0.0, 1.0)}
                origin = self._origin(site, sites)
                coefficients[site.key] = {
                    name: jax.random.uniform(scalar_key, shapes[name], dtype, *ranges[name])
                    if paper
                    else neutral(
                        self.transform,
                        scalar_key,
                        jnp.zeros(shapes[name], dtype),
                        ranges[name],
                        before=model_std(origin if name == "tiles" else site),
                        after=model_std(site),
                    )
                    for scalar_key, name in zip(scalar_keys, ranges, strict=True)
                    if name in shapes
                }
        return Weights(bank, coefficients)

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        kernels = []
        for site in sites:
            kernel = weights.bank[self._origin(site, sites).key]
            if site.matrix_shape != kernel.shape:
                scalars = weights.coefficients.get(site.key, {})
                kernel = self._repeat(kernel, site.matrix_shape, scalars)
            kernels.append(site.from_matrix(kernel))
        return tuple(kernels)

    def _from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        """Bases and coefficients whose kernels are near to the given ones.

        "linear", and kernels of their base's shape: the nearest ones; every entry of a base is the
        mean of the entries that repeat it. Otherwise by alternating least squares (`fit`), never
        farther than plain copies of those means. The problem is not convex: there may be nearer
        ones.
        """
        bases = self._bases(sites)
        targets = [site.to_matrix(kernel) for site, kernel in zip(sites, kernels, strict=True)]
        start = jnp.asarray(identity(self.transform), kernels[0].dtype)
        scalars = {
            key: {name: jnp.broadcast_to(start, shape) for name, shape in shapes.items()}
            for key, shapes in self._array_shapes(sites)[1].items()
        }
        pools = [range(len(sites))] if self.source is not None else [[i] for i in range(len(sites))]
        bank, coefficients = {}, {}
        for members in pools:
            base, fitted = fit(
                self._repeat,
                [targets[i] for i in members],
                bases[members[0]],
                [scalars.get(sites[i].key, {}) for i in members],
                centred=self.transform == "fourier",
            )
            bank[self._origin(sites[members[0]], sites).key] = base
            coefficients |= {
                sites[i].key: values for i, values in zip(members, fitted, strict=True) if values
            }
        return Weights(bank, coefficients)

    def _repeat(self, base: jax.Array, shape: Shape, scalars: dict[str, jax.Array]) -> jax.Array:
        *cell, inputs, outputs = base.shape
        tiles_in, tiles_out = shape[-2] // inputs, shape[-1] // outputs
        copies = base.reshape(*cell, 1, inputs, 1, outputs)
        if scalars:  # indexed by output tile first; the copies' axes are (..., r1, bi, r0, bo)
            per_copy = jnp.moveaxis(scalars["tiles"], -1, 0).swapaxes(1, 2)[:, :, None, :, None]
            copies = transform(
                self.transform,
                copies,
                [jnp.expand_dims(n, tuple(range(len(cell)))) for n in per_copy],
            )
        else:
            copies = jnp.broadcast_to(copies, (*cell, tiles_in, inputs, tiles_out, outputs))
        kernel = copies.reshape(*cell, tiles_in * inputs, tiles_out * outputs)
        for axis, name in ((-1, "outputs"), (-2, "inputs")):
            remainder = shape[axis] - kernel.shape[axis]
            if remainder:
                slices = jax.lax.slice_in_dim(kernel, 0, remainder, axis=axis % kernel.ndim)
                if scalars:
                    slices = transform(self.transform, slices, list(scalars[name]))
                kernel = jnp.concatenate([kernel, slices], axis=axis)
        return kernel

    def _bases(self, sites: tuple[Site, ...]) -> tuple[Shape, ...]:
        """The shape of every site's base, in matrix form."""
        if self.like is None:
            source = self._origin(sites[0], sites).matrix_shape
            return (self.base if self.base is not None else source,) * len(sites)
        shapes = dict(self.shapes_by_path)
        for site in sites:
            if site.path not in shapes:
                raise SchemeError(
                    f"{self}: the small model has no parameter {site.path!r} to repeat"
                    + ("" if shapes else "; a plan binds the scheme to it")
                )
        return tuple(_small_matrix(shapes[site.path], site) for site in sites)

    def _array_shapes(
        self, sites: tuple[Site, ...]
    ) -> tuple[dict[str, Shape], dict[str, dict[str, Shape]]]:
        """Shapes of the bank and of the coefficients."""
        bases, m = self._bases(sites), PARAMETERS[self.transform]
        bank = {site.key: base for site, base in zip(sites, bases, strict=True)}
        coefficients = {}
        for site, base in zip(sites, bases, strict=True):
            target = site.matrix_shape
            if target == base or not m:
                continue
            (tiles_in, more_in), (tiles_out, more_out) = (
                divmod(target[axis], base[axis]) for axis in (-2, -1)
            )
            shapes = {"tiles": (tiles_out, tiles_in, m)}
            shapes |= {"outputs": (m,)} if more_out else {}
            shapes |= {"inputs": (m,)} if more_in else {}
            coefficients[site.key] = shapes
        return {self._origin(site, sites).key: bank[site.key] for site in sites}, coefficients

    def _origin(self, site: Site, sites: tuple[Site, ...]) -> Site:
        """The site whose base `site` repeats: the source, or itself."""
        if self.source is None:
            return site
        return next(other for other in sites if str(other) == self.source)


def _small_matrix(shape: Shape, site: Site) -> Shape:
    """The matrix shape of the small model's parameter, stacked as the site's parameter is."""
    if site.index is not None:
        shape = shape[: site.stack_axis] + shape[site.stack_axis + 1 :]
    if len(shape) != len(site.shape):
        return shape
    return dataclasses.replace(site, shape=shape).matrix_shape
