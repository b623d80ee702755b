"""The paper's table, of files that lmms-eval wrote and of such as it would write."""

import csv
import json
import re

import pytest

pytest.importorskip("lmms_eval")

import lmms_task
from lmms_eval.loggers import EvaluationTracker
from lmms_task import ROWS, evaluate

from vmtc_kernels.integrations.lmms_eval.table import COLUMNS, main
from vmtc_kernels.integrations.lmms_eval.table import NOTHING as EMPTY

pytest_plugins = ("lmms_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread", "caches")


def test_the_table_of_result_files(folders, tasks, expected, tmp_path, capsys):
    """Files that lmms-eval wrote, of a local task with the name of one of the paper's."""
    right = [answer.strip() for answer, _ in expected["VMTC"]]
    named = lmms_task.write(tmp_path / "named", right, "gqa")
    results = tmp_path / "results"

    def run(row, folder, **options):
        tracker = EvaluationTracker(output_path=str(results / folder))
        options |= {"evaluation_tracker": tracker, "batch_size": 2}
        result = evaluate(folders("llava"), named, ROWS[row][0], "gqa", **options)
        result.pop("samples")
        tracker.save_results_aggregated(result, None, "20261126_120000")
        return 100 * result["results"]["gqa"]["exact_match,none"]

    def table(*more):
        try:
            main([str(results), *more])
        except SystemExit:
            return capsys.readouterr().err
        return capsys.readouterr().out

    assert "no *_results.json" in table()
    scores = {row: run(row, row) for row in list(ROWS)[1:]}
    run("baseline", "baseline", limit=3)
    printed = table()
    lines = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    assert head[:3] == ["method", "settings", "tokens per image"]
    assert head[3:] == [column.name for column in COLUMNS]
    assert [row[0] for row in rows] == list(ROWS)
    assert [row[1] for row in rows] == [EMPTY, "2 x 2", "12 + 4", "12 + 4, keep 0.5"]
    assert [row[2] for row in rows] == ["64", "16", "16", "16"]
    assert [row[4] for row in rows[1:]] == [f"{score:.1f}" for score in scores.values()]
    assert rows[2][4] == "100.0"
    assert all(row[3] == row[5] == EMPTY for row in rows)
    assert printed.startswith(f"**{folders('llava')}**")
    assert "- GQA of baseline: 3 of 7 questions" in printed

    main([str(results), "--csv"])
    out, err = capsys.readouterr()
    read = list(csv.reader(out.splitlines()))
    assert read[3][1:6] == ["VMTC", "12 + 4", "16", "", "100.0"] and read[0][5] == "GQA"
    assert "not whole: GQA of baseline: 3 of 7" in err

    run("VMTC", "again")
    words = r"two results for GQA of VMTC \(12 \+ 4\): \S+/VMTC/\S+ and \S+/again/\S+: move one"
    assert re.search(words, table())


def test_the_command_and_what_it_refuses(tmp_path, capsys):
    def refused(words, config, results=None):
        path = tmp_path / "a_results.json"
        path.write_text(json.dumps({"config": config, "results": results or {}}))
        with pytest.raises(SystemExit):
            main([str(tmp_path)])
        assert re.search(words, capsys.readouterr().err)

    model = {"model": "vmtc_hf", "model_args": "pretrained=a/b"}
    refused(
        "a_results.json is not a result of vmtc_hf: it is of the model llava_hf",
        {"model": "llava_hf", "model_args": ""},
    )
    refused("unknown argument 'keep'", model | {"model_args": "pretrained=a/b,keep=1"})
    refused("is not a result of vmtc_hf: 'model'", {})
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--column", "POPE"])
    assert "'POPE' is not NAME=TASK:METRIC" in capsys.readouterr().err


def test_rows_of_the_table(tmp_path, capsys):
    """Rows of other settings beside those of the paper, and several models."""
    given = {
        "1": ("pretrained=a/b,num_primary=64,num_merged=16", 576 / 8, {"mme": (900, 300)}),
        "2": (
            "pretrained=a/b,num_primary=0.25,num_merged=0.0625,layers=[0,1],metric=euclidean",
            180.25,
            {},
        ),
        "3": ("pretrained=a/b,keep_ratio=0.25", 576, {"mme": (1500.123, 300)}),
        "4": ("pretrained=a/b,num_primary=64,num_merged=16", 74, {"mmbench_en_dev": 64.25}),
        "5": ("pretrained=a/c,revision=v2,threshold=0.1,downsample=2", None, {"mia_bench": 0.625}),
    }
    for name, (arguments, tokens, found) in given.items():
        results = {}
        if "mme" in found:
            perception, cognition = found["mme"]
            results["mme"] = {
                "mme_perception_score,none": perception,
                "mme_cognition_score,none": cognition,
            }
        for task in set(found) - {"mme"}:
            results[task] = {"gpt_eval_score,none": found[task], "submission,none": None}
        throughput = {} if tokens is None else {"throughput": {"avg_image_tokens": tokens}}
        config = {"model": "vmtc_hf", "model_args": arguments}
        text = json.dumps({"config": config, "results": results, **throughput})
        (tmp_path / f"{name}_results.json").write_text(text)
    main([str(tmp_path), "--csv"])
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))[1:]
    assert [row[:4] for row in rows] == [
        ["a/b", "baseline", "", ""],
        ["a/b", "spatial downsampling", "", ""],
        ["a/b", "VMTC", "64 + 16", "72 to 74"],
        ["a/b", "VMTC+CMAI", "25% + 6.25%, metric=euclidean, keep 0.5, layers=(0, 1)", "180.2"],
        ["a/b", "CMAI", "keep 0.25", "576"],
        ["a/c v2", "baseline", "", ""],
        ["a/c v2", "spatial downsampling", "", ""],
        ["a/c v2", "VMTC", "", ""],
        ["a/c v2", "VMTC+CMAI", "", ""],
        ["a/c v2", "spatial downsampling+CMAI", "2 x 2, threshold 0.1", ""],
    ]
    assert rows[2][4:] == ["", "", "", "900.0", "300.0", "64.2", ""]
    assert rows[4][7:9] == ["1500.1", "300.0"] and rows[-1][-1] == "62.5"
    assert not any(rows[3][4:])
