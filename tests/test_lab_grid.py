"""The laboratory's grid: what is measured, how a run goes on, and what the pages say of it."""

import json
import shutil

import numpy as np
import pytest
import torch

from bench.quality import __main__ as lab
from bench.quality import evaluate, report
from bench.quality.checkpoint import FOLDER, load
from bench.quality.grid import CONFIRMED, PARTS, rows
from bench.quality.reducers import NAMED, TOKENS
from bench.quality.tune import tune


@pytest.mark.parametrize("quick", [True, False])
def test_the_grid(quick):
    found = rows(tuple(PARTS), quick)
    assert (found[0].name, found[0].tokens) == ("none", TOKENS)
    for row in found:
        assert row.reducer.counts(row.tokens), row
    assert {row.part for row in found} == set(PARTS)
    names = [(row.part, row.name, row.tokens) for row in found]
    assert len(set(names)) == len(names)
    budgets = {(row.name, row.tokens) for row in found if row.part == "budgets"}
    for name in set(NAMED) - {"none", "downsampling"}:
        assert {t for n, t in budgets if n == name} == {72, 36, 17}
    assert {t for n, t in budgets if n == "downsampling"} == {36, 17}


def test_the_quick_grid_is_part_of_the_full_one():
    few, all_ = ({row.key for row in rows(tuple(PARTS), quick)} for quick in (True, False))
    assert few < all_


def test_every_row_is_one_that_the_model_takes():
    model, processor = load(FOLDER)
    for row in rows(tuple(PARTS), False):
        with row.reducer.on(model, processor, row.tokens):
            pass


def test_rows_of_other_names_are_measured_once():
    found = rows(("budgets", "vmtc"), False)
    default = [row for row in found if row.reducer == NAMED["VMTC"]() and row.tokens == 36]
    assert [row.part for row in default] == ["budgets", "vmtc"]
    assert len({row.key for row in default}) == 1
    # settings, budgets and fine-tuning tell rows apart
    assert len({row.key for row in rows(("tuned",), False)}) == 9


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two parts on one image a seed."""
    out = tmp_path_factory.mktemp("lab") / "quality.json"
    lab.measure(FOLDER, 1, ("budgets", "pilot"), True, out)
    return out


def test_a_run_is_what_was_asked_and_said(run):
    kept = json.loads(run.read_text())
    assert kept["images"] == 1 and kept["quick"] and len(kept["weights"]) == 64
    by_key = {row["key"]: row for row in kept["rows"]}
    assert {key for *_, key in kept["tables"]} == set(by_key)
    model, processor = load()
    ours = NAMED["VMTC"]()
    counted = []
    for seed in lab.SEEDS:
        exam = evaluate.questions(seed, 1)
        with ours.on(model, processor, 36, seed):
            counted.append(evaluate.counts(exam, evaluate.responses(model, processor, exam, 36)))
    (key,) = [key for p, n, t, key in kept["tables"] if (p, n, t) == ("budgets", "VMTC", 36)]
    assert np.array_equal(np.concatenate(counted), by_key[key]["counts"])
    assert by_key[key]["settings"] == json.loads(json.dumps(ours.settings))


def test_a_run_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    half = tmp_path / "half.json"
    kept = json.loads(run.read_text())
    gone = kept["rows"].pop()
    half.write_text(json.dumps(kept))
    asked = []
    responses = evaluate.responses

    def count(*arguments, **options):
        asked.append(arguments)
        return responses(*arguments, **options)

    monkeypatch.setattr(evaluate, "responses", count)
    lab.measure(FOLDER, 1, ("budgets", "pilot"), True, half)
    assert len(asked) == len(lab.SEEDS)
    again = json.loads(half.read_text())["rows"][-1]
    assert {**again, "seconds": 0} == {**gone, "seconds": 0}
    with pytest.raises(SystemExit, match=r"half\.json is of another model, commit or other images"):
        lab.measure(FOLDER, 2, ("pilot",), True, half)
    kept["environment"]["commit"] = "another"
    half.write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="another model, commit"):
        lab.measure(FOLDER, 1, ("pilot",), True, half)


def test_pages_and_pictures(run, tmp_path):
    found = report.Found(run)
    sections = report.sections(found)
    for name, tokens, key in found.of("pilot"):
        result = found.results[key]["understanding"]
        line = next(
            x for x in sections["pilot"].splitlines() if x.startswith(f"| {name} | {tokens}")
        )
        assert f"| {100 * result['share']:.1f} [" in line
        assert f"{100 * result['change'][0]:+.1f} [" in line
    assert "**" in sections["budgets"] and "| FastV |" in sections["budgets"]
    assert sections["families"].count("\n| ") == 9 + 1
    assert sections["vmtc"] == "Not measured yet."
    report.draw(found, tmp_path)
    assert {p.name for p in tmp_path.glob("*.png")} == {
        f"quality-{name}.png" for name in ("world", "budgets", "pilot")
    }


def test_tuning_changes_what_reads_the_image_and_not_what_sees_it(tmp_path):
    model, processor = load()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tune(model, processor, NAMED["VMTC"](), 36, steps=2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "vision_tower" not in name}
    assert model.config.text_config._attn_implementation == "sdpa"
    # and it still answers
    exam = evaluate.questions(0, 1)
    with NAMED["VMTC"]().on(model, processor, 36):
        assert all(evaluate.responses(model, processor, exam, 36))


def test_a_missing_model_is_told(tmp_path):
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="Unrecognized model"):
        lab.measure(tmp_path, 1, ("pilot",), True, tmp_path / "a.json")


def test_the_defaults_are_confirmed_on_other_images(tmp_path, monkeypatch):
    found = rows((CONFIRMED,))
    default = [row for row in found if row.reducer == NAMED["VMTC"]()]
    assert {row.tokens for row in default} == {72, 36, 17} and found[0].tokens == TOKENS
    model, processor = load(FOLDER)
    for row in found:
        with row.reducer.on(model, processor, row.tokens):
            pass
    assert not {*lab.SEEDS} & {*lab.OTHER_SEEDS}
    few = [found[0], *[row for row in found if row.tokens == 17][:2]]
    monkeypatch.setattr(lab, "rows", lambda parts, quick: few if parts == (CONFIRMED,) else [])
    out = tmp_path / "confirmed.json"
    monkeypatch.setattr("sys.argv", f"lab --confirm --images 1 --out {out}".split())
    lab.main()
    run = json.loads(out.read_text())
    assert run["seeds"] == list(lab.OTHER_SEEDS) and run["images"] == 1
    assert "training" not in run and "examples" not in run
    lines = report.confirmed(report.Found(out)).splitlines()
    assert "4 x 1 images" in lines[0] and "first row" in lines[0]
    assert [line.split(" | ")[0] for line in lines[4:]] == [f"| {row.name}" for row in few]
    # the first row of a budget is what its others are compared with
    assert [line.split(" | ")[3].strip() == "" for line in lines[4:]] == [True, True, False]
    _, base, other = (np.array(row["counts"]) for row in run["rows"])
    change = evaluate.summary(other, base)["understanding"]["change"][0]
    assert lines[6].split(" | ")[3].startswith(f"{100 * change:+.1f} [")
