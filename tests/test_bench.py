"""The harness itself: what it refuses to time, what it records."""
# the extras of the harness may be missing: it is imported after a look
# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import io
import json
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
    __main__,
    bench_focus_attention,
    bench_merge_tokens,
    bench_token_importance,
    clustering,
    data,
    environment,
    memory,
    report,
    runner,
    timing,
)
from bench.focus import Setup as Focus

TINY = bench_merge_tokens.Setup("field", D=32, B=2, N=64, P=16, K=4)


@pytest.fixture(scope="module")
def case():
    return bench_merge_tokens.case(TINY)


def run(case):
    return runner.run_case(case, repetitions=4, seconds=0.5)


def spoil(case, name, change):
    """The case with the result of one provider changed."""
    providers = [
        dataclasses.replace(p, run=lambda p=p: change(p.run())) if p.name == name else p
        for p in case.providers
    ]
    return dataclasses.replace(case, providers=providers)


def row(result, name):
    return next(row for row in result.rows if row.name == name)


def test_every_installed_provider_agrees_and_is_timed(case):
    result = run(case)
    for line in result.rows:
        assert line.status in ("ok", "missing"), line
        assert (line.ms is not None) == (line.status == "ok")
    assert row(result, "torch Gram").ms["p20"] <= row(result, "torch Gram").ms["p80"]
    assert row(result, "merge_tokens, reference").status == "ok"


FOCUS = Focus(B=2, H=4, G=2, d=16, before=5, images=30, after=9)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_focus_attention_is_judged_and_timed(phase):
    case = bench_focus_attention.case(dataclasses.replace(FOCUS, phase=phase))
    result = run(case)
    assert all(line.status == "ok" for line in result.rows), result.rows
    wrong = run(spoil(case, "torch, eager", lambda out: out.roll(1, 1)))
    assert row(wrong, "torch, eager").status == "failed"
    shorter = run(spoil(case, "torch, eager", lambda out: out[:, 1:]))
    assert "shape" in row(shorter, "torch, eager").detail


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
    line = row(run(spoil(case, "torch direct", change)), "torch direct")
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
    line = row(run(spoil(case, name, change)), name)
    assert line.status == "failed" and reason in line.detail


def test_provider_that_raises_is_shown_as_failed(case):
    def explode(_):
        raise RuntimeError("out of luck")

    line = row(run(spoil(case, "torch Gram", explode)), "torch Gram")
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


def test_targets_compare_medians():
    rows = [
        runner.Row(name, kind, "", "ok", "", {"median": ms})
        for name, kind, ms in [("a", "ours", 2.0), ("b", "rival", 5.0), ("c", "rival", 3.0)]
    ]
    faster = runner._compare(runner.Target("rival", 2.0), rows, disturbed=False)
    assert (faster["provider"], faster["ratio"], faster["met"]) == ("c", 1.5, False)
    rows.append(runner.Row("d", "floor", "", "ok", "", {"median": 1.6}))
    floor = runner._compare(runner.Target("floor", 1.3), rows, disturbed=False)
    assert (floor["ratio"], floor["met"]) == (1.25, True)
    disturbed = runner._compare(runner.Target("floor", 1.3), rows, disturbed=True)
    assert (disturbed["ratio"], disturbed["met"]) == (1.25, None)
    assert runner._compare(runner.Target("reference", 8.0), rows, disturbed=False)["ratio"] is None


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


def test_report_reads(case):
    console = Console(width=140, record=True, file=io.StringIO())
    report.show(console, run(case))
    disturbed = dataclasses.replace(run(case), others_busy=1.5)
    assert any("too much" in line for line in report.conclusions(disturbed))
    text = console.export_text()
    assert "D=32" in text and "clustering alone" in text and "target 2x" in text


def test_json_holds_what_a_number_depends_on(tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench_token_importance, "SETUPS", [bench_token_importance.Setup(1, 2, 9, 4)]
    )
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    out = tmp_path / "new" / "result.json"
    former = torch.get_num_threads()
    try:
        __main__.main(["token_importance"], quick=True, threads=1, out=out)
    finally:
        environment.limit_threads(former)
    record = json.loads(out.read_text())
    assert {"date", "command", "commit", "dirty", "cpu", "threads", "versions"} <= set(
        record["environment"]
    )
    assert record["environment"]["variables"]["OPENBLAS_CORETYPE"] == "Haswell"
    (result,) = record["results"]
    assert "others_busy" in result and result["params"]["N"] == 9 and result["cost"]["bytes"] > 0
    floor = next(r for r in result["rows"] if r["kind"] == "floor")
    assert floor["status"] == "ok" and set(floor["ms"]) == {"median", "p20", "p80"}
    assert len(floor["samples_ms"]) >= 3


def test_result_file_is_named_by_device_and_commit():
    described = {"cpu": "AMD EPYC(tm) 9B14", "commit": "abc", "dirty": True}
    assert environment.result_path(described).name == "amd-epyc-tm-9b14-abc-dirty.json"


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


def test_unknown_suite_is_refused():
    with pytest.raises(typer.BadParameter, match="token_importance, focus_attention, got bananas"):
        __main__.main(["bananas"])
