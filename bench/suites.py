"""All suites, and what of them a run is to do."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from . import (
    bench_focus_attention,
    bench_kmeans,
    bench_llava,
    bench_merge_tokens,
    bench_token_importance,
)
from .case import Case
from .machine import Machine, Suite
from .record import label
from .runner import Effort, Meter, Notify, Result, run_case, short, silent

NAMES = ("importance", "kmeans", "merge", "focus", "decode", "llava")


def suites(size: str = "") -> dict[str, Suite]:
    """By name; size: of the model of ``llava``."""
    every = (
        bench_token_importance.SUITE,
        bench_kmeans.SUITE,
        bench_merge_tokens.SUITE,
        bench_focus_attention.FOCUS,
        bench_focus_attention.DECODE,
        bench_llava.suite(size),
    )
    return dict(zip(NAMES, every, strict=True))


@dataclass(frozen=True)
class Planned:
    """A set-up that is to be run, ``axis`` the parameter of the sweep that it is part of."""

    suite: Suite
    setup: Any
    machine: Machine
    axis: str | None = None

    @property
    def label(self) -> str:
        over = f"over {self.axis}: " if self.axis else ""
        return over + label(self.suite.name, self.case.params)

    @cached_property
    def case(self) -> Case:
        return self.suite.case(self.setup, self.machine)

    def run(
        self,
        effort: Effort,
        meter: Meter,
        notify: Notify = silent,
        only: Container[str] | None = None,
    ) -> Result:
        """only: the names of the providers that are wanted; who runs by itself runs all."""
        if self.suite.run:
            result: Result = self.suite.run(self.setup, self.machine, effort, notify)
        else:
            # by itself, so that its inputs go when it is done
            case = self.suite.case(self.setup, self.machine)
            if only is not None:
                chosen = [each for each in case.providers if each.name in only]
                case = replace(case, providers=chosen)
            result = run_case(case, effort, meter, notify)
        result.axis = self.axis
        if self.axis:
            result.targets = []
        return result

    def failed(self, error: Exception) -> dict[str, Any]:
        """What is recorded instead of a result."""
        return {
            "suite": self.suite.name,
            "params": self.case.params,
            "axis": self.axis,
            "error": short(error),
        }


def plan(
    machine: Machine,
    names: Iterable[str] = (),
    only: str = "",
    size: str = "",
    usual: bool = True,
    swept: bool = False,
    quick: bool = False,
) -> list[Planned]:
    """names: of suites, else all. only: a text that a label must have. swept: the sweeps too.
    quick: of the usual set-ups of llava those that the aims are about.

    Raises ValueError for a suite that there is not.
    """
    available = suites(size)
    unknown = set(names) - set(available)
    if unknown:
        raise ValueError(f"suites are {', '.join(available)}, got {', '.join(sorted(unknown))}")
    chosen = [available[name] for name in names or available]
    found = []
    for suite in chosen:
        if usual:
            found += [
                Planned(suite, setup, machine)
                for setup in suite.setups(machine)
                if not quick or getattr(setup, "judged", True)
            ]
    for suite in chosen:
        if swept:
            found += [
                Planned(suite, setup, machine, axis)
                for axis, setups in suite.sweeps(machine).items()
                for setup in setups
            ]
    return [planned for planned in found if only in planned.label]
