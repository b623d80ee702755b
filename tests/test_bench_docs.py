"""The pages say what the kept runs measured, and nothing else."""
# the extras of the harness may be missing: it is imported after a look
# ruff: noqa: E402

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# bench is a folder of the project and not installed
sys.path.insert(0, str(Path(__file__).parents[1]))
for extra in ("threadpoolctl", "rich", "typer", "pytest_benchmark", "matplotlib"):
    pytest.importorskip(extra)

from bench import docs, record
from bench.suites import NAMES

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "vmtc bench --sweeps --json",
    "commit": "abc",
    "dirty": False,
    "quick": False,
    "device": "cpu",
    "system": "Linux",
    "cpu": "Some CPU",
    "cpu_capability": "AVX2",
    "cores": 2,
    "threads": 2,
    "versions": {"torch": "2.13.0", "transformers": "5.24.0"},
    "ceilings": {"copy_bytes_per_s": 2e10, "flops_per_s": 1e11, "dtype": "float32"},
}


def row(name, kind, median, scope="everything", status="ok", detail=""):
    ms = {"median": median, "p20": 0.9 * median, "p80": 1.1 * median} if median else None
    samples = [median] * 3 if median else []
    return {
        "name": name,
        "kind": kind,
        "scope": scope,
        "status": status,
        "detail": detail,
        "ms": ms,
        "calls_per_sample": 1,
        "samples_ms": samples,
        "host_ms": None,
        "peak_bytes": None,
    }


def result(suite, axis=None, **params):
    size = params.get("N", 100)
    return {
        "suite": suite,
        "params": {"D": 8, **params},
        "axis": axis,
        "images": 2,
        "unit": "image",
        "cost": {"bytes": 10, "flops": 10},
        "rows": [
            row("us", "ours", size / 100),
            row("them", "rival", 4.0, "clustering alone"),
            row("quick ones", "rival", 0.5, "by its own rule: less"),
            row("nobody", "rival", None, status="missing", detail="not installed"),
        ],
        "targets": [],
        "workspace": None,
        "others_busy": 0.0,
        "facts": {},
    }


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    results = [result(name, N=N) for name in NAMES if name != "llava" for N in (100, 300)]
    results += [result("merge", "N", N=N) for N in (100, 200, 400, 800)]
    path = tmp_path / "bench" / "results" / "some-cpu-abc.json"
    record.write(path, ENVIRONMENT, results)
    return record.read(path)


def kept(run):
    return docs.Kept("cpu", dict.fromkeys((name for name in NAMES if name != "llava"), run))


def test_readme_shows_the_fastest_rival_by_the_same_rule(run, tmp_path):
    text = docs.speed([kept(run)], tmp_path / "README.md")
    assert "merge, focus, decode: commit abc, [some-cpu-abc.json](bench/results/" in text
    assert "Some CPU" in text and "**llava**" not in text
    assert "| **merge** N=100 | 1.00 [0.90, 1.10] | them | 4.00 [3.60, 4.40] | 4.00x |" in text
    assert "| **merge** N=300 | 3.00 [2.70, 3.30] | them | 4.00 [3.60, 4.40] | 1.33x |" in text
    assert "](docs/speed-cpu.png)" in text


def test_benchmarks_has_every_provider_and_every_sweep(run, tmp_path):
    # a provider that one set-up has not
    run.results[0]["rows"].append(row("only here", "rival", 3.0))
    text = docs.tables([kept(run)], tmp_path / "docs" / "benchmarks.md")
    assert "[some-cpu-abc.json](../bench/results/some-cpu-abc.json)" in text
    assert "| only here | everything | 3.00 [2.70, 3.30] |  |" in text
    assert "copies 20 GB/s" in text and "`vmtc bench --sweeps --json`" in text
    assert "### merge" in text and "### llava" not in text
    assert "| quick ones | by its own rule: less | 0.50 [0.45, 0.55] | 0.50 [0.45, 0.55] |" in text
    assert "- nobody missing: not installed" in text
    (swept,) = [line for line in text.splitlines() if line.startswith("- over **N**")]
    assert "~ N^(1.00 ± 0.00)" in swept and "400: 1.00x, 800: 0.50x" in swept
    assert "at N = 800 ours is slower" in swept.partition("Without")[2]


def test_newest_clean_run_of_each_device_and_suite_counts(run, tmp_path):
    folder = run.path.parent

    def keep(name, suites=NAMES, **changes):
        results = [result(suite) for suite in suites]
        record.write(folder / f"{name}.json", {**ENVIRONMENT, **changes}, results)

    with pytest.raises(SystemExit, match="no run on a CPU of a clean tree of llava"):
        docs.newest(folder)
    keep("older")
    keep("newer", date="2026-01-03T00:00:00+00:00")
    keep("dirty", date="2026-01-04T00:00:00+00:00", dirty=True)
    keep("quick", date="2026-01-04T00:00:00+00:00", quick=True)
    keep("part", ["merge", "kmeans"], date="2026-01-04T00:00:00+00:00", commit="def")
    keep("gpu", ["focus"], device="cuda", gpu={"name": "Some GPU"})
    # a table has rows of one machine
    keep("elsewhere", ["merge"], date="2026-01-05T00:00:00+00:00", cpu_capability="other")
    keep("alone", ["focus"], date="2026-01-05T00:00:00+00:00", threads=1)
    keep("old", ["decode"], device="cuda", gpu={"name": "Old GPU"}, date="2025-01-01T00:00:00")
    (folder / "other.json").write_text("{}")
    cpu, gpu = docs.newest(folder)
    assert (cpu.device, gpu.device, list(gpu.runs)) == ("cpu", "cuda", ["focus"])
    assert {suite: run.path.stem for suite, run in cpu.runs.items()} == {
        **dict.fromkeys(NAMES, "newer"),
        "merge": "part",
        "kmeans": "part",
    }
    assert [found["suite"] for found in cpu.whole.results] == list(NAMES)
    assert cpu.newest.path.stem == "part"
    assert cpu.sources(tmp_path / "README.md") == (
        "importance, focus, decode, llava: commit abc, [newer.json](bench/results/newer.json);"
        " kmeans, merge: commit def, [part.json](bench/results/part.json)"
    )


def test_a_page_is_rewritten_between_its_marks(run, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(docs, "newest", lambda _: [run])
    monkeypatch.setattr(docs, "PAGES", {page: {"bench": lambda all_, _: all_[0].path.name}})
    drawn = []
    monkeypatch.setattr(docs, "draw_laboratory", lambda: None)
    monkeypatch.setattr(docs, "draw", drawn.append)
    page.write_text("above\n")
    with pytest.raises(SystemExit, match="no place for bench"):
        docs.main()
    page.write_text("above\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbelow\n")
    with pytest.raises(SystemExit, match=r"page\.md: not what the runs say"):
        docs.main(check=True)
    assert "old" in page.read_text() and not drawn
    docs.main()
    docs.main(check=True)
    wanted = "above\n<!-- bench:begin -->\nsome-cpu-abc.json\n<!-- bench:end -->\nbelow\n"
    assert page.read_text() == wanted and drawn == [run]


def test_pages_of_the_project_say_what_its_runs_say():
    docs.main(check=True)
    for each in docs.newest(docs.RESULTS):
        assert docs.picture(each).exists()
