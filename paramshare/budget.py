"""Sizes of schemes that fill a number of trainable parameters."""

from collections.abc import Callable

from paramshare.layout import Layout, PlanError, SharedBank
from paramshare.schemes import Scheme

MOST = 2**40  # the largest size that is tried


def fill_budget(layout: Layout, trainable: int, scheme: Callable[[int], Scheme]) -> dict[str, int]:
    """The largest sizes of the schemes of all banks for so many trainable parameters.

    One size for all banks, the largest that fits; then, in the order of the banks, one more where
    that still fits, until nothing does.

    Args:
      layout: which sites share a bank; its schemes do not matter.
      trainable: the trainable parameters of the whole model, at most.
      scheme: makes a scheme of a size from 1.

    Returns:
      A size for each bank, by name. A bank gets no more parameters than its weights have without
      sharing.

    Raises:
      PlanError: if size 1 needs more, or no sharing is needed.

    Example:
      >>> from paramshare import Site, Soft
      >>> from paramshare.layout import Layout, SharedBank
      >>> sites = tuple(Site(f"layer{i}/kernel", (4, 4)) for i in range(4))
      >>> layout = Layout((SharedBank("layers", Soft(1), sites),), plain=70)
      >>> fill_budget(layout, 60, Soft)  # 6 private parameters, 20 for each template
      {'layers': 2}
    """
    counts: dict[tuple[str, int], int] = {}

    def needed(bank: SharedBank, size: int) -> int:
        key = bank.name, size
        if key not in counts:
            counts[key] = sum(SharedBank(bank.name, scheme(size), bank.sites).trainable)
        return counts[key]

    def total(sizes: dict[str, int]) -> int:
        return layout.private + sum(needed(bank, sizes[bank.name]) for bank in layout.banks)

    def fits(size: int) -> bool:
        each = dict.fromkeys(layout, size)
        dense = any(needed(bank, size) > bank.dense for bank in layout.banks)
        return total(each) <= trainable and not dense

    if isinstance(trainable, bool) or not isinstance(trainable, int):
        raise PlanError(f"trainable={trainable!r}; it must be a whole number of parameters")
    if trainable >= layout.plain:
        raise PlanError(
            f"trainable={trainable:,}, but the plain model has {layout.plain:,} parameters; leave "
            "it unshared, or give a smaller number"
        )
    least = total(dict.fromkeys(layout, 1))
    if least > trainable:
        raise PlanError(
            f"trainable={trainable:,}, but with {scheme(1)} the model has {least:,} parameters, "
            f"{layout.private:,} of them not shared; give a larger number, or share more weights"
        )
    size = 1  # then the largest that fits, by doubling and bisection
    if fits(1):
        above = 2
        while above < MOST and fits(above):
            size, above = above, 2 * above
        while above - size > 1:
            middle = (size + above) // 2
            size, above = (middle, above) if fits(middle) else (size, middle)
    sizes = dict.fromkeys(layout, size)
    grew = True
    while grew:
        grew = False
        for bank in layout.banks:
            more = sizes | {bank.name: sizes[bank.name] + 1}
            now, then = (needed(bank, each[bank.name]) for each in (sizes, more))
            # A size that changes nothing, such as a rank above the full one, is not taken.
            if now < then <= bank.dense and total(more) <= trainable:
                sizes, grew = more, True
    return sizes
