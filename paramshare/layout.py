"""A resolved plan: which sites of a model draw on which bank through which scheme. Hashable, and fixed before any array exists."""

import collections
import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp

from paramshare.schemes import Bank, Coefficients, Scheme, SchemeError, Site


class PlanError(ValueError):
    """A plan does not fit the model, or variables do not fit the plan."""


@dataclasses.dataclass(frozen=True)
class SharedBank:
    """One bank: its name, its scheme, and the sites that draw on it in layer order."""

    name: str
    scheme: Scheme
    sites: tuple[Site, ...]

    @functools.cached_property
    def trainable(self) -> tuple[int, int]:
        """How many numbers are trained: (in the bank, in the coefficients). Computed without touching a device."""
        bank, coefficients = jax.eval_shape(lambda: self.scheme.init(jax.random.key(0), self.sites))
        return sum(leaf.size for leaf in jax.tree.leaves(bank)), sum(leaf.size for leaf in jax.tree.leaves(coefficients))

    @property
    def dense(self) -> int:
        """How many numbers the sites' weights have."""
        return sum(site.size for site in self.sites)


@dataclasses.dataclass(frozen=True)
class Layout:
    """All banks of a model.

    Behaves as a mapping from bank names to `SharedBank`s: `layout["stage1"].sites`, `for name in layout`.

    Attributes:
      banks: the banks, in the order of the plan's rules, then of their first site.
      plain: how many numbers the unshared model trains.
    """

    banks: tuple[SharedBank, ...]
    plain: int

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
        """How many of the model's own numbers stay outside the banks."""
        return self.plain - sum(bank.dense for bank in self.banks)

    @property
    def trainable(self) -> int:
        """Banks, coefficients and private parameters together."""
        return self.private + sum(sum(bank.trainable) for bank in self.banks)

    def init(self, key: jax.Array) -> tuple[dict[str, Bank], dict[str, Coefficients]]:
        """Draws every bank and its coefficients. A bank's key depends on `key` and its name alone."""
        drawn = {b.name: b.scheme.init(jax.random.fold_in(key, zlib.crc32(b.name.encode())), b.sites) for b in self.banks}
        coefficients = {name: own for name, (_, own) in drawn.items() if jax.tree.leaves(own)}  # a scheme may have none
        return {name: bank for name, (bank, _) in drawn.items()}, coefficients

    def expand(self, banks: Mapping[str, Bank], coefficients: Mapping[str, Coefficients]) -> dict[str, jax.Array]:
        """The weights made of the banks: path -> array, stacked where the model's parameter is stacked.

        Raises:
          PlanError: if a bank of this layout is missing, or has not the shapes of its scheme.
        """
        weights: dict[str, dict[int | None, jax.Array]] = collections.defaultdict(dict)
        axes = {}
        for bank in self.banks:
            if bank.name not in banks or (bank.name not in coefficients and bank.trainable[1]):
                where = "banks" if bank.name not in banks else "params/coefficients"
                found = sorted(banks if where == "banks" else coefficients)
                raise PlanError(
                    f"no entry for bank {bank.name!r} in {where!r}, only {found}; pass the variables of a model shared by this same plan"
                )
            try:
                made = bank.scheme.expand(banks[bank.name], coefficients.get(bank.name, {}), bank.sites)
            except SchemeError as error:
                raise PlanError(f"bank {bank.name!r}: {error}") from error
            for site, weight in zip(bank.sites, made, strict=True):
                weights[site.path][site.index] = weight
                axes[site.path] = site.stack_axis
        return {
            path: parts[None] if None in parts else jnp.stack([parts[i] for i in range(len(parts))], axis=axes[path])
            for path, parts in weights.items()
        }

    def fill(self, params: Mapping[str, Any], weights: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The plain model's `params`: private parameters with the sites' weights put in their places."""
        filled = _copy(params)
        for path, weight in weights.items():
            *scopes, name = path.split("/")
            node = filled
            for scope in scopes:
                node = node.setdefault(scope, {})
            node[name] = weight
        return filled

    def strip(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `fill`: `params` without the sites, and without the scopes that this leaves empty."""
        paths = {site.path for bank in self.banks for site in bank.sites}

        def walk(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
            kept = {}
            for name, value in node.items():
                path = prefix + name
                if path in paths:
                    continue
                if isinstance(value, Mapping):
                    value = walk(value, path + "/")
                    if not value:
                        continue
                kept[name] = value
            return kept

        return walk(params, "")

    def read(self, params: Mapping[str, Any]) -> dict[str, tuple[jax.Array, ...]]:
        """The sites' weights as they stand in a plain model's `params`: for every bank, in the order of its sites.

        Raises:
          PlanError: if a site is not there, or has another shape.
        """

        def weight(site: Site) -> jax.Array:
            node: Any = params
            for name in site.path.split("/"):
                if not isinstance(node, Mapping) or name not in node:
                    raise PlanError(f"no parameter {site.path!r} among the variables; pass those of the plain model that the plan is for")
                node = node[name]
            found = node if site.index is None else jnp.take(node, site.index, axis=site.stack_axis)
            if jnp.shape(found) != site.shape:
                raise PlanError(f"parameter {site} is of shape {jnp.shape(found)}, the plan's model wants {site.shape}")
            return found

        return {bank.name: tuple(weight(site) for site in bank.sites) for bank in self.banks}

    def with_schemes(self, schemes: Mapping[str, Scheme]) -> "Layout":
        """The same banks and sites, some of them with another scheme.

        Raises:
          PlanError: if there is no bank of a name, or its sites do not fit the scheme.
        """
        for name, scheme in schemes.items():
            if name not in list(self):
                raise PlanError(f"no bank {name!r}; the banks are {list(self)}")
            try:
                scheme.check(self[name].sites)
            except SchemeError as error:
                raise PlanError(f"bank {name!r}: {error}") from error
        return dataclasses.replace(
            self, banks=tuple(SharedBank(bank.name, schemes.get(bank.name, bank.scheme), bank.sites) for bank in self.banks)
        )

    def describe(self) -> str:
        """A table: who shares what, and what it saves."""
        rows = [("bank", "scheme", "sites", "shape", "trainable", "saved")]
        for bank in self.banks:
            shapes = {site.shape for site in bank.sites}
            shape = "x".join(map(str, bank.sites[0].shape)) if len(shapes) == 1 else f"{len(shapes)} shapes"
            trained = sum(bank.trainable)
            rows.append((bank.name, str(bank.scheme), str(len(bank.sites)), shape, f"{trained:,}", f"{bank.dense - trained:,}"))
        rows.append(("(private)", "", "", "", f"{self.private:,}", ""))
        rows.append(
            ("total", "", str(sum(len(b.sites) for b in self.banks)), "", f"{self.trainable:,}", f"{self.plain - self.trainable:,}")
        )
        lines = table(rows, right={2, 4, 5})
        for bank in self.banks:
            lines += ["", f"{bank.name}:", *(f"  {site}" for site in bank.sites)]
        return "\n".join(lines)


def table(rows: list[tuple[str, ...]], right: Set[int] = frozenset()) -> list[str]:
    """Lines of a text table, the first row its head, columns in `right` aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) if isinstance(value, Mapping) else value for name, value in tree.items()}


def count_leaves(tree: Any) -> int:
    """How many numbers a pytree of arrays holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
