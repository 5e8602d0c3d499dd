"""Networks for several tasks: one network with several heads, or one network for each task.

Wang et al. 2021 generate networks for several tasks from one ring. Their networks are not known to
us; residual networks of the zoo are our choice.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from paramshare.models import Heads, ModelError, Networks
from paramshare.plan import Plan
from paramshare.zoo.family import Family, Network

CLASSIFIERS = ("resnet{depth}", "wrn-{depth}", "swrn-{depth}")
OUTPUTS = {"angle": 1, "digit": 10, "place": 2}  # without a data set: those of turned digits


def networks_for_tasks(classifiers: Sequence[Family]) -> Iterator[Family]:
    """Families of networks for several tasks: three for each family of residual `classifiers`."""
    ring, plain = "resnet20-rpg-10000", "resnet20"
    rows = (
        (
            "heads-{}",
            "one network for several tasks, which share all but the last layer",
            heads,
            (plain, ring),
        ),
        (
            "networks-{}",
            "one network for each task, which draw on the same banks",
            networks,
            (plain, ring),
        ),
        (
            "networks-{}-apart",
            "one network for each task, with banks of its own",
            functools.partial(networks, apart=True),
            (ring,),
        ),
    )
    for family in classifiers:
        if family.form.startswith(CLASSIFIERS):
            for form, about, build, listed in rows:
                yield dataclasses.replace(
                    family,
                    form=form.format(family.form),
                    about=f"{about}: {family.about}",
                    examples=tuple(form.format(name) for name in listed if name in family.examples),
                    build=functools.partial(build, family.build),
                    num_classes=OUTPUTS,
                )


def heads(
    build: Callable[..., Network], *, num_classes: Mapping[str, int], **options: Any
) -> Network:
    """One classifier, shared as it is, whose outputs are divided among tasks.

    Args:
      build: builds the classifier.
      num_classes: number of outputs of each task, by name.
      **options: arguments of `build`.
    """
    sizes = _sizes(num_classes)
    network, plan = build(num_classes=sum(size for _, size in sizes), **options)
    return Heads(network, sizes), None if plan is None else plan.under("network")


def networks(
    build: Callable[..., Network],
    *,
    num_classes: Mapping[str, int],
    apart: bool = False,
    **options: Any,
) -> Network:
    """A classifier for each task. Banks of the same name are one bank, unless `apart`.

    Args:
      build: builds a classifier.
      num_classes: number of outputs of each task, by name.
      apart: whether each classifier has banks of its own, named TASK.BANK.
      **options: arguments of `build`.
    """
    built, rules = [], []
    for name, size in _sizes(num_classes):
        network, plan = build(num_classes=size, **options)
        built.append((name, network))
        for rule in () if plan is None else plan.under(name).rules:
            bank = f"{name}.{rule.bank}" if apart else rule.bank
            rules.append(dataclasses.replace(rule, bank=bank))
    if apart and not rules:
        raise ModelError("the networks share nothing, so they are apart already; leave out -apart")
    return Networks(tuple(built)), Plan(*rules) if rules else None


def _sizes(num_classes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """(name, outputs) of each task, by name: a file may not keep the order of a mapping."""
    return tuple(sorted(num_classes.items()))
