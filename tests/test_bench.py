"""The harness itself: what it refuses to time, what it records."""
# the extras of the harness may be missing: it is imported after a look
# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

# bench is a folder of the project and not installed
sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.importorskip("threadpoolctl")
pytest.importorskip("rich")
typer = pytest.importorskip("typer")

from rich.console import Console

from bench import (
    bench_focus_attention,
    bench_kmeans,
    bench_merge_tokens,
    bench_token_importance,
    ceilings,
    clustering,
    data,
    environment,
    memory,
    report,
    runner,
    timing,
)
from bench.case import Target
from bench.focus import Setup as Focus
from bench.machine import CPU, Machine, Sets
from bench.runner import Effort

TINY = bench_merge_tokens.Setup("field", D=32, B=2, N=64, P=16, K=4)
QUICK = Effort(4, 0.5, quick=True)


@pytest.fixture(scope="module")
def case():
    return bench_merge_tokens.case(TINY, CPU)


def run(case, *names):
    """All that a quick run does, or these providers whatever they take."""
    if not names:
        return runner.run_case(case, QUICK)
    chosen = [provider for provider in case.providers if provider.name in names]
    assert len(chosen) == len(names)
    return runner.run_case(dataclasses.replace(case, providers=chosen), Effort(4, 0.5))


def spoil(case, name, change):
    """The case with the result of one provider changed."""
    providers = [
        dataclasses.replace(p, run=lambda p=p: change(p.run())) if p.name == name else p
        for p in case.providers
    ]
    return dataclasses.replace(case, providers=providers)


def row(result, name):
    return next(row for row in result.rows if row.name == name)


SMALL = [
    (bench_token_importance, bench_token_importance.Setup(2, 3, 33, 16)),
    (bench_token_importance, bench_token_importance.Setup(2, 3, 33, 16, None)),
    (bench_kmeans, bench_kmeans.Setup(8, 3, 144, 16)),
    (bench_merge_tokens, TINY),
    (bench_focus_attention, Focus(B=2, H=4, G=2, d=16, before=5, images=30, after=9)),
    (bench_focus_attention, Focus("decode", 2, 4, 4, 16, 5, 30, 9)),
]


@pytest.mark.parametrize(("suite", "setup"), SMALL, ids=str)
def test_every_provider_agrees_and_is_timed(suite, setup):
    case = suite.case(setup, CPU)
    result = runner.run_case(case, QUICK)
    for line, provider in zip(result.rows, case.providers, strict=True):
        absent = provider.missing or provider.slow
        assert line.status == ("missing" if absent else "ok"), line
        assert (line.ms is not None) == (line.status == "ok")
        assert (line.peak_bytes is not None) == (line.status == "ok" and provider.traced)
        if line.ms:
            assert 0 < line.ms["p20"] <= line.ms["median"] <= line.ms["p80"]
    assert sum(line.status == "ok" and line.kind == "rival" for line in result.rows) >= 1
    assert result.cost["bytes"] > 0 and result.cost["flops"] > 0
    assert run(case, *[p.name for p in case.providers if p.kind == "reference"]).rows[0].ms


@pytest.mark.parametrize("machine", [CPU, Machine("cpu", gpu=True)], ids=["cpu", "gpu"])
def test_the_aims_and_the_default_split_are_measured(machine):
    found = bench_merge_tokens.setups(machine)
    splits = {(s.P, s.K): {r.B for r in found if (r.P, r.K) == (s.P, s.K)} for s in found}
    assert set(splits) == {(128, 32), (80, 80)} and len(set(found)) == len(found)
    assert splits[80, 80] == splits[128, 32] == ({1, 8, 64, 256} if machine.gpu else {4})
    assert all((s.P, s.K) == (128, 32) for s in found[: 8 if machine.gpu else 4])


def test_declaring_a_case_makes_no_data(monkeypatch):
    def make(*_):
        raise AssertionError("made data")

    monkeypatch.setitem(data.DATASETS, "field", make)
    case = bench_merge_tokens.case(TINY, CPU)
    names = [provider.name for provider in case.providers]
    assert len(set(names)) == len(names) > 10
    assert all(line.status != "ok" for line in runner.run_case(case, QUICK).rows)


def test_wrong_attention_is_not_timed():
    case = bench_focus_attention.case(SMALL[4][1], CPU)
    for name, change in (
        ("torch, eager", lambda out: out.roll(1, 1)),
        ("SDPA flash, causal", lambda out: out.roll(1, 2)),
        ("SDPA math, ready mask", lambda out: out[:, 1:]),
    ):
        line = row(run(spoil(case, name, change), name), name)
        assert (line.status, line.ms) == ("failed", None)
        assert ("shape" in line.detail) == ("math" in name)


def test_wrong_importance_is_not_timed():
    case = bench_token_importance.case(SMALL[0][1], CPU)
    for name in ("token_importance, reference", "torch", "the row q k'", "k.sum(-1)"):
        assert row(run(spoil(case, name, lambda out: out * 1.01), name), name).status == "failed"


@pytest.mark.parametrize("name", ["ToMe", "VisionZip", "PruMerge", "PruMerge+"])
def test_other_methods_are_judged_by_their_own_rule(case, name):
    assert "by its own rule" in row(run(case, name), name).scope
    wrong = run(spoil(case, name, lambda tokens: tokens.roll(1, 1)), name)
    assert row(wrong, name).status == "failed" and "own rule" in row(wrong, name).detail


def test_missing_provider_is_listed_with_its_reason(case):
    absent = dataclasses.replace(case.providers[0], name="absent", missing="no such library")
    result = run(dataclasses.replace(case, providers=[absent, *case.providers[1:2]]))
    assert (row(result, "absent").status, row(result, "absent").detail) == (
        "missing",
        "no such library",
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda labels: labels.roll(1, dims=1),
        lambda labels: labels * 0,
        lambda labels: labels - 1,
        lambda labels: labels[:, 1:],
    ],
    ids=["shifted", "one cluster", "negative", "short"],
)
def test_wrong_labels_are_not_timed(case, change):
    line = row(run(spoil(case, "torch direct", change), "torch direct"), "torch direct")
    assert (line.status, line.ms, line.samples_ms) == ("failed", None, [])


def _spoil_tokens(slot):
    def change(result):
        tokens = result.tokens.clone()
        tokens[:, slot] *= 1.01
        return result._replace(tokens=tokens)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_spoil_tokens(0), "primary tokens are not those"),
        (_spoil_tokens(-1), "merged tokens differ"),
        (lambda result: result._replace(sizes=result.sizes + 1), "sizes do not count"),
        (lambda result: result._replace(owner=result.owner.flip(1)), "wrong owner"),
    ],
)
def test_wrong_merge_is_not_timed(case, change, reason):
    name = "merge_tokens, reference"
    line = row(run(spoil(case, name, change), name), name)
    assert line.status == "failed" and reason in line.detail


def test_provider_that_raises_is_shown_as_failed(case):
    def explode(_):
        raise RuntimeError("out of luck")

    line = row(run(spoil(case, "torch Gram", explode), "torch Gram"), "torch Gram")
    assert (line.status, line.detail) == ("failed", "RuntimeError: out of luck")


def test_near_tie_is_accepted():
    # token 1 is as far from one centroid as from the other
    x = torch.tensor([[[0.0], [1.0], [2.0]] + [[0.0]] * 200])
    former = torch.tensor([[[0.0], [2.0]]])
    labels = torch.tensor([[0, 0, 1] + [0] * 200])
    problem = clustering.Problem(x, 2, 1, labels, former)
    other = labels.clone()
    other[0, 1] = 1
    assert problem._tie(other) == 0
    other[0, 3] = 1
    assert problem._tie(other) == torch.inf


def test_a_rival_may_end_in_another_minimum_but_not_far():
    x = torch.arange(10.0).view(1, 10, 1)
    halves = (x[..., 0] >= 5).long()
    problem = clustering.Problem(x, 2, 1, halves, torch.tensor([[[2.0], [7.0]]]))
    # a cluster of four and one of six: 22.5 for 20
    other = (x[..., 0] >= 4).long()
    assert problem.judge(1 - halves, same_labels=False).ok
    for objective, ok in ((0.12, False), (0.13, True)):
        found = problem.judge(other, same_labels=False, objective=objective)
        assert (found.ok, "+12.50%" in found.detail) == (ok, True)
    sets = Sets(1, lambda _: x)
    task = clustering.Task(sets, x.shape, x.dtype, 2, 1, "euclidean", CPU, 1)
    assert task.judge_rival(task.problem.labels).ok and not task.judge_rival(other).ok


def test_targets_compare_medians():
    rows = [
        runner.Row(name, kind, "", "ok", "", {"median": ms})
        for name, kind, ms in [("a", "ours", 2.0), ("b", "rival", 5.0), ("c", "rival", 3.0)]
    ]
    faster = runner._compare(Target("rival", 2.0), rows, disturbed=False)
    assert (faster["provider"], faster["ratio"], faster["met"]) == ("c", 1.5, False)
    rows.append(runner.Row("d", "floor", "", "ok", "", {"median": 1.6}))
    floor = runner._compare(Target("floor", 1.3), rows, disturbed=False)
    assert (floor["ratio"], floor["met"]) == (1.25, True)
    disturbed = runner._compare(Target("floor", 1.3), rows, disturbed=True)
    assert (disturbed["ratio"], disturbed["met"]) == (1.25, None)
    assert runner._compare(Target("reference", 8.0), rows, disturbed=False)["ratio"] is None


def test_interleaved_samples_every_function_and_slow_ones_less():
    order = []

    def slow():
        order.append("slow")
        torch.randn(10).sum()
        sum(range(2_000_000))

    timings = timing.interleaved(
        {"fast": lambda: order.append("fast"), "slow": slow}, repetitions=12, seconds=0.1
    )
    assert len(timings["fast"].samples) > len(timings["slow"].samples) >= 3
    assert timings["fast"].calls > 1
    assert timings["slow"].percentile(20) <= timings["slow"].median
    first, last = order.index("slow"), len(order) - order[::-1].index("slow")
    assert "fast" in order[first:last]


def test_peak_workspace_leaves_out_results():
    def call():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second * 2

    # a few bytes more: torch wraps the numbers 1 and 2 in tensors
    assert memory.peak_workspace(call) == pytest.approx(8000, abs=64)
    assert memory.peak_workspace(lambda: torch.ones(1000)) == pytest.approx(0, abs=64)


@pytest.mark.parametrize("name", data.DATASETS)
def test_data_is_seeded_and_shaped(name):
    make = data.DATASETS[name]
    x = make(2, 36, 8, seed=3)
    assert x.shape == (2, 36, 8) and x.dtype == torch.float32
    assert torch.equal(x, make(2, 36, 8, seed=3))
    assert not torch.equal(x, make(2, 36, 8, seed=4))


def test_field_wants_a_square():
    with pytest.raises(ValueError, match="square number, got 35"):
        data.field(1, 35, 8)


def test_targets_may_be_about_one_scope():
    rows = [
        runner.Row(name, kind, scope, "ok", "", {"median": ms})
        for name, kind, scope, ms in [
            ("a", "ours", "everything", 2.0),
            ("b", "rival", "by its own rule: less", 1.0),
            ("c", "rival", "clustering alone, image by image", 3.0),
        ]
    ]
    found = runner._compare(Target("rival", 1.5, scope="clustering alone"), rows, disturbed=False)
    assert (found["provider"], found["ratio"], found["met"]) == ("c", 1.5, True)
    assert runner._compare(Target("rival", 1.5), rows, disturbed=False)["provider"] == "b"


def test_ceilings():
    class Meter:
        clock = timing.Clock(lambda call, calls: call() is None or 0.5, 0.0, 0.0)

    assert ceilings.measure(Meter, CPU, 64) == {
        "copy_bytes_per_s": 2 * 4 * 8 * 64 * 64 / 0.5,
        "flops_per_s": 2 * 64**3 / 0.5,
        "dtype": "float32",
    }
    gpu = ceilings.measure(Meter, Machine("cpu", gpu=True), 64)
    assert gpu["dtype"] == "bfloat16" and gpu["copy_bytes_per_s"] == 2 * 2 * 8 * 64 * 64 / 0.5


def test_details_read(case):
    console = Console(width=180, record=True, file=io.StringIO())
    result = dataclasses.asdict(run(case))
    report.show(console, result)
    disturbed = {**result, "others_busy": 1.5}
    assert any("too much" in line for line in report.conclusions(disturbed))
    text = console.export_text()
    assert "D=32" in text and "clustering alone" in text and "target 2x" in text


def test_company_is_noticed():
    others = environment.Others()
    if others.busy() is None:
        pytest.skip("this system has no /proc/stat")
    sum(range(3_000_000))
    alone = others.busy()
    spin = "import time; end = time.time() + 1\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin]):
        others = environment.Others()
        time.sleep(0.8)
        busy = others.busy()
    assert busy > 0.3 and alone >= 0
