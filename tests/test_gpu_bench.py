"""The harness for a GPU, on a processor: a stand-in for the device, tiny set-ups, the script."""
# the extras of the harness may be missing: it is imported after a look
# ruff: noqa: E402

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

# bench is a folder of the project and not installed
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
pytest.importorskip("threadpoolctl")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("pytest_benchmark")

from typer.testing import CliRunner

from bench import (
    app,
    bench_kmeans,
    bench_merge_tokens,
    bench_token_importance,
    ceilings,
    environment,
    gpu_timing,
    kmeans_packages,
    kmeans_torch,
    machine,
    memory,
    missing,
    options,
    record,
    report,
    runner,
    sanitize_cases,
    suites,
    summary,
)
from bench.bench_focus_attention import case as focus_case
from bench.case import Case, Cost, Provider, Verdict
from bench.clustering import Task
from bench.focus import Setup as Focus
from bench.machine import Machine, Sets
from bench.runner import Effort

CEILINGS = {"copy_bytes_per_s": 4e12, "flops_per_s": 8e14, "dtype": "bfloat16"}
FOCUS = Focus(B=2, H=4, G=2, d=16, before=5, images=30, after=9, dtype="bfloat16")
MERGE = bench_merge_tokens.Setup("field", 64, 3, 64, 16, 4, metric="cosine", dtype="bfloat16")
KMEANS = bench_kmeans.Setup(8, 3, 144, 16, data="field", dtype="bfloat16")
IMPORTANCE = bench_token_importance.Setup(2, 3, 33, 16, dtype="bfloat16")
# the providers for a GPU, on a processor
PRETENDED = Machine("cpu", gpu=True)
BRIEF = Effort(3, 0.05, quick=True)


class Processor:
    """Stands in for a GPU: a graph is the list of its calls."""

    def __init__(self, seconds=None):
        self.seconds = seconds

    def capture(self, calls):
        calls[0]()
        return lambda: [call() for call in calls]

    def measure(self, call, calls):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return self.seconds or (time.perf_counter() - start) / calls

    def synchronize(self):
        pass

    def peak(self, call):
        return memory.peak_workspace(call)


def run(case, device=None, effort=BRIEF, eager=False):
    return runner.run_case(case, effort, gpu_timing.GpuMeter(device or Processor(), eager))


def provider(calls, launch="graph", verify=lambda _: Verdict(True, "fine")):
    first, *others = calls
    return Provider("one", "ours", "", first, verify, None, tuple(others), launch)


def one_case(it):
    return Case("suite", {"D": 1}, 5, Cost(8, 4), [it], [])


def test_inputs_rotate_until_the_cache_cannot_hold_them():
    assert gpu_timing.rotation(10, 100) == 20
    assert gpu_timing.rotation(10**9, 100) == 2
    assert gpu_timing.rotation(1, 10**9) == gpu_timing.MOST_SETS
    assert gpu_timing.rotation(0, 100) == gpu_timing.MOST_SETS
    made = []
    sets = PRETENDED.sets(lambda seed: made.append(seed) or seed, 10).then(str)
    calls = sets.calls(lambda value: value * 2)
    assert [call() for call in calls] == ["00", "11"] == [call() for call in calls]
    assert made == [0, 1] and sets.first == "0" and machine.CPU.sets(str, 10).count == 1


@pytest.mark.parametrize("launch", ["graph", "eager"])
def test_time_is_that_of_one_call_of_one_set(launch):
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(4)]
    (row,) = run(one_case(provider(calls, launch)), Processor(seconds=2.0)).rows
    # two seconds for four sets of five images
    assert row.ms["median"] == pytest.approx(100.0)
    assert row.calls_per_sample == 4 and set(seen) == {0, 1, 2, 3}
    assert row.host_ms > 0


def test_inputs_are_made_before_a_graph_is_captured():
    class Captures(Processor):
        capturing = False

        def capture(self, calls):
            self.capturing = True
            for call in calls:
                call()
            self.capturing = False
            return super().capture(calls)

    def make(seed):
        assert not device.capturing
        made.append(seed)
        return seed

    made, device = [], Captures()
    it = provider(PRETENDED.sets(make, 10).calls(lambda seed: seed))
    (row,) = run(one_case(it), device).rows
    assert row.status == "ok" and made == [0, 1]


def test_a_graph_may_be_turned_down():
    class Refuses(Processor):
        def capture(self, calls):
            raise AssertionError("captured")

    (row,) = run(one_case(provider([lambda: None])), Refuses(), eager=True).rows
    assert row.status == "ok"


def test_what_cannot_be_captured_is_shown_as_failed():
    class Refuses(Processor):
        def capture(self, calls):
            raise RuntimeError("operation not permitted when stream is capturing" + "x" * 1000)

    (row,) = run(one_case(provider([lambda: None])), Refuses()).rows
    assert (row.status, row.ms) == ("failed", None)
    assert "not permitted" in row.detail and len(row.detail) < 400


def test_other_processes_do_not_count():
    assert run(one_case(provider([lambda: None]))).others_busy is None


CASES = {
    "merge": bench_merge_tokens.case(MERGE, PRETENDED),
    "merge, euclidean": bench_merge_tokens.case(
        replace(MERGE, N=49, P=9, K=5, metric="euclidean", dtype="float32"), PRETENDED
    ),
    "kmeans": bench_kmeans.case(KMEANS, PRETENDED),
    "importance": bench_token_importance.case(IMPORTANCE, PRETENDED),
    "importance, all": bench_token_importance.case(replace(IMPORTANCE, cls_index=None), PRETENDED),
    "focus": focus_case(FOCUS, PRETENDED),
    "decode": focus_case(replace(FOCUS, phase="decode"), PRETENDED),
}


@pytest.mark.parametrize("name", CASES)
def test_every_provider_agrees(name):
    case = CASES[name]
    result = run(case)
    for line, each in zip(result.rows, case.providers, strict=True):
        assert line.status == ("missing" if each.missing or each.slow else "ok"), line
        assert len(each.others) == 1
    assert result.rows[0].kind == "ours" and result.rows[0].ms
    assert any(line.kind == "rival" and line.ms for line in result.rows)
    assert result.cost["bytes"] > 0 and result.cost["flops"] > 0


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_rivals_agree():
    case = CASES["merge"]
    compiled = [each for each in case.providers if "compiled" in each.name]
    rows = run(replace(case, providers=compiled), effort=Effort(3, 0.05)).rows
    assert len(compiled) == 2 and all(row.status == "ok" for row in rows), rows
    assert sum(each.launch == "eager" for each in case.providers) == 4


def test_wrong_results_are_not_timed(monkeypatch):
    # nothing is close enough
    monkeypatch.setitem(bench_merge_tokens.verify.__globals__, "TOLERANCE", -1.0)
    rows = run(CASES["merge"]).rows
    assert (rows[0].status, rows[0].ms) == ("failed", None)


def test_what_a_package_cannot_do_is_said():
    reasons = {each.name: each.missing for each in CASES["merge"].providers}
    assert reasons["faiss"] == reasons["fastkmeans"] == "it works on a CPU"
    assert "bfloat16" in reasons["fast-pytorch-kmeans"]
    assert "euclidean" in reasons["flash-kmeans' kernels, graph"]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_flash_kmeans_is_called_as_it_wants(monkeypatch, metric):
    """With its functions in plain torch, as its documentation has them."""

    def assign(x, centroids, norms=None):
        assert centroids.dtype == x.dtype and centroids.is_contiguous()
        return torch.cdist(x.float(), centroids.float()).argmin(-1).int()

    def update(x, labels, old):
        member = torch.nn.functional.one_hot(labels.long(), old.shape[1]).to(x.dtype)
        return member.mT @ x / member.sum(1)[..., None]

    def loop(x, n_clusters, max_iters=100, tol=0.0, init_centroids=None, cosine=metric == "cosine"):
        x = torch.nn.functional.normalize(x, dim=-1) if cosine else x
        centroids = init_centroids.clone()
        for _ in range(max_iters):
            labels = assign(x, torch.nn.functional.normalize(centroids, dim=-1 if cosine else 0))
            labels = labels if cosine else assign(x, centroids)
            centroids = update(x, labels, centroids)
            centroids = torch.nn.functional.normalize(centroids, dim=-1) if cosine else centroids
        assert tol < 0 and n_clusters == centroids.shape[1]
        return labels, centroids, max_iters

    module = SimpleNamespace(
        euclid_assign_triton=assign,
        cosine_assign_triton=assign,
        triton_centroid_update_sorted_euclid=update,
        batch_kmeans_Euclid=loop,
        batch_kmeans_Cosine=loop,
    )
    monkeypatch.setattr(kmeans_packages, "load", lambda _, __, missing=None: (module, missing))
    x = torch.randn(2, 40, 16) + 8 * torch.randn(2, 4, 16).repeat(1, 10, 1)

    def task(x):
        sets = Sets(2, lambda seed: x + seed)
        return Task(sets, x.shape, x.dtype, 4, 3, metric, PRETENDED, 2)

    kernels, whole = (
        make(task(x)) for make in (kmeans_packages._flash_kernels, kmeans_packages._flash_kmeans)
    )
    assert ("euclidean" in kernels.missing) == (metric == "cosine")
    assert "need a GPU" in whole.missing
    for it in (kernels, whole)[metric == "cosine" :]:
        assert it.verify(it.run()).ok and len(it.others) == 1
        assert not it.verify(it.run() * 0).ok
    # what tries out many tiles at first is no part of a quick run
    assert (whole.slow, kernels.slow) == (None, None)
    slow = kmeans_packages._flash_kmeans(task(torch.ones(1, 9, 513)))
    assert (slow.slow is not None) == (metric == "cosine")


def test_a_quick_run_leaves_out_what_is_slow():
    it = replace(provider([lambda: None]), slow="compiles for a minute")
    meter = gpu_timing.GpuMeter(Processor())
    for quick, status in ((False, "ok"), (True, "missing")):
        (row,) = runner.run_case(one_case(it), Effort(3, 0.05, quick), meter).rows
        assert row.status == status and ("for a minute" in row.detail) == quick


def test_torch_leaves_the_stream_of_a_capture_that_fails(monkeypatch):
    left = []

    class Graph:
        def __enter__(self):
            raise RuntimeError("cannot begin")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda _: None))
    current = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: Graph())
    monkeypatch.setattr(torch.cuda, "set_stream", left.append)
    with pytest.raises(RuntimeError, match="cannot begin"):
        gpu_timing.Cuda().capture([lambda: None])
    assert left == [current]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("form", [kmeans_torch.torch_gram, kmeans_torch.torch_direct])
def test_rivals_in_torch_ask_the_host_nothing(form, metric):
    """So that a graph can hold them: a tensor without values can answer none."""
    with FakeTensorMode():
        labels = form(torch.empty(2, 40, 16), 4, 3, metric)
        half = torch.empty(2, 40, 16, dtype=torch.bfloat16, device="cuda")
        inner = kmeans_torch.products(half, half.mT)
    assert labels.shape == (2, 40)
    assert (inner.dtype, inner.device.type) == (torch.float32, "cuda")


def test_spread_takes_the_ends():
    assert machine.spread(3, 16).tolist() == [0, 1, 2]
    some = machine.spread(256, 16).tolist()
    assert len(set(some)) == 16 and (some[0], some[-1]) == (0, 255)


def test_floor():
    result = asdict(run(one_case(provider([lambda: None])), Processor(seconds=1.0)))
    (floor,) = [line for line in report.conclusions(result, CEILINGS) if "no faster" in line]
    assert report.floor_ms(result["cost"], 5, CEILINGS) == (
        pytest.approx(1e3 * 8 / 4e12 / 5),
        pytest.approx(1e3 * 4 / 8e14 / 5),
    )
    assert "ours takes 500000000000.0x" in floor


GPU = {"name": "Some GPU", "capability": "9.0", "driver": "1", "cuda_of_torch": "13", "nvcc": None}


@pytest.fixture
def pretended_gpu(monkeypatch):
    """What a run on a GPU needs: one set-up that runs, one that does not."""

    def case(setup, _):
        found = bench_token_importance.case(setup, PRETENDED)
        if setup.d == 5:
            # as one that does not fit
            object.__setattr__(found, "providers", None)
        return found

    setups = [replace(IMPORTANCE, N=9, d=d) for d in (4, 5)]
    suite = machine.Suite("importance", lambda _: setups, lambda _: {}, case)
    monkeypatch.setattr(suites, "suites", lambda _: {"importance": suite})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(environment, "gpu", lambda: GPU)
    monkeypatch.setattr(environment, "gpu_state", lambda: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(gpu_timing, "Cuda", Processor)
    monkeypatch.setattr(ceilings, "measure", lambda meter, _: meter.device and CEILINGS)


def test_json_and_summary_of_a_run_on_a_gpu(pretended_gpu, tmp_path):
    scratch = tmp_path / "scratch"
    out = scratch / "bench-1-importance.json"
    # a set-up that does not fit ends no run, and is told by the exit status
    done = CliRunner().invoke(app.app, ["--quick", "--eager", "--out", str(out)])
    assert done.exit_code == 1, done.output
    kept = record.read(out)
    assert kept.environment["device"] == "cuda" and kept.environment["gpu"] == GPU
    assert kept.environment["ceilings"] == CEILINGS and kept.environment["eager"]
    good, bad = kept.results
    assert good["gpu_state"] == {"clocks.sm": "1980 MHz"} and good["rows"][0]["host_ms"] > 0
    assert bad["error"].startswith("TypeError")
    assert environment.result_name(kept.environment).startswith("some-gpu-")
    assert json.loads(out.read_text())["machine_info"]["gpu"] == "Some GPU"

    # a second process adds its results
    record.write(scratch / "bench-2-more.json", kept.environment, [{**good, "axis": "N"}])
    (scratch / "phases").write_text("build\t0\t61\nmemcheck\t86\t12\nbenchmark\t124\t9\n")
    (scratch / "gpu-tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="c" name="n"><failure message="one&#10;two"/>'
        '</testcase><testcase name="m"><skipped/></testcase></testsuite></testsuites>'
    )
    (scratch / "operator-tests.xml").write_text("<testsuites><testsuite>")
    summary.main(tmp_path, scratch)
    page = (tmp_path / "SUMMARY.md").read_text()
    for line in (
        "| build | passed | 61 |",
        "| memcheck | FAILED (86) | 12 |",
        "| benchmark | stopped: out of time | 9 |",
        "gpu-tests: 2 tests, 1 failed, 1 skipped",
        "- c.n: one",
        "operator-tests: its report was cut short",
        "FAILED: TypeError",
        "**over N: importance B=2",
        "copy 4.00 TB/s",
        "| k.sum(-1) |",
    ):
        assert line in page
    assert len(list(ElementTree.parse(tmp_path / "tests.xml").iter("testcase"))) == 2
    merged = record.read(tmp_path / "bench.json")
    assert merged.environment == kept.environment
    assert merged.results == [good, bad, {**good, "axis": "N"}]
    assert sorted(path.name for path in scratch.glob("bench*")) == [out.name, "bench-2-more.json"]


def test_a_gpu_is_refused_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        options.Options(device="cuda").checked()
    assert options.Options().checked().device == "cpu"


def test_missing_packages_are_named():
    assert missing.report(lambda _: True) == (["no package is missing"], True)
    lines, complete = missing.report(lambda module: module != "flash_kmeans")
    assert complete and lines[0].startswith("missing, can do without: flash-kmeans==0.3.1")
    lines, complete = missing.report(lambda module: module != "hypothesis")
    assert not complete and lines[0].startswith("MISSING, needed: hypothesis")


def test_cases_for_the_sanitizer_run(capsys, monkeypatch):
    ran, failed = sanitize_cases.main("cpu", ["reference", "cuda"], (torch.float32,))
    assert (ran, failed) == (49, 0)
    text = capsys.readouterr().out
    assert "kmeans, reference, torch.float32: direct, cosine" in text and "cuda: " in text
    monkeypatch.setattr(
        sanitize_cases.vmtc_kernels, "kmeans", lambda **_: 1 / torch.zeros(2).view(3)
    )
    assert sanitize_cases.main("cpu", ["reference"], (torch.float32,)) == (45, 4)


STUBS = {
    "nvidia-smi": "echo 9.0",
    "nvcc": "echo release 13.0,",
    "compute-sanitizer": "exit 86",
    "python": f"""case "$*" in
        *setup.py*) echo "built for $TORCH_CUDA_ARCH_LIST" ;;
        *bench.summary*) exec {sys.executable} "$@" ;;
        "-m pytest"*) exit 1 ;;
    esac""",
}


@pytest.mark.skipif(not shutil.which("timeout"), reason="needs bash and coreutils")
def test_script_runs_every_phase_and_counts_the_failures(tmp_path):
    stubs, out = tmp_path / "stubs", tmp_path / "out" / "folder"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    env |= {"PATH": f"{stubs}:{env['PATH']}", "PYTHON": str(stubs / "python")}
    script = str(ROOT / "bench" / "on_gpu.sh")
    done = subprocess.run(["bash", script, str(out)], env=env, capture_output=True, text=True)
    page = (out / "SUMMARY.md").read_text()
    # three runs of pytest, two of the sanitizer
    assert done.returncode == 5, (done.stdout, done.stderr)
    assert page.count("FAILED (1)") == 3 and page.count("FAILED (86)") == 2
    assert "| environment | passed |" in page and page.count("| benchmark") == 7
    assert "built for 9.0a" in (out / "machine.log").read_text()
    assert len(list(out.iterdir())) <= 8
    env["SECONDS_IN_ALL"] = "300"
    done = subprocess.run(["bash", script, str(out)], env=env, capture_output=True, text=True)
    assert "stopped: out of time" in (out / "SUMMARY.md").read_text()
    assert subprocess.run(["bash", script], env=env, capture_output=True).returncode == 64
