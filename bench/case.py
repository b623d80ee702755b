"""What a suite declares: a set-up, who does the work, what it must cost, what is aimed at.

Declaring is cheap: inputs and expected results are made by what runs first, so that all that could
be timed can be listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["ours", "reference", "rival", "floor"]

# scopes that are spoken of elsewhere
EVERYTHING, CLUSTERS = "everything", "clustering alone"
# how the scope of another method for the same end begins
OWN_RULE = "by its own rule"


@dataclass(frozen=True)
class Verdict:
    """Whether a provider's result agrees with the reference, and a few words on how well."""

    ok: bool
    detail: str


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    kind: ``ours``; ``reference``, our own definition; ``rival``; ``floor``, a part of the work that
        nobody can do without.
    scope: what it does, where that is not the whole operation.
    verify: judges the result of ``run``.
    missing: why it cannot run here; then ``run`` is never called.
    others: the same as ``run`` on other inputs of the same sizes, for a GPU.
    launch: how a GPU gets it, captured in a graph or call by call.
    slow: why it takes a minute or more; quick runs and sweeps leave it out.
    traced: whether its memory comes from torch's allocator, which tells its peak.
    """

    name: str
    kind: Kind
    scope: str
    run: Callable[[], Any]
    verify: Callable[[Any], Verdict]
    missing: str | None = None
    others: tuple[Callable[[], Any], ...] = ()
    launch: Literal["graph", "eager"] = "graph"
    slow: str | None = None
    traced: bool = True


@dataclass(frozen=True)
class Cost:
    """What the operation costs one call when nothing is read twice and nothing is skipped."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Target:
    """The aim for ours: ``factor`` times faster than the fastest provider of kind ``against``, or,
    against a floor, at most ``factor`` times its time."""

    against: Kind
    factor: float
    # only against providers whose names begin so
    named: str = ""
    # only against those whose scope begins so
    scope: str = ""


@dataclass(frozen=True)
class Case:
    """One table.

    axis: the parameter that a sweep varies; None for a usual set-up.
    unit: what one of the ``images`` of a call is called.
    memory_unit: name and bytes of what the workspace of ours is measured in.
    """

    suite: str
    params: dict[str, Any]
    images: int
    cost: Cost
    providers: list[Provider]
    targets: list[Target]
    memory_unit: tuple[str, int] | None = None
    axis: str | None = None
    unit: Literal["image", "sequence"] = "image"
