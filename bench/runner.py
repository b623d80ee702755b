"""Cases, providers, and the run of a case: check every provider, then time those that passed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from . import environment, memory, timing

Kind = Literal["ours", "reference", "rival", "floor"]


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
    slow: why its first call takes a minute or more; a quick run leaves it out.
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


@dataclass(frozen=True)
class Case:
    """One table: a set-up, its providers, and what is aimed at.

    memory_unit: name and bytes of what the workspace of ours is measured in.
    """

    suite: str
    params: dict[str, Any]
    images: int
    cost: Cost
    providers: list[Provider]
    targets: list[Target]
    memory_unit: tuple[str, int] | None = None


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


@dataclass
class Result:
    suite: str
    params: dict[str, Any]
    images: int
    cost: dict[str, int]
    rows: list[Row]
    targets: list[dict[str, Any]]
    workspace: dict[str, Any] | None
    # processors that other processes kept busy during the timing
    others_busy: float | None

    @property
    def disturbed(self) -> bool:
        return _disturbed(self.others_busy)


def run_case(
    case: Case, *, repetitions: int, seconds: float, meter: Meter = CPU, quick: bool = False
) -> Result:
    rows = [_gate(provider, quick) for provider in case.providers]
    prepared = {}
    for provider, row in zip(case.providers, rows, strict=True):
        if row.status == "ok":
            try:
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
            repetitions=repetitions,
            seconds=seconds,
            clock=meter.clock,
        )
    busy = others.busy() if others else None
    for row in rows:
        if row.name in timings:
            calls = prepared[row.name][1]
            _fill(row, timings[row.name], 1e3 / case.images / calls, calls)
    return Result(
        case.suite,
        case.params,
        case.images,
        asdict(case.cost),
        rows,
        [_compare(target, rows, _disturbed(busy)) for target in case.targets],
        _workspace(case, rows, meter),
        busy,
    )


def _disturbed(others_busy: float | None) -> bool:
    return others_busy is not None and others_busy > environment.QUIET


def _gate(provider: Provider, quick: bool) -> Row:
    missing = provider.missing
    if quick and provider.slow:
        missing = missing or f"left out of a quick run: {provider.slow}"
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
        if row.kind == target.against and row.name.startswith(target.named) and row.ms
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


def _workspace(case: Case, rows: list[Row], meter: Meter) -> dict[str, Any] | None:
    ours = [
        provider
        for provider, row in zip(case.providers, rows, strict=True)
        if provider.kind == "ours" and row.status == "ok"
    ]
    if not ours or case.memory_unit is None:
        return None
    unit, size = case.memory_unit
    peak = meter.peak_workspace(ours[0].run)
    return {"bytes": peak, "unit": unit, "ratio": peak / size}
