"""The model `vmtc_hf` in the real lmms-eval, on local photos and a tiny random model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

import lmms_task
from lmms_eval import evaluator, utils
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_task import ROWS, evaluate

from vmtc_kernels.integrations.lmms_eval import _model
from vmtc_kernels.integrations.lmms_eval._settings import CMAI as CMAI_FIELDS
from vmtc_kernels.integrations.lmms_eval._settings import OTHERS, settings_of
from vmtc_kernels.integrations.lmms_eval._settings import VMTC as VMTC_FIELDS
from vmtc_kernels.integrations.lmms_eval.table import COLUMNS, METHODS, method
from vmtc_kernels.integrations.lmms_eval.table import NOTHING as EMPTY

pytest_plugins = ("lmms_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread", "caches")


def test_lmms_eval_knows_the_model():
    assert get_model("vmtc_hf") is _model.VmtcHf
    assert get_model("vmtc_hf", force_simple=True) is _model.VmtcHfSimple


@pytest.mark.parametrize("row", ROWS)
def test_scores_are_those_of_answers_made_outside(folders, tasks, expected, row):
    more, _ = ROWS[row]
    result = evaluate(folders("llava"), tasks, more, batch_size=3)
    samples = result["samples"]["photos_vqa"]
    assert [sample["filtered_resps"][0] for sample in samples] == [
        answer for answer, _ in expected[row]
    ]
    right = [answer.strip() for answer, _ in expected["VMTC"]]
    score = sum(a.strip() == b for (a, _), b in zip(expected[row], right, strict=True)) / len(right)
    assert result["results"]["photos_vqa"]["exact_match,none"] == pytest.approx(score)
    # they differ between the rows, or nothing would be tested
    assert (score == 1) == (row == "VMTC")
    counts = [sample["token_counts"][0]["input_tokens"] for sample in samples]
    assert counts == [length for _, length in expected[row]]
    kept = 64 if row == "baseline" else 16
    assert result["throughput"]["avg_image_tokens"] == kept


def test_multiple_choice(folders, tasks, plain, monkeypatch):
    # 0.7.3 turns the pairs of every model into text, and fails to read them afterwards
    unwrapped = evaluator.unwrap_generation_output
    monkeypatch.setattr(
        evaluator,
        "unwrap_generation_output",
        lambda x: (x, None) if isinstance(x, tuple) else unwrapped(x),
    )
    for more, parts in ROWS.values():
        result = evaluate(folders("llava"), tasks, more, "photos_vqa_ppl", force_simple=True)
        losses = plain(**parts).losses([f" {choice}" for choice in lmms_task.CHOICES])
        chosen = [min(range(3), key=lambda i, each=each: each[i][0]) for each in losses]
        right = [choice == number % 3 for number, choice in enumerate(chosen)]
        assert result["results"]["photos_vqa_ppl"]["acc,none"] == pytest.approx(
            sum(right) / len(right)
        )
        found = [sample["filtered_resps"] for sample in result["samples"]["photos_vqa_ppl"]]
        for each, theirs in zip(losses, found, strict=True):
            assert [loss for loss, _ in theirs] == pytest.approx([loss for loss, _ in each], 1e-3)


def test_simple_requests_are_the_same_prompts(folders, tasks, expected):
    result = evaluate(folders("llava"), tasks, batch_size=4, force_simple=True)
    found = [sample["filtered_resps"][0] for sample in result["samples"]["photos_vqa"]]
    assert found == [answer for answer, _ in expected["baseline"]]


def test_answers_are_kept_in_the_response_cache(folders, tasks, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first = evaluate(folders("llava"), tasks, use_cache=cache)

    def never(*_):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(_model.VmtcHf, "_answers", never)
    again = evaluate(folders("llava"), tasks, use_cache=cache)
    assert again["results"]["photos_vqa"] == first["results"]["photos_vqa"]
    with pytest.raises(AssertionError, match="asked again"):  # another row has answers of its own
        evaluate(folders("llava"), tasks, ",downsample=2", use_cache=cache)


def test_the_command(folders, tasks, expected, tmp_path):
    row, output = "VMTC+CMAI", tmp_path / "results"
    arguments = f"pretrained={folders('llava')},device=cpu{ROWS[row][0]}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "vmtc_hf", "--tasks", "photos_vqa"]
    command += ["--model_args", arguments, "--batch_size", "4", "--include_path", str(tasks)]
    command += ["--output_path", str(output), "--log_samples", "--verbosity", "DEBUG"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (path,) = output.rglob("*_results.json")
    result = json.loads(path.read_text())
    (samples,) = path.parent.glob("*_samples_photos_vqa.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    # the command takes blanks off the ends, with what a model thinks aloud
    assert answers == [answer.strip() for answer, _ in expected[row]]
    assert result["throughput"]["avg_image_tokens"] == 16

    command = [sys.executable, "-m", "vmtc_kernels.integrations.lmms_eval", str(tmp_path)]
    command += ["--column", "Photos=photos_vqa:exact_match:100"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith(f"| {row} ")]
    score = result["results"]["photos_vqa"]["exact_match,none"]
    assert line.startswith(f"| {row} | 12 + 4, keep 0.5 | 16 | {EMPTY} | ")
    assert line.endswith(f" | {EMPTY} | {100 * score:.1f} |")


def test_the_commands_of_the_docs():
    """Each asks for tasks and metrics that lmms-eval has, with arguments that there are."""
    text = (Path(__file__).parents[1] / "docs/evaluation.md").read_text()
    (model,), (tasks,) = (re.findall(rf"^{name}=(.*)", text, re.M) for name in ("MODEL", "TASKS"))
    runs = re.findall(r'^run \w+ +"(.*)"', text, re.M)
    made = [settings_of(utils.simple_parse_args_string(model + more)) for more in runs]
    assert [method(settings) for settings in made] == list(METHODS)
    names = set(re.findall(r"`(\w+)", text))
    assert names.issuperset({*VMTC_FIELDS, *CMAI_FIELDS, *OTHERS})
    manager = TaskManager()
    in_table = {column.tasks[0]: column for column in COLUMNS}
    assert set(tasks.split(",")) == set(in_table)
    for column in COLUMNS:
        for task in column.tasks:
            config = Path(manager.task_index[task]["yaml_path"]).read_text()
            assert f"metric: {column.metric}\n" in config and f"`{task}`" in text
