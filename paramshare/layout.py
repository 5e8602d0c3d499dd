"""A resolved plan: which sites of a model draw on which bank through which scheme.

Layouts are hashable, and exist before any array does.
"""

import collections
import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping, Set
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from paramshare.errors import ParamshareError
from paramshare.partitioning import Partition
from paramshare.schemes import Scheme, SchemeError, Site, Sliced, Weights

COLLECTIONS = ("coefficients", "own")  # entries of variables["params"]; the third is "model"


class PlanError(ParamshareError):
    """A plan that does not fit the model, or variables that do not fit the plan."""


@dataclasses.dataclass(frozen=True)
class SharedBank:
    """One bank: a name, a scheme, and the sites that draw on the bank, in layer order.

    `partition` says how a device mesh divides its arrays; None does not divide them.
    """

    name: str
    scheme: Scheme
    sites: tuple[Site, ...]
    # No part of what identifies a network: it does not change what is computed.
    partition: Partition | None = dataclasses.field(default=None, repr=False)

    @property
    def trainable(self) -> tuple[int, int, int]:
        """The numbers of trainable parameters: of the bank, of coefficients, of own weights.

        Computed without touching a device.
        """
        bank, coefficients, own = map(count_leaves, self.scheme.shapes(self.sites))
        return bank, coefficients, own

    @property
    def dense(self) -> int:
        """How many parameters the sites would have without sharing."""
        return sum(site.size for site in self.sites)


@dataclasses.dataclass(frozen=True)
class Layout:
    """All banks of a model.

    Behaves as a mapping from bank names to `SharedBank`s: `layout["stage1"].sites`,
    `for name in layout`.

    Attributes:
      banks: the banks, in the order of the plan's rules, then of their first site.
      plain: the number of trainable parameters of the unshared model.
      integers: paths of scopes whose names are integers and not texts, such as those of `nnx.List`
        in a module from `flax.nnx.bridge.to_linen`.
    """

    banks: tuple[SharedBank, ...]
    plain: int
    integers: frozenset[str] = dataclasses.field(default=frozenset(), repr=False)

    def __iter__(self) -> Iterator[str]:
        return (bank.name for bank in self.banks)

    def __len__(self) -> int:
        return len(self.banks)

    def __getitem__(self, name: str) -> SharedBank:
        for bank in self.banks:
            if bank.name == name:
                return bank
        raise KeyError(name)

    @property
    def private(self) -> int:
        """The number of the model's parameters outside all banks."""
        return self.plain - sum(bank.dense for bank in self.banks)

    @property
    def trainable(self) -> int:
        """The number of trainable parameters: banks, coefficients, own weights and private ones."""
        return self.private + sum(sum(bank.trainable) for bank in self.banks)

    def init(self, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws every bank. A bank's key depends only on `key` and its name.

        Returns:
          `(banks, params)`. `banks` is `{BANK: ...}`. `params` is `{"coefficients": {BANK: {SITE:
          ...}}, "own": {BANK: {SITE: ...}}}`; empty entries are omitted.

        Raises:
          PlanError: if a scheme needs `mean` or `std` of the model's initializer and a site has
            none.
        """
        weights = {}
        for bank in self.banks:
            try:
                weights[bank.name] = bank.scheme.init(
                    jax.random.fold_in(key, zlib.crc32(bank.name.encode())), bank.sites
                )
            except SchemeError as error:
                raise PlanError(f"bank {bank.name!r}: {error}") from error
        return variables_of(weights)

    def boxed(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables with the arrays of partitioned banks in boxes; see `SharedBank.partition`.

        Banks are boxed, and own weights; coefficients are small, and whole on every device.
        """
        partitions = {bank.name: bank.partition for bank in self.banks if bank.partition}

        def box(entries: Mapping[str, Any]) -> dict[str, Any]:
            return {n: partitions[n].box(x) if n in partitions else x for n, x in entries.items()}

        params = variables.get("params", {})
        boxed = {"banks": box(variables["banks"])} if "banks" in variables else {}
        if "own" in params:
            boxed["params"] = {**params, "own": box(params["own"])}
        return {**variables, **boxed}

    def weights(self, variables: Mapping[str, Any]) -> dict[str, Weights]:
        """The arrays of every bank: `{BANK: Weights}`.

        Args:
          variables: `{"banks": ..., "params": {"coefficients": ..., "own": ...}}`, or with the
            banks under `params`; everything else is ignored.

        Raises:
          PlanError: if a bank is missing, or does not have the shapes of its scheme.
        """
        variables = separated(variables)
        params = variables.get("params", {})
        places = {"banks": variables.get("banks", {})}
        places |= {f"params/{name}": params.get(name, {}) for name in COLLECTIONS}
        places = nn.meta.unbox(places)
        weights = {}
        for bank in self.banks:
            for (place, entries), size in zip(places.items(), bank.trainable, strict=True):
                if size and bank.name not in entries:
                    raise PlanError(
                        f"no entry for bank {bank.name!r} in {place!r}, only {sorted(entries)}; "
                        "pass the variables of a model shared by this same plan"
                    )
            arrays = Weights(*(e.get(bank.name, {}) for e in places.values()))
            try:
                bank.scheme.check_weights(arrays, bank.sites)
            except SchemeError as error:
                raise PlanError(f"bank {bank.name!r}: {error}") from error
            weights[bank.name] = arrays
        return weights

    def expand(self, variables: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The weights made from the banks: path -> array, stacked where the parameter is stacked.

        Args:
          variables: as for `weights`.

        Raises:
          PlanError: if a bank is missing, or does not have the shapes of its scheme.
        """
        parts: dict[str, dict[int | None, jax.Array]] = collections.defaultdict(dict)
        axes, weights = {}, self.weights(variables)
        for bank in self.banks:
            try:
                kernels = bank.scheme.expand(weights[bank.name], bank.sites)
            except SchemeError as error:
                raise PlanError(f"bank {bank.name!r}: {error}") from error
            for site, kernel in zip(bank.sites, kernels, strict=True):
                parts[site.path][site.index] = kernel
                axes[site.path] = site.stack_axis
        return {
            path: layers[None]
            if None in layers
            else jnp.stack([layers[i] for i in range(len(layers))], axis=axes[path])
            for path, layers in parts.items()
        }

    @property
    def paths(self) -> frozenset[str]:
        """The paths of all sites' parameters in the plain model."""
        return frozenset(site.path for bank in self.banks for site in bank.sites)

    def read(self, params: Mapping[str, Any]) -> dict[str, tuple[jax.Array, ...]]:
        """The kernels of the sites in a plain model's `params`: `{BANK: kernels}`.

        Raises:
          PlanError: if a site is missing, or has another shape.
        """
        flat = flatten(nn.meta.unbox(params))

        def kernel(site: Site) -> jax.Array:
            if site.path not in flat:
                raise PlanError(
                    f"the variables have no parameter {site.path!r}; pass those of the plain model "
                    "that the plan is for"
                )
            value = flat[site.path]
            if site.index is not None:
                value = jnp.take(value, site.index, axis=site.stack_axis)
            if jnp.shape(value) != site.shape:
                raise PlanError(
                    f"parameter {site} must have shape {site.shape}, got {jnp.shape(value)}; pass "
                    "the variables of the plain model that the plan is for"
                )
            return value

        return {bank.name: tuple(kernel(site) for site in bank.sites) for bank in self.banks}

    def with_schemes(self, schemes: Mapping[str, Scheme]) -> "Layout":
        """The same banks and sites, with other schemes for some banks, by name.

        Raises:
          PlanError: if a bank does not exist, or its sites do not fit the scheme.
        """
        for name, scheme in schemes.items():
            if name not in list(self):
                raise PlanError(f"no bank {name!r}; the banks are {list(self)}")
            try:
                scheme.check(self[name].sites)
            except SchemeError as error:
                raise PlanError(f"bank {name!r}: {error}") from error
        banks = [dataclasses.replace(b, scheme=schemes.get(b.name, b.scheme)) for b in self.banks]
        return dataclasses.replace(self, banks=tuple(banks))

    def sliced(self, axis: str, count: int, dtype: str | None = None) -> "Layout":
        """The same layout for banks that are divided over the devices of a mapped axis.

        `shared.clone(layout=shared.layout.sliced("devices", 8))` is the network of one device,
        to be applied under `jax.pmap` or `jax.shard_map`; see `paramshare.schemes.Sliced`.

        Args:
          axis: name of the mapped axis.
          count: its size.
          dtype: dtype to communicate kernels in; None keeps theirs.
        """
        return self.with_schemes(
            {bank.name: Sliced(bank.scheme, axis, count, dtype) for bank in self.banks}
        )

    def describe(self) -> str:
        """A table of the banks: scheme, sites, shapes, trainable and saved parameters."""
        rows = [("bank", "scheme", "sites", "shape", "trainable", "saved")]
        for bank in self.banks:
            shapes = {site.shape for site in bank.sites}
            shape = "x".join(map(str, bank.sites[0].shape))
            shape = shape if len(shapes) == 1 else f"{len(shapes)} shapes"
            trained = sum(bank.trainable)
            saved = f"{bank.dense - trained:,}"
            sites = str(len(bank.sites))
            rows.append((bank.name, str(bank.scheme), sites, shape, f"{trained:,}", saved))
        rows.append(("(private)", "", "", "", f"{self.private:,}", ""))
        sites, saved = sum(len(b.sites) for b in self.banks), self.plain - self.trainable
        rows.append(("total", "", str(sites), "", f"{self.trainable:,}", f"{saved:,}"))
        lines = table(rows, right={2, 4, 5})
        for bank in self.banks:
            lines += ["", f"{bank.name}:", *(f"  {site}" for site in bank.sites)]
        return "\n".join(lines)


class HasLayout(Protocol):
    """A shared model, linen or NNX."""

    @property
    def layout(self) -> Layout:
        """What draws on what."""
        ...


def variables_of(weights: Mapping[str, Weights]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `Layout.weights`: `(banks, params)`, as `Layout.init` returns them."""
    banks = {name: bank for name, (bank, *_) in weights.items()}
    params = {
        collection: {
            name: getattr(arrays, collection)
            for name, arrays in weights.items()
            if jax.tree.leaves(getattr(arrays, collection))
        }
        for collection in COLLECTIONS
    }
    return banks, {collection: entries for collection, entries in params.items() if entries}


def separated(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """The variables of a `Shared` with the banks in a collection of their own.

    `Shared(..., collection="params")` has them under `params`.
    """
    params = variables.get("params", {})
    if "banks" in variables or "banks" not in params:
        return variables
    others = {name: value for name, value in params.items() if name != "banks"}
    rest = {"params": others} if others else {}
    return {
        **{n: v for n, v in variables.items() if n != "params"},
        "banks": params["banks"],
        **rest,
    }


def fill(
    params: Mapping[str, Any], kernels: Mapping[str, jax.Array], integers: Set[str] = frozenset()
) -> dict[str, Any]:
    """A module's `params` with kernels added, by path; `integers` as in `Layout`."""

    def scopes(path: str) -> tuple[str | int, ...]:
        names = path.split("/")
        heads = ("/".join(names[: i + 1]) for i in range(len(names)))
        return tuple(
            int(name) if head in integers else name for name, head in zip(names, heads, strict=True)
        )

    added = {scopes(path): kernel for path, kernel in kernels.items()}
    return unflatten_dict({**flatten_dict(params), **added})


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a module's `params` by path: the names of scopes, joined by "/"."""
    return {"/".join(map(str, scopes)): leaf for scopes, leaf in flatten_dict(params).items()}


def strip(params: Mapping[str, Any], paths: Set[str]) -> dict[str, Any]:
    """The inverse of `fill`: without these paths, and without scopes left empty."""
    flat = flatten_dict(params)
    return unflatten_dict(
        {scopes: leaf for scopes, leaf in flat.items() if "/".join(map(str, scopes)) not in paths}
    )


def table(rows: list[tuple[str, ...]], right: Set[int] = frozenset()) -> list[str]:
    """Lines of a text table. The first row is the head; columns in `right` are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


def count_leaves(tree: Any) -> int:
    """The number of entries of a pytree of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
