"""Timing of several callables, interleaved: a drift of the machine hits all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# below this an untimed call precedes each sample, so that every provider starts with its own data
# in the caches; above it the caches are cold after the first pages anyway
REWARM_BELOW_S = 0.1
MIN_SAMPLES = 3


@dataclass(frozen=True)
class Clock:
    """How a sample is taken.

    measure: (callable, number of calls) -> seconds for one call.
    settle: idle seconds before each sample.
    sample: seconds; what is shorter repeats the call, so that the clock does not count.
    """

    measure: Callable[[Callable[[], Any], int], float]
    settle: float
    sample: float


@dataclass(frozen=True)
class Timing:
    """Seconds a call: a sample for each turn, none discarded, each the mean of ``calls`` calls."""

    samples: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return self.percentile(50)

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.samples, percent))


@dataclass(frozen=True)
class _Plan:
    samples: int
    calls: int
    rewarm: bool

    def due(self, turn: int, turns: int) -> bool:
        """Whether this turn takes a sample: as many as planned, spread over all turns."""
        return turn * self.samples // turns < (turn + 1) * self.samples // turns


def _wall(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


# it settles because worker threads of the former provider spin for a while after it
WALL = Clock(_wall, settle=5e-3, sample=2e-3)


def interleaved(
    functions: dict[str, Callable[[], Any]],
    *,
    repetitions: int,
    seconds: float,
    clock: Clock = WALL,
    notify: Callable[[float], None] = lambda done: None,
) -> dict[str, Timing]:
    """Time every function ``repetitions`` times in turn, starting each turn with another one.

    A function that would take longer than ``seconds`` gets fewer samples, but three at least.
    notify: told before each turn which share of them is done.
    """
    plans = {name: _plan(call, repetitions, seconds, clock) for name, call in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(repetitions):
        notify(turn / repetitions)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if plans[name].due(turn, repetitions):
                samples[name].append(_sample(functions[name], plans[name], clock))
    return {name: Timing(tuple(samples[name]), plans[name].calls) for name in names}


def _plan(call: Callable[[], Any], repetitions: int, seconds: float, clock: Clock) -> _Plan:
    # the first call warms up: pages, caches, thread pools, lazy imports
    call()
    once = clock.measure(call, 1)
    calls = max(1, math.ceil(clock.sample / once))
    rewarm = once < REWARM_BELOW_S
    turn = clock.settle + once * (calls + rewarm)
    affordable = max(MIN_SAMPLES, int(seconds / turn))
    return _Plan(min(repetitions, affordable), calls, rewarm)


def _sample(call: Callable[[], Any], plan: _Plan, clock: Clock) -> float:
    time.sleep(clock.settle)
    if plan.rewarm:
        call()
    return clock.measure(call, plan.calls)
