"""The paper's table, of the result files that lmms-eval wrote for the model ``vmtc_hf``."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...config import CMAIConfig, VMTCConfig
from ._settings import Settings, settings_of

NOTHING = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Column:
    """A measurement: its tasks, of which one is enough, its metric, and what that is times."""

    name: str
    tasks: tuple[str, ...]
    metric: str
    factor: float = 1.0


COLUMNS = (
    Column("VQAv2", ("vqav2_val",), "exact_match", 100),
    Column("GQA", ("gqa",), "exact_match", 100),
    Column("TextVQA", ("textvqa_val",), "exact_match", 100),
    Column("MME perception", ("mme",), "mme_perception_score"),
    Column("MME cognition", ("mme",), "mme_cognition_score"),
    Column("MMBench", ("mmbench_en_dev_static", "mmbench_en_dev"), "gpt_eval_score"),
    Column("MIA-Bench", ("mia_bench",), "gpt_eval_score", 100),
)
METHODS = ("baseline", "spatial downsampling", "VMTC", "VMTC+CMAI")


@dataclass
class Row:
    """What was measured of one model under one setting; ``files``: where each number is from."""

    method: str
    settings: str
    tokens: set[float] = field(default_factory=set)
    values: dict[str, float] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def cells(self, columns: Sequence[Column], empty: str) -> list[str]:
        ends = sorted({min(self.tokens), max(self.tokens)}) if self.tokens else []
        tokens = " to ".join(f"{x:.1f}".removesuffix(".0") for x in ends)
        numbers = [self.values.get(column.name) for column in columns]
        return [
            self.method,
            self.settings or empty,
            tokens or empty,
            *(empty if x is None else f"{x:.1f}" for x in numbers),
        ]


def rows_of(files: Iterable[Path], columns: Sequence[Column]) -> dict[str, list[Row]]:
    """The rows of each model, those of the paper first and there even if nothing is known of them.

    Raises:
        ValueError: a file that is not a result of ``vmtc_hf``, or two results for one cell.
    """
    found: dict[str, dict[Any, Row]] = {}
    for path in files:
        result, settings = _read(path)
        model = " ".join(filter(None, (settings.pretrained, settings.revision)))
        parts = (settings.vmtc, settings.cmai, settings.downsample)
        row = found.setdefault(model, {}).setdefault(parts, Row(method(settings), words(settings)))
        for column in columns:
            _add(row, column, result, path)
        tokens = result.get("throughput", {}).get("avg_image_tokens")
        if tokens is not None:
            row.tokens.add(round(tokens, 1))
    return {model: _ordered(rows.values()) for model, rows in found.items()}


def _read(path: Path) -> tuple[dict[str, Any], Settings]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        name, text = result["config"]["model"], result["config"]["model_args"]
        if name != "vmtc_hf":
            raise ValueError(f"it is of the model {name}, not of vmtc_hf")
        return result, settings_of(_arguments(text))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of vmtc_hf: {error}") from error


def _arguments(text: str) -> dict[str, Any]:
    """``model_args`` as lmms-eval reads them."""
    given = {}
    for part in re.split(r",(?![^\[]*\])", text):
        name, _, value = part.strip().partition("=")
        given[name] = _value(value)
    return given


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.isnumeric():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _add(row: Row, column: Column, result: dict[str, Any], path: Path) -> None:
    for task in column.tasks:
        value = result.get("results", {}).get(task, {}).get(f"{column.metric},none")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if column.name in row.values:
            raise ValueError(
                f"there are two results for {column.name} of {row.method} ({row.settings}):"
                f" {row.files[column.name]} and {path}: move one of them away"
            )
        row.values[column.name], row.files[column.name] = value * column.factor, path
        count = result.get("n-samples", {}).get(task, {})
        if count.get("effective") != count.get("original"):
            row.notes.append(
                f"{column.name} of {row.method}: {count['effective']} of {count['original']}"
                f" questions ({path})"
            )


def method(settings: Settings) -> str:
    """What a row is called."""
    parts = []
    if settings.downsample is not None:
        parts.append("spatial downsampling")
    if settings.vmtc is not None:
        parts.append("VMTC")
    if settings.cmai is not None:
        parts.append("CMAI")
    return "+".join(parts) or "baseline"


def words(settings: Settings) -> str:
    """What was set, in short: ``128 + 32``, and all else that is not as usual."""
    parts = []
    if settings.downsample is not None:
        parts.append(f"{settings.downsample} x {settings.downsample}")
    if (vmtc := settings.vmtc) is not None:
        parts.append(" + ".join(_amount(x) for x in (vmtc.num_primary, vmtc.num_merged)))
        usual = VMTCConfig(num_primary=vmtc.num_primary, num_merged=vmtc.num_merged)
        parts += _unusual(vmtc, usual)
    if (cmai := settings.cmai) is not None:
        share = cmai.threshold if cmai.keep_ratio is None else cmai.keep_ratio
        parts.append(f"{'keep' if cmai.threshold is None else 'threshold'} {share:g}")
        usual_too = CMAIConfig(keep_ratio=cmai.keep_ratio, threshold=cmai.threshold)
        parts += _unusual(cmai, usual_too)
    return ", ".join(parts)


def _amount(value: int | float) -> str:
    return f"{100 * value:g}%" if isinstance(value, float) else str(value)


def _unusual(config: Any, usual: Any) -> list[str]:
    pairs = zip(asdict(config).items(), asdict(usual).values(), strict=True)
    return [f"{name}={value}" for (name, value), other in pairs if value != other]


def _ordered(rows: Iterable[Row]) -> list[Row]:
    """By method, those of the paper first; those of a method as they were found."""
    by_method: dict[str, list[Row]] = {name: [] for name in METHODS}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    return [row for name, group in by_method.items() for row in group or [Row(name, "")]]


def markdown(tables: dict[str, list[Row]], columns: Sequence[Column]) -> str:
    """A table for each model."""
    parts = []
    for model, rows in tables.items():
        head = ["method", "settings", "tokens per image", *(column.name for column in columns)]
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
        lines += [row.cells(columns, NOTHING) for row in rows]
        notes = "".join(f"\n- {note}" for row in rows for note in row.notes)
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{model}**\n\n{table}\n" + (f"\nNot whole:\n{notes}\n" if notes else ""))
    return "\n".join(parts)


def comma_separated(tables: dict[str, list[Row]], columns: Sequence[Column]) -> str:
    """All models in one, a line for each row; what is missing is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [column.name for column in columns]
    writer.writerow(["model", "method", "settings", "tokens per image", *names])
    for model, rows in tables.items():
        writer.writerows([model, *row.cells(columns, "")] for row in rows)
    return text.getvalue()


def _column(text: str) -> Column:
    match = re.fullmatch(r"([^=]+)=([^:]+):([^:]+)(?::([0-9.]+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=TASK:METRIC or NAME=TASK:METRIC:100"
        )
    name, task, metric, factor = match.groups()
    return Column(name, (task,), metric, float(factor or 1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of some folders of results (*_results.json, at any depth)."""
    parser = argparse.ArgumentParser(
        prog="python -m vmtc_kernels.integrations.lmms_eval", description=main.__doc__
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="--output_path of each run")
    add("--csv", action="store_true", help="comma-separated values, not Markdown")
    add(
        "--column",
        action="append",
        default=[],
        type=_column,
        metavar="NAME=TASK:METRIC[:FACTOR]",
        help="one more column, POPE=pope:pope_accuracy:100 for example",
    )
    given = parser.parse_args(arguments)
    columns = (*COLUMNS, *given.column)
    files = sorted({path for folder in given.folders for path in folder.rglob("*_results.json")})
    if not files:
        parser.error(f"no *_results.json in {', '.join(map(str, given.folders))}")
    try:
        tables = rows_of(files, columns)
    except ValueError as error:
        parser.error(str(error))
    if given.csv:
        sys.stdout.write(comma_separated(tables, columns))
        notes = [note for rows in tables.values() for row in rows for note in row.notes]
        sys.stderr.writelines(f"not whole: {note}\n" for note in notes)
    else:
        sys.stdout.write(markdown(tables, columns))
