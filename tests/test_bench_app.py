"""The command: what it runs, refuses, prints and keeps; and the same through pytest-benchmark."""
# the extras of the harness may be missing: it is imported after a look
# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# bench is a folder of the project and not installed
sys.path.insert(0, str(ROOT))
for extra in ("threadpoolctl", "rich", "typer", "pytest_benchmark"):
    pytest.importorskip(extra)

from rich.console import Console
from typer.testing import CliRunner

from bench import app, bench_token_importance, environment, record, report, suites
from bench.bench_token_importance import Setup
from bench.case import Verdict
from bench.machine import CPU, GPU, Machine, Suite
from bench.options import Options

SETUPS = [Setup(1, 2, 9, 4), Setup(2, 2, 9, 4)]


@pytest.fixture
def tiny(monkeypatch):
    """Instead of the suite importance one of two set-ups and a sweep."""
    sweeps = {"N": [Setup(1, 2, n, 4) for n in (9, 17)]}
    suite = Suite("importance", lambda _: SETUPS, lambda _: sweeps, bench_token_importance.case)
    monkeypatch.setattr(bench_token_importance, "SUITE", suite)
    former = torch.get_num_threads()
    yield suite
    environment.limit_threads(former)


def invoke(*arguments):
    found = CliRunner().invoke(app.app, [*map(str, arguments)])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def test_json_holds_what_a_number_depends_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    out = tmp_path / "new" / "result.json"
    done = invoke("importance", "--quick", "--threads", 1, "--sweeps", "--out", out)
    assert done.exit_code == 0, done.output
    kept = record.read(out)
    assert {
        "date",
        "command",
        "commit",
        "dirty",
        "cpu",
        "clocks_mhz",
        "threads",
        "versions",
    } <= set(kept.environment)
    assert kept.environment["variables"]["OPENBLAS_CORETYPE"] == "Haswell"
    assert kept.environment["quick"] and kept.environment["threads"] == 1
    assert kept.environment["ceilings"]["flops_per_s"] > 0
    assert [(r["axis"], r["params"]["B"], r["params"]["N"]) for r in kept.results] == [
        (None, 1, 9),
        (None, 2, 9),
        ("N", 1, 9),
        ("N", 1, 17),
    ]
    first, *_, swept = kept.results
    assert first["targets"] and not swept["targets"]
    floor = next(r for r in first["rows"] if r["kind"] == "floor")
    assert floor["status"] == "ok" and set(floor["ms"]) == {"median", "p20", "p80"}
    assert len(floor["samples_ms"]) >= 3 and floor["peak_bytes"] is not None
    compiled = next(r for r in first["rows"] if "compiled" in r["name"])
    assert compiled["status"] == "missing" and "it compiles" in compiled["detail"]
    # the table at the end says who is faster, and who is missing why
    assert "1/4 importance B=1" in done.output and "over N: importance B=1 H=2 N=17" in done.output
    assert (
        "ours is faster" in done.output and "missing in importance: torch, compiled" in done.output
    )


def test_what_pytest_benchmark_reads(tiny, tmp_path):
    out = tmp_path / "result.json"
    assert invoke("importance", "--quick", "--only", "B=2", "--out", out).exit_code == 0
    whole = json.loads(out.read_text())
    (result,) = whole["vmtc"]["results"]
    timed = [row for row in result["rows"] if row["ms"]]
    assert [b["name"].partition("-")[2][:-1] for b in whole["benchmarks"]] == [
        row["name"] for row in timed
    ]
    for benchmark, row in zip(whole["benchmarks"], timed, strict=True):
        # seconds of a call, which has two images
        assert benchmark["stats"]["median"] == pytest.approx(row["ms"]["median"] * 2 / 1e3)
        assert benchmark["stats"]["rounds"] == len(row["samples_ms"])


def test_a_folder_gets_a_file_named_by_device_and_commit(tiny, tmp_path):
    invoke("importance", "--quick", "--only", "B=2", "--out", tmp_path)
    (out,) = tmp_path.iterdir()
    assert out.name == environment.result_name(record.read(out).environment)
    described = {"cpu": "AMD EPYC(tm) 9B14", "commit": "abc", "dirty": True}
    assert environment.result_name(described) == "amd-epyc-tm-9b14-abc-dirty.json"


def test_no_command_is_run(monkeypatch):
    seen = []
    monkeypatch.setattr(Options, "checked", lambda self: seen.append(self) or 1 / 0)
    for arguments in ([], ["--quick"], ["run", "merge", "kmeans"]):
        CliRunner().invoke(app.app, arguments)
    assert [(each.quick, each.suites) for each in seen] == [
        (False, ()),
        (True, ()),
        (False, ("merge", "kmeans")),
    ]
    assert "compare" in invoke("--help").output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["bananas"], "importance, kmeans, merge, focus, decode, llava, got bananas"),
        (["--device", "abacus"], "cpu, cuda, got abacus"),
        (["--only", "D=7"], "no set-up has 'D=7'"),
        (["llava", "--size", "8b"], "7b, small, tiny, got 8b"),
        (["--device", "cpu", "--eager"], "a CPU has no graphs"),
        (["report", "nowhere"], "nowhere"),
        (["compare", "nowhere.json", "nowhere.json"], "nowhere"),
    ],
)
def test_mistakes_are_told(arguments, reason, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = invoke(*arguments)
    assert done.exit_code == 2 and reason in done.output


def test_a_checkout_is_wanted_for_its_results(monkeypatch):
    monkeypatch.setattr(environment, "CHECKOUT", False)
    done = invoke("importance", "--json")
    assert done.exit_code == 2 and "give --out" in done.output
    monkeypatch.setattr(environment.subprocess, "run", None)
    assert environment._git("rev-parse", "HEAD") == ""


def test_a_set_up_that_fails_ends_no_run(tiny, tmp_path, monkeypatch):
    def case(setup, machine):
        found = bench_token_importance.case(setup, machine)
        if setup.B == 1:
            # as a library may, where nobody expects it
            object.__setattr__(found, "cost", None)
        return found

    broken = dataclasses.replace(tiny, case=case)
    monkeypatch.setattr(bench_token_importance, "SUITE", broken)
    out = tmp_path / "result.json"
    done = invoke("importance", "--quick", "--out", out)
    assert done.exit_code == 1 and "failed" in done.output
    bad, good = record.read(out).results
    assert bad["error"].startswith("TypeError") and bad["params"]["B"] == 1 and good["rows"]


def test_a_wrong_result_of_ours_fails_the_run(tiny, monkeypatch):
    monkeypatch.setattr(bench_token_importance, "near", lambda *_: Verdict(False, "off by far"))
    done = invoke("importance", "--quick", "--only", "B=2")
    assert done.exit_code == 1 and "off by far" in done.output


def test_who_interrupts_sees_what_was_measured(tiny, tmp_path, monkeypatch):
    original = suites.Planned.run

    def run(self, *arguments):
        if self.setup.B == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(suites.Planned, "run", run)
    out = tmp_path / "result.json"
    done = invoke("importance", "--quick", "--out", out)
    assert done.exit_code == 1 and "interrupted" in done.output and "ours is faster" in done.output
    assert len(record.read(out).results) == 1


def test_all_of_a_set_up_is_shown_on_request(tiny):
    done = invoke("importance", "--quick", "--only", "B=2", "--details")
    assert "agreement with" in done.output and "one read of k" in done.output


RESULT = {
    "suite": "merge",
    "params": {"B": 1, "D": 8},
    "axis": None,
    "images": 1,
    "unit": "image",
    "targets": [],
    "others_busy": 0.0,
}


def line(kind, name, median, status="ok", detail=""):
    ms = {"median": median, "p20": median, "p80": median} if median else None
    return {"kind": kind, "name": name, "ms": ms, "status": status, "detail": detail}


def test_summary_says_who_lost():
    results = [
        {
            **RESULT,
            "rows": [line("ours", "us", 2.0), line("rival", "[x]", 1.0), line("rival", "y", 3)],
        },
        {**RESULT, "params": {"B": 2, "D": 8}, "rows": [line("ours", "us", None, "failed", "no")]},
        {"suite": "merge", "params": {"B": 3, "D": 8}, "axis": None, "error": "Error: [too] large"},
    ]
    results[1]["others_busy"] = 1.0
    console = Console(width=120, record=True, file=io.StringIO())
    report.summary(console, results)
    text = console.export_text()
    assert "D=8" in text and "[x]" in text and "0.50x" in text
    assert "not timed" in text and "disturbed" in text and "[too] large" in text
    assert "failed in merge: us: no" in text


def test_every_setup_has_its_own_label_and_enough_tokens():
    for machine in (CPU, GPU):
        planned = suites.plan(Machine("cpu", machine.gpu), swept=True)
        labels = [each.label for each in planned]
        assert len(set(labels)) == len(labels)
        assert {each.suite.name for each in planned} == set(suites.NAMES)
        for each in planned:
            params = each.case.params
            if each.suite.name == "merge":
                assert params["P"] + params["K"] <= params["N"]
            assert each.axis is None or each.axis in params


def test_pytest_benchmark_is_the_recorder(tmp_path):
    out, other = tmp_path / "pytest.json", tmp_path / "command.json"
    setup = "importance B=1 H=16 N=577 d=64 cls_index=0"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-rs"]
    command += ["--bench-quick", "--bench-suite=importance", f"--bench-only={setup}"]
    command += [f"--benchmark-json={out}", "-k", "torch or token_importance"]
    # beside other processes of tests pytest-benchmark turns itself off
    env = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out of quick runs" in done.stdout
    kept = record.read(out)
    (result,) = kept.results
    # what was not selected was not run
    assert {row["name"] for row in result["rows"]} == {
        "token_importance, cpu",
        "token_importance, reference",
        "SDPA and token_importance",
        "torch",
        "torch, compiled",
    }
    # the same names as in a file of the command, so that they can be compared
    record.write(other, kept.environment, kept.results)
    first, second = (json.loads(path.read_text()) for path in (out, other))
    for mine, its in zip(first["benchmarks"], second["benchmarks"], strict=True):
        assert (mine["fullname"], mine["group"]) == (its["fullname"], its["group"])
        assert mine["stats"]["median"] == pytest.approx(its["stats"]["median"])
        assert mine["stats"]["rounds"] == its["stats"]["rounds"]
    assert "node" not in first["machine_info"] and first["machine_info"]["threads"] > 0
