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
from dataclasses import replace
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
typer = pytest.importorskip("typer")

from bench import (
    __main__,
    environment,
    gpu_clustering,
    gpu_focus_attention,
    gpu_kmeans,
    gpu_merge_tokens,
    gpu_sweep,
    gpu_timing,
    gpu_token_importance,
    memory,
    missing,
    report,
    runner,
    sanitize_cases,
    summary,
)
from bench.clustering import Problem
from bench.focus import Setup as Focus

CEILINGS = {"copy_bytes_per_s": 4e12, "bfloat16_flops_per_s": 8e14}
FOCUS = Focus(B=2, H=4, G=2, d=16, before=5, images=30, after=9, dtype="bfloat16")
MERGE = gpu_merge_tokens.Setup(3, 64, "cosine", "field", N=64, P=16, K=4)


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


def run(case, device=None):
    meter = gpu_timing.GpuMeter(device or Processor())
    return runner.run_case(case, repetitions=3, seconds=0.05, meter=meter)


def provider(calls, launch="graph", verify=lambda _: runner.Verdict(True, "fine")):
    first, *others = calls
    return runner.Provider("one", "ours", "", first, verify, None, tuple(others), launch)


def one_case(it):
    return runner.Case("suite", {"D": 1}, 5, runner.Cost(8, 4), [it], [])


def test_inputs_rotate_until_the_cache_cannot_hold_them():
    assert gpu_timing.rotation(10, 100) == 20
    assert gpu_timing.rotation(10**9, 100) == 2
    assert gpu_timing.rotation(1, 10**9) == gpu_timing.MOST_SETS
    assert gpu_timing.rotation(0, 100) == gpu_timing.MOST_SETS


@pytest.mark.parametrize("launch", ["graph", "eager"])
def test_time_is_that_of_one_call_of_one_set(launch):
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(4)]
    (row,) = run(one_case(provider(calls, launch)), Processor(seconds=2.0)).rows
    # two seconds for four sets of five images
    assert row.ms["median"] == pytest.approx(100.0)
    assert row.calls_per_sample == 4 and set(seen) == {0, 1, 2, 3}
    assert row.host_ms > 0


def test_what_cannot_be_captured_is_shown_as_failed():
    class Refuses(Processor):
        def capture(self, calls):
            raise RuntimeError("operation not permitted when stream is capturing" + "x" * 1000)

    (row,) = run(one_case(provider([lambda: None])), Refuses()).rows
    assert (row.status, row.ms) == ("failed", None)
    assert "not permitted" in row.detail and len(row.detail) < 400


def test_other_processes_do_not_count():
    assert run(one_case(provider([lambda: None]))).others_busy is None


@pytest.mark.parametrize(
    ("suite", "setup"),
    [
        (gpu_merge_tokens, MERGE),
        (gpu_merge_tokens, gpu_merge_tokens.Setup(1, 32, "euclidean", N=49, P=9, K=5)),
        (gpu_sweep, gpu_merge_tokens.Setup(2, 32, N=49, P=9, K=5, dtype="float32")),
        (gpu_kmeans, gpu_kmeans.Setup(8, 3, 128, 16)),
        (gpu_token_importance, gpu_token_importance.Setup(2, 3, 33, 16)),
        (gpu_token_importance, gpu_token_importance.Setup(10, 3, 33, 16, None)),
        (gpu_focus_attention, FOCUS),
        (gpu_focus_attention, replace(FOCUS, phase="decode")),
    ],
    ids=lambda value: str(value) if not hasattr(value, "SETUPS") else value.__name__,
)
def test_every_provider_agrees(suite, setup):
    options = {"all_launches": False} if suite in (gpu_merge_tokens, gpu_kmeans) else {}
    result = run(suite.case(setup, "cpu", **options))
    for line in result.rows:
        # a processor has only one kernel of SDPA
        if line.name in ("SDPA cuDNN, causal", "SDPA efficient, causal"):
            continue
        if "compiled" not in line.name or shutil.which("c++"):
            assert line.status in ("ok", "missing"), line
    assert result.rows[0].kind == "ours" and result.rows[0].status == "ok"
    assert any(line.kind == "rival" and line.ms for line in result.rows)
    assert result.cost["bytes"] > 0 and result.cost["flops"] > 0


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_rivals_agree():
    rows = run(gpu_merge_tokens.case(MERGE, "cpu")).rows
    compiled = [row for row in rows if "compiled" in row.name]
    assert len(compiled) == 2 and all(row.status == "ok" for row in compiled), compiled
    assert sum("eager" in row.name for row in rows) == 3


def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setitem(
        gpu_merge_tokens.verify.__globals__, "TOLERANCE", -1.0
    )  # nothing is close enough
    rows = run(gpu_merge_tokens.case(MERGE, "cpu", all_launches=False)).rows
    assert (rows[0].status, rows[0].ms) == ("failed", None)


def test_cosine_objective_and_ties():
    x = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    labels = torch.tensor([[0, 1, 0]])
    problem = Problem(x, 2, 1, labels, torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), "cosine")
    mean = torch.tensor([1 + 0.5**0.5, 0.5**0.5])
    mean /= mean.norm()
    expected = (1 - mean[0]) + (1 - mean.sum() * 0.5**0.5)
    assert float(problem.objective(labels)) == pytest.approx(float(expected))
    # the last token is as near to one centroid as to the other
    assert problem._tie(torch.tensor([[0, 1, 1]])) == pytest.approx(0, abs=1e-6)
    assert problem._tie(torch.tensor([[1, 1, 0]])) == torch.inf


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
    monkeypatch.setattr(gpu_clustering, "load", lambda *_: (module, None))
    x = torch.randn(2, 40, 16) + 8 * torch.randn(2, 4, 16).repeat(1, 10, 1)
    task = gpu_clustering.Task([x, x + 1], torch.tensor([0, 1]), Problem.of(x, 4, 3, metric))
    kernels, whole = gpu_clustering._flash_kernels(task), gpu_clustering._flash_kmeans(task)
    assert (kernels.missing is None) == (metric == "euclidean")
    for it in (kernels, whole)[metric == "cosine" :]:
        assert it.verify(it.run()).ok and len(it.others) == 1
    # what tries out many tiles at first is no part of a quick run
    wide = [torch.ones(1, 9, 513)]
    assert (whole.slow, kernels.slow) == (None, None)
    slow = gpu_clustering._flash_kmeans(gpu_clustering.Task(wide, task.judged, task.problem))
    assert (slow.slow is not None) == (metric == "cosine")


def test_a_quick_run_leaves_out_what_is_slow():
    it = replace(provider([lambda: None]), slow="compiles for a minute")
    meter = gpu_timing.GpuMeter(Processor())
    for quick, status in ((False, "ok"), (True, "missing")):
        (row,) = runner.run_case(
            one_case(it), repetitions=3, seconds=0.05, meter=meter, quick=quick
        ).rows
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
@pytest.mark.parametrize("form", [gpu_clustering.torch_gram, gpu_clustering.torch_direct])
def test_rivals_in_torch_ask_the_host_nothing(form, metric):
    """So that a graph can hold them: a tensor without values can answer none."""
    with FakeTensorMode():
        labels = form(torch.empty(2, 40, 16), 4, 3, metric)
        half = torch.empty(2, 40, 16, dtype=torch.bfloat16, device="cuda")
        inner = gpu_clustering.products(half, half.mT)
    assert labels.shape == (2, 40)
    assert (inner.dtype, inner.device.type) == (torch.float32, "cuda")


def test_spread_takes_the_ends():
    assert gpu_clustering.spread(3, 16).tolist() == [0, 1, 2]
    some = gpu_clustering.spread(256, 16).tolist()
    assert len(set(some)) == 16 and (some[0], some[-1]) == (0, 255)


def test_ceilings_and_floor():
    found = gpu_timing.ceilings(Processor(seconds=0.5), "cpu", 64)
    assert found == {
        "copy_bytes_per_s": 2 * 2 * 8 * 64 * 64 / 0.5,
        "bfloat16_flops_per_s": 2 * 64**3 / 0.5,
    }
    result = run(one_case(provider([lambda: None])), Processor(seconds=1.0))
    (floor,) = [line for line in report.conclusions(result, CEILINGS) if "no faster" in line]
    assert report.floor_ms(result.cost, 5, CEILINGS) == (
        pytest.approx(1e3 * 8 / 4e12 / 5),
        pytest.approx(1e3 * 4 / 8e14 / 5),
    )
    assert "ours takes 500000000000.0x" in floor


def test_setups_are_distinct_and_cover_the_grid():
    assert len(set(gpu_merge_tokens.SETUPS)) == len(gpu_merge_tokens.SETUPS) == 24
    assert len(set(gpu_sweep.SETUPS)) == len(gpu_sweep.SETUPS)
    for setup in gpu_sweep.SETUPS:
        assert setup.P + setup.K <= setup.N


GPU = {"name": "Some GPU", "capability": "9.0", "driver": "1", "cuda_of_torch": "13", "nvcc": None}


@pytest.fixture
def pretended_gpu(monkeypatch):
    """What `python -m bench --device cuda` needs: one set-up that runs, one that does not."""

    def case(setup):
        if setup.d == 5:
            raise torch.OutOfMemoryError("too large")
        return gpu_token_importance.case(setup, "cpu")

    setups = [gpu_token_importance.Setup(1, 2, 9, 4), gpu_token_importance.Setup(1, 2, 9, 5)]
    suite = SimpleNamespace(SETUPS=setups, case=case)
    monkeypatch.setitem(__main__.SUITES, "cuda", {"token_importance": suite})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(environment, "gpu", lambda: GPU)
    monkeypatch.setattr(environment, "gpu_state", lambda: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(gpu_timing, "Cuda", Processor)
    monkeypatch.setattr(gpu_timing, "ceilings", lambda: CEILINGS)


def test_json_and_summary_of_a_run_on_a_gpu(pretended_gpu, tmp_path):
    scratch = tmp_path / "scratch"
    out = scratch / "bench-1-token_importance.json"
    # a set-up that does not fit ends no run, and is told by the exit status
    with pytest.raises(typer.Exit) as stop:
        __main__.main(quick=True, device="cuda", out=out)
    assert stop.value.exit_code == 1
    record = json.loads(out.read_text())
    assert record["environment"]["device"] == "cuda" and record["environment"]["gpu"] == GPU
    assert record["environment"]["ceilings"] == CEILINGS
    good, bad = record["results"]
    assert good["gpu_state"] == {"clocks.sm": "1980 MHz"} and good["rows"][0]["host_ms"] > 0
    assert bad["error"] == "OutOfMemoryError: too large"
    assert environment.result_path(record["environment"]).name.startswith("some-gpu-")

    # a second process adds its results
    more = {**record, "results": record["results"][:1]}
    (scratch / "bench-2-more.json").write_text(json.dumps(more))
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
        "FAILED: OutOfMemoryError: too large",
        "copy 4.00 TB/s",
        "| k.sum(-1) |",
    ):
        assert line in page
    assert len(list(ElementTree.parse(tmp_path / "tests.xml").iter("testcase"))) == 2
    merged = json.loads((tmp_path / "bench.json").read_text())
    assert merged == {**record, "results": [good, bad, good]}
    assert sorted(path.name for path in scratch.glob("bench*")) == [out.name, "bench-2-more.json"]


def test_devices_are_refused_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.BadParameter, match="no CUDA device"):
        __main__.main(device="cuda")
    with pytest.raises(typer.BadParameter, match="cpu, cuda, got abacus"):
        __main__.main(device="abacus")


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
    assert "| environment | passed |" in page and page.count("| benchmark") == 6
    assert "built for 9.0a" in (out / "machine.log").read_text()
    assert len(list(out.iterdir())) <= 8
    env["SECONDS_IN_ALL"] = "300"
    done = subprocess.run(["bash", script, str(out)], env=env, capture_output=True, text=True)
    assert "stopped: out of time" in (out / "SUMMARY.md").read_text()
    assert subprocess.run(["bash", script], env=env, capture_output=True).returncode == 64
