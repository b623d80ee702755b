"""``python -m bench.quality``: measure the laboratory's model under every reducer (`make lab`).

Writes a JSON file after each row and goes on where it stopped. Without --full the grid is the
quick one, for a look; what docs/quality.md says comes from a full one. --confirm asks the
defaults and their nearest rivals about images that none of them was chosen on.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..environment import describe
from . import evaluate
from .checkpoint import FOLDER, load
from .grid import CONFIRMED, PARTS, QUARTER, Row, rows
from .questions import FAMILIES
from .reducers import NAMED, TOKENS
from .tune import tune

SEEDS, OTHER_SEEDS = (0, 1, 2), (3, 4, 5, 6)
EXAMPLES = 8  # pictures with a question, for the documentation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=FOLDER, help="the model's folder")
    parser.add_argument("--full", action="store_true", help="all rows, on more images")
    parser.add_argument("--images", type=int, help="images of each seed (12; full: 60; other: 48)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    which.add_argument("--confirm", action="store_true", help="the defaults, on other images")
    parser.add_argument("--out", type=Path, help="build/lab/quality.json, or confirmed.json")
    given = parser.parse_args()
    if given.confirm:
        images, parts, seeds = given.images or 48, (CONFIRMED,), OTHER_SEEDS
    else:
        images = given.images or (60 if given.full else 12)
        parts, seeds = tuple(given.parts), SEEDS
    name = "confirmed" if given.confirm else "quality"
    out = given.out or Path("build/lab") / f"{name}.json"
    measure(given.model, images, parts, not (given.full or given.confirm), out, seeds)


def measure(
    folder: Path,
    images: int,
    parts: tuple[str, ...],
    quick: bool,
    out: Path,
    seeds: tuple[int, ...] = SEEDS,
) -> None:
    model, processor = load(folder)
    exams = [evaluate.questions(seed, images) for seed in seeds]
    asked = sum(len(exam.questions) for exam in exams)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    kept = _kept(out, {"weights": weights, "images": images, "seeds": list(seeds)})
    wanted = rows(parts, quick)
    if "training" not in kept and CONFIRMED not in parts:
        seen = evaluate.questions(seeds[0], images, "train")
        said = evaluate.responses(model, processor, seen, TOKENS)
        kept["training"] = _listed(evaluate.counts(seen, said))
        kept["examples"] = examples(model, processor, exams[0])
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=asked * len(wanted))
        counted: dict[str, np.ndarray] = {
            row["key"]: np.array(row["counts"]) for row in kept["rows"]
        }
        for row in wanted:
            progress.update(task, description=f"{row.name}, {row.tokens} tokens")
            if row.key in counted:
                progress.advance(task, asked)
            else:
                start = time.perf_counter()
                asks = model
                if row.tuned:
                    asks = copy.deepcopy(model)
                    tune(asks, processor, row.reducer, row.tokens, row.tuned)
                each = []
                for seed, exam in zip(seeds, exams, strict=True):
                    with row.reducer.on(asks, processor, row.tokens, seed):
                        said = evaluate.responses(
                            *(asks, processor, exam, row.reducer.counts(row.tokens)),
                            progress=lambda count: progress.advance(task, count),
                        )
                    each.append(evaluate.counts(exam, said))
                counted[row.key] = np.concatenate(each)
                seconds = time.perf_counter() - start
                kept["rows"].append(_written(row, counted[row.key], seconds))
                _write(out, kept)
    kept["tables"] = [[row.part, row.name, row.tokens, row.key] for row in wanted]
    kept["quick"] = quick
    _write(out, kept)
    Console().print(table(kept))
    print(f"{out}: {len(kept['rows'])} rows of {asked} questions")


def _kept(out: Path, what: dict[str, Any]) -> dict[str, Any]:
    """What a run before this one left, if it measured the same."""
    new = {"environment": describe(os.cpu_count() or 1), **what, "rows": []}
    if out.exists():
        old = json.loads(out.read_text())
        same = old["environment"]["commit"] == new["environment"]["commit"]
        if same and all(old[name] == value for name, value in what.items()):
            return {**new, **{k: old[k] for k in ("rows", "training", "examples") if k in old}}
        sys.exit(f"{out} is of another model, commit or other images: give another --out")
    return new


def examples(model: Any, processor: Any, exam: evaluate.Exam) -> list[dict[str, Any]]:
    """A question on each of the first images, its answer with all tokens and with a quarter."""
    chosen = []
    for image in range(min(EXAMPLES, len(exam.pixels))):
        own = [q for i, q in exam.questions if i == image and q.instructions]
        # another family each time, as far as there is one
        wanted = FAMILIES[image % len(FAMILIES)]
        chosen += [(image, q) for q in sorted(own, key=lambda q: q.family != wanted)[:1]]
    asked = evaluate.Exam(exam.pixels, tuple(chosen))
    ours = NAMED["VMTC"]()
    told = [evaluate.responses(model, processor, asked, TOKENS)]
    with ours.on(model, processor, QUARTER):
        told.append(evaluate.responses(model, processor, asked, QUARTER))
    return [
        {"image": image, "question": q.text, "target": q.target, "all": whole, "quarter": few}
        for (image, q), whole, few in zip(chosen, *told, strict=True)
    ]


def _written(row: Row, counted: np.ndarray, seconds: float) -> dict[str, Any]:
    return {
        "key": row.key,
        "settings": row.reducer.settings,
        "tokens": row.tokens,
        "tuned": row.tuned,
        "placeholders": row.reducer.counts(row.tokens),
        "mean_tokens": round(row.reducer.mean_tokens(row.tokens), 2),
        "seconds": round(seconds, 1),
        "counts": _listed(counted),
    }


def _listed(counted: np.ndarray) -> list[Any]:
    """Whole numbers as such, which are most and shorter."""
    return [
        [[int(v) if v == int(v) else v for v in pair] for pair in image]
        for image in counted.tolist()
    ]


def _write(out: Path, kept: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_suffix(".new")
    # a row to a line
    body = json.dumps({k: v for k, v in kept.items() if k != "rows"}, indent=1)[:-2]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in kept["rows"])
    new.write_text(f'{body},\n "rows": [\n{lines}\n]}}\n')
    new.replace(out)


def table(kept: dict[str, Any]) -> Table:
    """Understanding and strict compliance of each row, in percent with their intervals."""
    by_key = {row["key"]: np.array(row["counts"]) for row in kept["rows"]}
    baseline = by_key[kept["tables"][0][3]]
    shown = Table("part", "reducer", "tokens", "understanding", "compliance")
    for part, name, tokens, key in kept["tables"]:
        result = evaluate.summary(by_key[key], baseline)
        cells = []
        for measure in ("understanding", "strict"):
            share = result[measure]
            low, high = 100 * share["low"], 100 * share["high"]
            cells.append(f"{100 * share['share']:.1f} ({low:.0f} to {high:.0f})")
        shown.add_row(part, name, str(tokens), *cells)
    return shown


if __name__ == "__main__":
    main()
