"""Learnable repetition: a kernel as transformed copies of a smaller one."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from paramshare.schemes.interface import UNIQUE, SchemeError, Site, bank_dtype, check_arrays, check_count, check_sites
from paramshare.schemes.repetition_fit import fit

Transform = Literal["swish", "linear", "fourier"]
NUMBERS = {"swish": 2, "linear": 0, "fourier": 6}  # learned a copy
IDENTITY = {"swish": (2.0, 0.0), "linear": (), "fourier": (0.0, 1.0, 0.0, 0.0, 0.0, 0.0)}  # those that make a plain copy


@dataclasses.dataclass(frozen=True)
class Repeat:
    r"""Kernels (..., ri, ro) made of smaller bases (..., bi, bo), tile by tile.

    .. math:: W'_{ij} = \alpha_{ij} W \sigma(-\beta_{ij} W)

    elementwise, for output tile i < ro div bo and input tile j < ri div bi, with two learned numbers a tile. Where bo does not divide ro,
    the first ro mod bo output slices of the result are appended, transformed once more with two numbers of their own; then the same
    along the inputs. A kernel of its base's shape is the base itself, with nothing learned beside it.

    Where the bases come from, one of three:

    * `like=small_model` (width): every kernel repeats a base of its own, of the shape that the parameter of the same path has in the
      small model.
    * `base=(..., bi, bo)` (width): the same with one shape for all.
    * `source="path"` (depth): all sites repeat one base, the kernel at that path, which is one of the sites and comes before the others.

    The bank is `{site: base}`, with one entry for depth; the coefficients are `{site: {"tiles": (r0, r1, m), "outputs": (m,), "inputs":
    (m,)}}`, the numbers of every tile and of the two remainders, of which there is what is needed. m is 2 ("fourier": 6); a site is
    named by its path, with dots for slashes.

    Bases start Xavier-uniform; numbers of n tiles uniform within sqrt(6 / (n + 1)), those of remainders uniform in [0, 1]. For
    weight decay on them too, as on all else in the paper's recipe: `Optimizer(decay_coefficients=True)`.

    Args:
      like: a Flax module, called with the same inputs as the model.
      base: the shape of every base.
      source: the path of the kernel that the others repeat.
      transform: "swish" (the paper's, above), "linear" (plain copies, nothing learned), or "fourier" (a_0 + a_1 w + ... + a_5 w^5, its name
        in the reference notwithstanding).

    Raises:
      SchemeError: if not exactly one of the three is given, or the transform is none of these.

    Example:
      >>> import jax
      >>> from paramshare import Repeat, Site
      >>> sites = (Site("conv2/kernel", (3, 3, 8, 8)), Site("conv3/kernel", (3, 3, 8, 20)))
      >>> scheme = Repeat(source="conv2/kernel")
      >>> bank, coefficients = scheme.init(jax.random.key(0), sites)
      >>> jax.tree.map(jax.numpy.shape, (bank, coefficients))
      ({'conv2.kernel': (3, 3, 8, 8)}, {'conv3.kernel': {'outputs': (2,), 'tiles': (2, 1, 2)}})
      >>> [kernel.shape for kernel in scheme.expand(bank, coefficients, sites)]
      [(3, 3, 8, 8), (3, 3, 8, 20)]

    References:
      Chavan et al., Rescaling CNN through Learnable Repetition of Network Parameters, ICIP 2021, arXiv:2101.05650
    """

    like: Any = None
    base: tuple[int, ...] | None = None
    source: str | None = None
    transform: Transform = "swish"
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(default=(), repr=False)  # of `like`'s parameters, once bound

    def __post_init__(self):
        given = [name for name in ("like", "base", "source") if getattr(self, name) is not None]
        if len(given) != 1:
            raise SchemeError(
                f"Repeat takes one of like=small_model, base=shape and source=path, got {' and '.join(given) or 'none of them'}"
            )
        if self.transform not in get_args(Transform):
            raise SchemeError(f"Repeat(transform={self.transform!r}): the transforms are {', '.join(map(repr, get_args(Transform)))}")
        if isinstance(self.like, str) and not self.shapes:
            raise SchemeError(f"Repeat(like={self.like!r}): like takes the small model itself, a Flax module")
        if self.source is not None and not isinstance(self.source, str):
            raise SchemeError(f"Repeat(source={self.source!r}): source is the path of a kernel, such as 'conv1/kernel'")
        if self.base is not None:
            sizes = tuple(self.base) if isinstance(self.base, Sequence) else ()
            if len(sizes) < 2:
                raise SchemeError(f"Repeat(base={self.base!r}): a base is a shape of two axes or more, the last two its inputs and outputs")
            object.__setattr__(self, "base", tuple(check_count("Repeat", "base", size, 1) for size in sizes))

    def __str__(self) -> str:
        what = (
            f"like={self.like if isinstance(self.like, str) else type(self.like).__name__}"
            if self.like is not None
            else f"base={self.base}"
            if self.base
            else f"source={self.source!r}"
        )
        return f"Repeat({what}{'' if self.transform == 'swish' else f', transform={self.transform!r}'})"

    def bind(self, shapes_of: Callable[[Any], Mapping[str, tuple[int, ...]]]) -> "Repeat":
        """The scheme with the shapes of the small model's parameters in it, and in the small model's place its name."""
        if self.like is None or self.shapes:
            return self
        return dataclasses.replace(self, like=type(self.like).__name__, shapes=tuple(shapes_of(self.like).items()))

    def check(self, sites: tuple[Site, ...]) -> None:
        """Raises `SchemeError` unless every site has a base that fits into it, and a source comes first."""
        check_sites(sites, self)
        if self.source is not None and str(sites[0]) != self.source:
            if self.source not in map(str, sites):
                raise SchemeError(f"{self}: the source is not among the sites ({sites[0]}, ...); let the rule match it too")
            raise SchemeError(
                f"{self}: the model calls {sites[0]} before its source; layers repeat an earlier one, so make {sites[0]} the source"
            )
        names = collections.Counter(map(_name, sites))
        for site, base in zip(sites, self._bases(sites), strict=True):
            if names[_name(site)] > 1:
                raise SchemeError(
                    f"{self}: {site} and another site are both named {_name(site)!r}; give them rules with banks of their own"
                )
            if len(site.shape) < 2:
                raise SchemeError(f"{self}: {site} is {site.shape}; repetition needs two axes or more, the last two inputs and outputs")
            if len(site.shape) != len(base) or site.shape[:-2] != base[:-2]:
                raise SchemeError(
                    f"{self}: {site} is {site.shape} and its base {base}; all axes but the last two, inputs and outputs, must be equal"
                )
            if base[-2] > site.shape[-2] or base[-1] > site.shape[-1]:
                raise SchemeError(f"{self}: the base {base} of {site} is larger than its target {site.shape}; take a smaller base")

    def init(self, key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
        """Draws Xavier-uniform bases, and the numbers of tiles and remainders."""
        self.check(sites)
        dtype = bank_dtype(sites)
        bank_shapes, coefficient_shapes = self._arrays(sites)
        bank, coefficients = {}, {}
        for number, site in enumerate(sites):
            name = _name(site)
            base_key, *number_keys = jax.random.split(jax.random.fold_in(key, number), 4)
            if name in bank_shapes:
                shape = bank_shapes[name]
                limit = math.sqrt(6 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1])))
                bank[name] = jax.random.uniform(base_key, shape, dtype, -limit, limit)
            if name in coefficient_shapes:
                shapes = coefficient_shapes[name]
                limit = math.sqrt(6 / (math.prod(shapes["tiles"][:2]) + 1))
                ranges = {"tiles": (-limit, limit), "outputs": (0.0, 1.0), "inputs": (0.0, 1.0)}
                coefficients[name] = {
                    what: jax.random.uniform(key, shapes[what], dtype, *ranges[what])
                    for key, what in zip(number_keys, ranges, strict=True)
                    if what in shapes
                }
        return bank, coefficients

    def expand(
        self, bank: dict[str, jax.Array], coefficients: dict[str, dict[str, jax.Array]], sites: tuple[Site, ...]
    ) -> tuple[jax.Array, ...]:
        """The kernels; `SchemeError` if the arrays are not of the shapes that `init` gives."""
        bank_shapes, coefficient_shapes = self._arrays(sites)
        check_arrays(self, "a bank", bank, bank_shapes)
        check_arrays(self, "coefficients", coefficients, coefficient_shapes)
        kernels = []
        for site in sites:
            base = bank[_name(sites[0] if self.source is not None else site)]
            kernel = base if site.shape == base.shape else self._repeat(base, site.shape, coefficients.get(_name(site), {}))
            kernels.append(kernel.astype(site.dtype))
        return tuple(kernels)

    def from_dense(
        self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]
    ) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
        """Bases, and numbers, whose kernels are near to the given ones, in the sum of squares.

        "linear", and kernels of their base's own shape: the nearest there are, every entry of a base the mean of what repeats it. Else by
        alternating least squares (`paramshare.schemes.repetition_fit`), never farther than plain copies of those means; the problem is not
        convex, so that others may be nearer.

        Args:
          kernels: arrays, in the order of the sites.
          sites: the bank's sites.

        Raises:
          SchemeError: if the kernels do not have the sites' shapes.
        """
        self.check(sites)
        check_arrays(self, "kernels", tuple(kernels), tuple(site.shape for site in sites))
        dtype, bases = bank_dtype(sites), self._bases(sites)
        wanted = [jnp.asarray(kernel, dtype) for kernel in kernels]
        identity = jnp.asarray(IDENTITY[self.transform], dtype)
        numbers = {
            name: {what: jnp.broadcast_to(identity, shape) for what, shape in shapes.items()}
            for name, shapes in self._arrays(sites)[1].items()
        }
        together = [range(len(sites))] if self.source is not None else [[i] for i in range(len(sites))]
        bank, coefficients = {}, {}
        for members in together:
            own = [numbers.get(_name(sites[i]), {}) for i in members]
            base, own = fit(self._repeat, [wanted[i] for i in members], bases[members[0]], own, centred=self.transform == "fourier")
            bank[_name(sites[members[0]])] = base
            coefficients |= {_name(sites[i]): its for i, its in zip(members, own, strict=True) if its}
        return bank, coefficients

    def _repeat(self, base: jax.Array, shape: tuple[int, ...], numbers: dict[str, jax.Array]) -> jax.Array:
        *cell, inputs, outputs = base.shape
        tiles_in, tiles_out = shape[-2] // inputs, shape[-1] // outputs
        copies = base.reshape(*cell, 1, inputs, 1, outputs)
        if numbers:  # indexed by output tile first; the copies' axes are (..., r1, bi, r0, bo)
            per_copy = jnp.moveaxis(numbers["tiles"], -1, 0).swapaxes(1, 2)[:, :, None, :, None]
            copies = self._transform(copies, [jnp.expand_dims(n, tuple(range(len(cell)))) for n in per_copy])
        else:
            copies = jnp.broadcast_to(copies, (*cell, tiles_in, inputs, tiles_out, outputs))
        kernel = copies.reshape(*cell, tiles_in * inputs, tiles_out * outputs)
        for axis, name in ((-1, "outputs"), (-2, "inputs")):
            rest = shape[axis] - kernel.shape[axis]
            if rest:
                slices = jax.lax.slice_in_dim(kernel, 0, rest, axis=axis % kernel.ndim)
                slices = self._transform(slices, list(numbers[name])) if numbers else slices
                kernel = jnp.concatenate([kernel, slices], axis=axis)
        return kernel

    def _transform(self, w: jax.Array, numbers: list[jax.Array]) -> jax.Array:
        """`w` transformed with numbers that broadcast against it."""
        if self.transform == "swish":
            alpha, beta = numbers
            return alpha * w * jax.nn.sigmoid(-beta * w)
        power, total = jnp.ones_like(w), jnp.zeros_like(w)
        for a in numbers:
            total, power = total + a * power, power * w
        return total

    def _bases(self, sites: tuple[Site, ...]) -> tuple[tuple[int, ...], ...]:
        """The shape of every site's base."""
        if self.like is None:
            return (self.base if self.base is not None else sites[0].shape,) * len(sites)
        known = dict(self.shapes)
        for site in sites:
            if site.path not in known:
                raise SchemeError(
                    f"{self}: the small model has no parameter {site.path!r} to repeat"
                    + ("" if known else "; a plan binds the scheme to it")
                )
        return tuple(_one(known[site.path], site) for site in sites)

    def _arrays(self, sites: tuple[Site, ...]) -> tuple[dict[str, tuple], dict[str, dict[str, tuple]]]:
        """Shapes of the bank and of the coefficients."""
        bases, m = self._bases(sites), NUMBERS[self.transform]
        bank = {_name(site): base for site, base in zip(sites, bases, strict=True)}
        coefficients = {}
        for site, base in zip(sites, bases, strict=True):
            if site.shape == base or not m:
                continue
            (tiles_in, rest_in), (tiles_out, rest_out) = (divmod(site.shape[axis], base[axis]) for axis in (-2, -1))
            shapes = {"tiles": (tiles_out, tiles_in, m)}
            shapes |= ({"outputs": (m,)} if rest_out else {}) | ({"inputs": (m,)} if rest_in else {})
            coefficients[_name(site)] = shapes
        return {_name(sites[0]): bases[0]} if self.source is not None else bank, coefficients


def _name(site: Site) -> str:
    # Dots, for tools that join the keys of a tree by slashes; and no name that means something else in other banks and coefficients.
    name = str(site).replace("/", ".")
    return f".{name}" if name in ("kernels", "filters", UNIQUE) else name


def _one(shape: tuple[int, ...], site: Site) -> tuple[int, ...]:
    """The shape of one layer's part of a parameter that stacks layers as the site's does."""
    return shape if site.index is None else shape[: site.stack_axis] + shape[site.stack_axis + 1 :]
