"""``python -m bench.readme JSON``: put the tables of a kept run into README.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .environment import QUIET, ROOT
from .report import headline, milliseconds

BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->\n"


def main(path: Path) -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(before + BEGIN + section(path) + END + after)


def section(path: Path) -> str:
    """Markdown of a run: what was measured where, and a table for each suite."""
    record = json.loads(path.read_text())
    environment = record["environment"]
    # on a GPU a set-up may have failed as a whole
    results = [result for result in record["results"] if "rows" in result]
    disturbed = [r["params"] for r in results if (r["others_busy"] or 0) > QUIET]
    if disturbed or environment["dirty"]:
        sys.exit(f"{path} is not for the README: dirty tree {environment['dirty']}, {disturbed=}")
    lines = [
        f"{headline(environment)}:"
        f" [{path.name}]({path.resolve().relative_to(ROOT)}). Milliseconds an image or sequence,"
        " median [20th, 80th percentile]; every result was checked against the reference before it"
        " was timed. The rivals of merge_tokens only cluster tokens already gathered; ours selects,"
        " clusters and merges. SDPA only attends; ours scores, inhibits and attends.",
        "",
    ]
    for suite in dict.fromkeys(result["suite"] for result in results):
        lines += _table([result for result in results if result["suite"] == suite])
    return "\n".join(lines)


def _table(results: list[dict[str, Any]]) -> list[str]:
    names = [row["name"] for row in results[0]["rows"]]
    told = {key for key in results[0]["params"] if len({r["params"][key] for r in results}) > 1}
    common = ", ".join(f"{k}={v}" for k, v in results[0]["params"].items() if k not in told)
    lines = [f"**{results[0]['suite']}**, {common}", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for result in results:
        setup = " ".join(
            f"{key}={result['params'][key]}" for key in result["params"] if key in told
        )
        cells = [_cell(row) for row in result["rows"]]
        lines.append("| " + " | ".join([setup, *cells]) + " |")
    return [*lines, ""]


def _cell(row: dict[str, Any]) -> str:
    if not row["ms"]:
        return row["status"]
    median, low, high = (milliseconds(row["ms"][key]) for key in ("median", "p20", "p80"))
    return f"{median} [{low}, {high}]"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
