"""The run of a case: check every provider, then time those that passed, in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from . import environment, memory, timing
from .case import Case, Kind, Provider, Target, Verdict

# how far a case is, from 0 to 1, and what it is at
Notify = Callable[[float, str], None]


def silent(done: float, what: str) -> None: ...


# of a case's time: checking, which makes the data; the rest is timing
CHECKING = 0.3


class Meter(Protocol):
    """How providers are measured on a device."""

    notices_company: bool
    clock: timing.Clock

    def prepare(self, provider: Provider) -> tuple[Callable[[], Any], int]:
        """What is to be timed, and how many calls of the provider it makes."""
        ...

    def host_seconds(self, provider: Provider) -> float | None:
        """What the host takes to launch a call, where that is another time than the call's."""
        ...

    def peak_workspace(self, call: Callable[[], Any]) -> int: ...


class CpuMeter:
    notices_company = True
    clock = timing.WALL

    def prepare(self, provider: Provider) -> tuple[Callable[[], Any], int]:
        return provider.run, 1

    def host_seconds(self, provider: Provider) -> float | None:
        return None

    def peak_workspace(self, call: Callable[[], Any]) -> int:
        return memory.peak_workspace(call)


CPU = CpuMeter()


@dataclass(frozen=True)
class Effort:
    """Samples of each provider, and seconds that they may take at most.

    quick: a quick run or a sweep, without what is slow to begin.
    """

    repetitions: int
    seconds: float
    quick: bool = False


@dataclass
class Row:
    """A provider's line; times are milliseconds for one image."""

    name: str
    kind: Kind
    scope: str
    status: Literal["ok", "failed", "missing"]
    detail: str
    ms: dict[str, float] | None = None
    calls_per_sample: int = 0
    samples_ms: list[float] = field(default_factory=list)
    # milliseconds that the host takes to launch a call, all images together
    host_ms: float | None = None
    # bytes that a call holds at its worst moment besides its inputs and results; None where unseen
    peak_bytes: int | None = None


@dataclass
class Result:
    suite: str
    params: dict[str, Any]
    axis: str | None
    images: int
    unit: str
    cost: dict[str, int]
    rows: list[Row]
    targets: list[dict[str, Any]]
    workspace: dict[str, Any] | None
    # processors that other processes kept busy during the timing
    others_busy: float | None
    # what a suite has to say besides
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def disturbed(self) -> bool:
        return _disturbed(self.others_busy)


def run_case(case: Case, effort: Effort, meter: Meter = CPU, notify: Notify = silent) -> Result:
    rows = []
    for i, provider in enumerate(case.providers):
        notify(CHECKING * i / len(case.providers), f"checking {provider.name}")
        rows.append(_gate(provider, effort.quick))
    prepared = {}
    for provider, row in zip(case.providers, rows, strict=True):
        if row.status == "ok":
            try:
                if provider.traced:
                    row.peak_bytes = meter.peak_workspace(provider.run)
                prepared[provider.name] = meter.prepare(provider)
                host = meter.host_seconds(provider)
                row.host_ms = host * 1e3 if host is not None else None
            except Exception as error:  # what cannot be captured is shown and not timed
                row.status, row.detail = "failed", f"to time it: {short(error)}"
                prepared.pop(provider.name, None)
    others = environment.Others() if meter.notices_company else None
    timings = {}
    if prepared:
        timings = timing.interleaved(
            {name: call for name, (call, _) in prepared.items()},
            repetitions=effort.repetitions,
            seconds=effort.seconds,
            clock=meter.clock,
            notify=lambda done: notify(CHECKING + (1 - CHECKING) * done, "timing"),
        )
    busy = others.busy() if others else None
    for row in rows:
        if row.name in timings:
            calls = prepared[row.name][1]
            _fill(row, timings[row.name], 1e3 / case.images / calls, calls)
    return Result(
        case.suite,
        case.params,
        case.axis,
        case.images,
        case.unit,
        asdict(case.cost),
        rows,
        [_compare(target, rows, _disturbed(busy)) for target in case.targets],
        _workspace(case, rows),
        busy,
    )


def _disturbed(others_busy: float | None) -> bool:
    return others_busy is not None and others_busy > environment.QUIET


def _gate(provider: Provider, quick: bool) -> Row:
    missing = provider.missing
    if quick and provider.slow:
        missing = missing or f"left out of quick runs and sweeps: {provider.slow}"
    row = Row(provider.name, provider.kind, provider.scope, "missing", missing or "")
    if missing is None:
        try:
            verdict = provider.verify(provider.run())
        except Exception as error:  # a rival may raise anything; the table says what
            verdict = Verdict(False, short(error))
        row.status, row.detail = "ok" if verdict.ok else "failed", verdict.detail
    return row


def short(error: Exception) -> str:
    """Its type and the beginning of its text: that of a compiler may fill pages."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 300 else f"{text[:300]}..."


def _fill(row: Row, timed: timing.Timing, scale: float, calls: int) -> None:
    row.ms = {
        "median": timed.median * scale,
        "p20": timed.percentile(20) * scale,
        "p80": timed.percentile(80) * scale,
    }
    row.calls_per_sample = timed.calls * calls
    row.samples_ms = [sample * scale for sample in timed.samples]


def _compare(target: Target, rows: list[Row], disturbed: bool) -> dict[str, Any]:
    """The measured ratio beside the target; ratio is None where one side could not be timed, and
    met also where other processes disturbed the timing."""
    record: dict[str, Any] = {**asdict(target), "provider": None, "ratio": None, "met": None}
    ours = [row.ms["median"] for row in rows if row.kind == "ours" and row.ms]
    others = {
        row.name: row.ms["median"]
        for row in rows
        if row.kind == target.against
        and row.name.startswith(target.named)
        and row.scope.startswith(target.scope)
        and row.ms
    }
    if ours and others:
        record["provider"] = fastest = min(others, key=others.__getitem__)
        if target.against == "floor":
            record["ratio"] = ratio = ours[0] / others[fastest]
            met = ratio <= target.factor
        else:
            record["ratio"] = ratio = others[fastest] / ours[0]
            met = ratio >= target.factor
        record["met"] = None if disturbed else met
    return record


def _workspace(case: Case, rows: list[Row]) -> dict[str, Any] | None:
    peak = next((r.peak_bytes for r in rows if r.kind == "ours" and r.status == "ok"), None)
    if peak is None or case.memory_unit is None:
        return None
    unit, size = case.memory_unit
    return {"bytes": peak, "unit": unit, "ratio": peak / size}
