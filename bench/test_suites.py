"""``pytest bench/ --benchmark-json=FILE``: every provider as a benchmark of pytest-benchmark.

The providers of a set-up that were selected are timed in turn, as `vmtc bench` does it; then each
test hands the samples of its own to pytest-benchmark, whose tools keep, compare and draw them. A
provider that cannot run is skipped with its reason, and one whose result is wrong fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


class Replay:
    """A clock that goes on by one sample at each call of ``next_sample``."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def next_sample(self) -> None:
        self.now += next(self.samples)


CLOCK = Replay()


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False, warmup=False)
def test_provider(setup: str, provider: str, benchmark: Any, run: Any) -> None:
    result = run.result(setup)
    row = next(row for row in result["rows"] if row["name"] == provider)
    if row["status"] == "missing":
        pytest.skip(row["detail"])
    assert row["status"] == "ok", row["detail"]
    benchmark.group = setup
    benchmark.extra_info |= {key: row[key] for key in ("kind", "scope", "detail")}
    CLOCK.now = 0.0
    CLOCK.samples = iter([sample * result["images"] / 1e3 for sample in row["samples_ms"]])
    benchmark.pedantic(CLOCK.next_sample, rounds=len(row["samples_ms"]))
