"""Cases, providers, and the run of a case: check every provider, then time those that passed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

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
    """

    name: str
    kind: Kind
    scope: str
    run: Callable[[], Any]
    verify: Callable[[Any], Verdict]
    missing: str | None = None


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


def run_case(case: Case, *, repetitions: int, seconds: float) -> Result:
    rows = [_gate(provider) for provider in case.providers]
    timed = {
        p.name: p.run
        for p, row in zip(case.providers, rows, strict=True)
        if row.ms is None and row.status == "ok"
    }
    others = environment.Others()
    timings = timing.interleaved(timed, repetitions=repetitions, seconds=seconds) if timed else {}
    busy = others.busy()
    for row in rows:
        if row.name in timings:
            _fill(row, timings[row.name], 1e3 / case.images)
    return Result(
        case.suite,
        case.params,
        case.images,
        asdict(case.cost),
        rows,
        [_compare(target, rows, _disturbed(busy)) for target in case.targets],
        _workspace(case, rows),
        busy,
    )


def _disturbed(others_busy: float | None) -> bool:
    return others_busy is not None and others_busy > environment.QUIET


def _gate(provider: Provider) -> Row:
    row = Row(provider.name, provider.kind, provider.scope, "missing", provider.missing or "")
    if provider.missing is None:
        try:
            verdict = provider.verify(provider.run())
        except Exception as error:  # a rival may raise anything; the table says what
            verdict = Verdict(False, f"{type(error).__name__}: {error}")
        row.status, row.detail = "ok" if verdict.ok else "failed", verdict.detail
    return row


def _fill(row: Row, timed: timing.Timing, scale: float) -> None:
    row.ms = {
        "median": timed.median * scale,
        "p20": timed.percentile(20) * scale,
        "p80": timed.percentile(80) * scale,
    }
    row.calls_per_sample = timed.calls
    row.samples_ms = [sample * scale for sample in timed.samples]


def _compare(target: Target, rows: list[Row], disturbed: bool) -> dict[str, Any]:
    """The measured ratio beside the target; ratio is None where one side could not be timed, and
    met also where other processes disturbed the timing."""
    record: dict[str, Any] = {**asdict(target), "provider": None, "ratio": None, "met": None}
    ours = [row.ms["median"] for row in rows if row.kind == "ours" and row.ms]
    others = {row.name: row.ms["median"] for row in rows if row.kind == target.against and row.ms}
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
    ours = [
        provider
        for provider, row in zip(case.providers, rows, strict=True)
        if provider.kind == "ours" and row.status == "ok"
    ]
    if not ours or case.memory_unit is None:
        return None
    unit, size = case.memory_unit
    peak = memory.peak_workspace(ours[0].run)
    return {"bytes": peak, "unit": unit, "ratio": peak / size}
