"""What `vmtc bench compare` says of two runs, on numbers made up."""
# the extras of the harness may be missing: it is imported after a look

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# bench is a folder of the project and not installed
sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.importorskip("threadpoolctl")
pytest.importorskip("rich")

from rich.console import Console

from bench import compare, environment

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789ab",
    "dirty": False,
    "device": "cpu",
    "cpu": "Some CPU",
    "cpu_capability": "AVX2",
    "threads": 2,
    "versions": {"torch": "2.13.0", "numpy": "2.3.5", "vmtc_kernels": "0.1.0"},
}
OURS, RIVAL, FLOOR = "merge_tokens, cpu", "faiss", "the least"
KINDS = {OURS: "ours", RIVAL: "rival", FLOOR: "floor"}

Result = dict[str, Any]


def row(name: str, median: float = 1.0, spread: float = 0.1, samples: int = 41) -> dict[str, Any]:
    """Samples evenly on both sides of the median, as far as ``spread`` of it."""
    times = median * np.linspace(1 - spread, 1 + spread, samples)
    low, high = np.percentile(times, [20, 80])
    ms = {"median": median, "p20": low, "p80": high}
    known = {"name": name, "kind": KINDS[name], "status": "ok", "detail": ""}
    return {**known, "ms": ms, "samples_ms": list(times)}


def lost(name: str, status: str) -> dict[str, Any]:
    return {**row(name), "status": status, "detail": "why not", "ms": None, "samples_ms": []}


def result(*rows: dict[str, Any], busy: float | None = 0.0, **more: Any) -> Result:
    found = {"suite": "merge", "axis": None, "params": {"D": 1024, "N": 576}, "rows": list(rows)}
    return {**found, "others_busy": busy, **more}


class Compared:
    """status and text of comparing two runs of a set-up, or of several."""

    def __init__(
        self, folder: Path, old: Any, new: Any, changed: dict[str, Any] | None = None, **how: Any
    ) -> None:
        paths = []
        for name, results, more in (("old", old, {}), ("new", new, changed or {})):
            results = results if isinstance(results, list) else [results]
            content = {"environment": {**ENVIRONMENT, **more}, "results": results}
            paths.append(folder / f"{name}.json")
            paths[-1].write_text(json.dumps({"vmtc": content}))
        out = io.StringIO()
        self.status = compare.main(*paths, Console(file=out, width=200), **how)
        self.text = out.getvalue()


BASE = result(row(OURS), row(RIVAL, 2), row(FLOOR, 0.5))


def test_nothing_changed(tmp_path: Path) -> None:
    got = Compared(tmp_path, BASE, BASE)
    assert got.status == 0
    assert "1 rows of ours compared: 1 within the spread; median ratio 1.00x" in got.text
    assert "2 of rivals, references and floors: 2 within the spread" in got.text
    # rows without a flag are shown where every row is asked for
    assert OURS not in got.text and "not the same" not in got.text
    both = [BASE, result(row(RIVAL), params={"N": 7})]
    every = Compared(tmp_path, both, both, every=True)
    assert every.status == 0
    shown = (OURS, RIVAL, FLOOR, "merge D=1024 N=576", "merge N=7")
    assert all(text in every.text for text in shown)


def test_a_slower_row_of_ours_fails_and_a_faster_one_does_not(tmp_path: Path) -> None:
    slower = result(row(OURS, 1.5), row(RIVAL, 2), row(FLOOR, 0.5))
    got = Compared(tmp_path, BASE, slower)
    assert got.status == 1 and "of ours: 1 slower" in got.text
    assert "1 [0.94, 1.06]" in got.text and "1.5 [1.41, 1.59]" in got.text and "1.50x" in got.text
    assert "the machine or a library" not in got.text
    back = Compared(tmp_path, slower, BASE)
    assert back.status == 0 and "1 faster" in back.text and "0.67x" in back.text


def test_others_do_not_fail_but_are_told(tmp_path: Path) -> None:
    got = Compared(tmp_path, BASE, result(row(OURS), row(RIVAL, 4), row(FLOOR, 0.25)))
    assert got.status == 0
    assert "faiss: 1 slower; median ratio 2.00x" in got.text
    assert "the least: 1 faster; median ratio 0.50x" in got.text


@pytest.mark.parametrize(("rival", "company"), [(3.0, True), (2.95, True), (2.6, False)])
def test_a_rival_slowed_as_much_is_a_sign_of_the_machine(
    tmp_path: Path, rival: float, company: bool
) -> None:
    got = Compared(tmp_path, BASE, result(row(OURS, 1.5), row(RIVAL, rival), row(FLOOR, 0.3)))
    assert got.status == 1
    assert (f"as is faiss {rival / 2:.2f}x: the machine or a library?" in got.text) == company


@pytest.mark.parametrize(
    ("median", "spread", "samples", "flag"),
    [
        (1.5, 0.1, 41, "slower"),
        # beyond the spread of neither run
        (1.2, 0.2, 41, ""),
        # beyond the spread, but hardly at all
        (1.02, 0.001, 41, ""),
        (1.04, 0.001, 41, "slower"),
        (1.5, 0.1, 6, "slower"),
        (1.5, 0.1, 5, "few samples"),
        (1.5, 0.1, 0, "few samples"),
    ],
)
def test_the_rule(median: float, spread: float, samples: int, flag: str) -> None:
    old, new = row(OURS, 1, spread, samples or 1), row(OURS, median, spread, samples or 1)
    new["samples_ms"] = new["samples_ms"] if samples else []
    assert compare.judge(old, new, disturbed=False) == flag
    mirrored = {"slower": "faster"}.get(flag, flag)
    assert compare.judge(new, old, disturbed=False) == mirrored
    if not flag.startswith("few"):
        assert compare.judge(old, new, disturbed=True) == "disturbed"


def test_few_samples_that_are_not_all_in_order_do_not_tell() -> None:
    """Of seven, the percentiles are apart once in fifty pairs of runs of equal speed."""
    old, new = row(OURS), row(OURS)
    old["samples_ms"] = [1.0, 1.0, 1.0, 1.0, 1.1, 1.2, 1.9]
    new["samples_ms"] = [1.0, 1.5, 1.5, 1.6, 1.6, 1.7, 1.8]
    for one in (old, new):
        low, median, high = np.percentile(one["samples_ms"], [20, 50, 80])
        one["ms"] = {"median": median, "p20": low, "p80": high}
    assert new["ms"]["p20"] > old["ms"]["p80"]
    assert compare.judge(old, new, disturbed=False) == ""
    old["samples_ms"], new["samples_ms"] = old["samples_ms"] * 3, new["samples_ms"] * 3
    assert compare.judge(old, new, disturbed=False) == "slower"


def test_runs_of_equal_speed_are_hardly_ever_told_apart() -> None:
    generator = np.random.default_rng(0)
    flags = []
    for samples in (6, 7, 9, 15, 41):
        for _ in range(400):
            pair = (row(OURS), row(OURS))
            for one in pair:
                one["samples_ms"] = list(generator.lognormal(sigma=0.2, size=samples))
                low, median, high = np.percentile(one["samples_ms"], [20, 50, 80])
                one["ms"] = {"median": median, "p20": low, "p80": high}
            flags.append(compare.judge(*pair, disturbed=False))
    assert sum(flag != "" for flag in flags) <= 2 * 2 * len(flags) / 500


@pytest.mark.parametrize("side", [0, 1])
def test_disturbed_rows_are_not_judged(tmp_path: Path, side: int) -> None:
    pair = [copy.deepcopy(BASE), result(row(OURS, 9), lost(RIVAL, "missing"), row(FLOOR))]
    pair[side]["others_busy"] = environment.QUIET + 0.01
    got = Compared(tmp_path, *pair)
    assert got.status == 0 and "1 disturbed" in got.text and "other processes" in got.text
    # what fails does so in any company
    pair[1]["rows"][0] = lost(OURS, "failed")
    assert Compared(tmp_path, *pair).status == 1
    pair[1]["rows"][0] = row(OURS, 9)
    pair[side]["others_busy"] = environment.QUIET
    assert Compared(tmp_path, *pair).status == 1
    pair[side]["others_busy"] = None
    assert Compared(tmp_path, *pair).status == 1


@pytest.mark.parametrize("status", ["failed", "missing", "gone"])
@pytest.mark.parametrize("name", [OURS, RIVAL])
def test_what_is_lost_fails_if_it_is_ours(tmp_path: Path, name: str, status: str) -> None:
    rows = [found for found in BASE["rows"] if found["name"] != name]
    if status != "gone":
        rows.append(lost(name, status))
    got = Compared(tmp_path, BASE, result(*rows))
    flag = "gone" if status == "gone" else f"{status} now"
    assert got.status == (name == OURS)
    told = next(line for line in got.text.splitlines() if name in line)
    assert flag in told and ("why not" in told) == (status != "gone")
    # and back again it is new
    back = Compared(tmp_path, result(*rows), BASE)
    assert back.status == 0 and (" new" in back.text) == (name == OURS)


def test_what_failed_before_and_fails_now_is_no_news(tmp_path: Path) -> None:
    broken = result(lost(OURS, "failed"), row(RIVAL), lost(FLOOR, "missing"))
    got = Compared(tmp_path, broken, broken)
    assert got.status == 0 and OURS not in got.text
    missing = result(lost(OURS, "missing"), row(RIVAL))
    assert Compared(tmp_path, missing, broken).status == 1
    assert Compared(tmp_path, broken, missing).status == 0


def test_a_set_up_that_fails_as_a_whole(tmp_path: Path) -> None:
    error = {"suite": "merge", "axis": None, "params": BASE["params"], "error": "out of memory"}
    got = Compared(tmp_path, BASE, error)
    assert got.status == 1 and "failed now, out of memory" in got.text
    other = result(row(OURS), params={"D": 4096})
    assert Compared(tmp_path, [error, other], [error, other]).status == 0
    assert Compared(tmp_path, [error, other], [BASE, other]).status == 0


def test_rows_belong_together_by_the_whole_set_up(tmp_path: Path) -> None:
    swept = result(row(OURS, 5), axis="N")
    got = Compared(tmp_path, [BASE, swept], [swept, BASE])
    assert got.status == 0 and "2 rows of ours compared: 2 within the spread" in got.text
    got = Compared(tmp_path, [BASE, swept], [result(row(OURS, 7), axis="N"), BASE])
    assert got.status == 1 and "merge D=1024 N=576 (N varies)" in got.text


def test_set_ups_of_one_run_alone_are_told_and_do_not_fail(tmp_path: Path) -> None:
    others = [result(row(OURS), suite="kmeans", params={"K": k}) for k in (1, 2)]
    got = Compared(tmp_path, [BASE, *others], [BASE, result(row(OURS), suite="focus")])
    assert got.status == 0
    assert "set-ups in old.json alone: kmeans 2" in got.text
    assert "set-ups in new.json alone: focus 1" in got.text


def test_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    other = result(row(OURS), params={"D": 7})
    got = Compared(tmp_path, BASE, other)
    assert got.status == 2 and "no timed row in common" in got.text
    untimed = result(lost(OURS, "missing"))
    assert Compared(tmp_path, untimed, untimed).status == 2
    (tmp_path / "none.json").write_text("{}")
    out = Console(file=io.StringIO())
    assert compare.main(tmp_path / "none.json", tmp_path / "old.json", out) == 2
    assert compare.main(tmp_path / "absent.json", tmp_path / "old.json", out) == 2


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"cpu": "Another"}, "not the same device: Some CPU (AVX2), Another (AVX2)"),
        ({"gpu": {"name": "A GPU"}}, "not the same device: Some CPU (AVX2), A GPU"),
        ({"threads": 4}, "not the same threads: 2, 4"),
        (
            {"versions": {**ENVIRONMENT["versions"], "torch": "2.14.0"}},
            "not the same torch: 2.13.0, 2.14.0",
        ),
        ({"dirty": True}, "commit 0123456789ab, uncommitted changes"),
    ],
)
def test_other_conditions_are_told(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    assert told not in Compared(tmp_path, BASE, BASE).text
    got = Compared(tmp_path, BASE, BASE, changed)
    assert got.status == 0 and told in got.text
