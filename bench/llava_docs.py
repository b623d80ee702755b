"""``python -m bench.llava_docs JSON``: put the tables of a kept run into docs/benchmarks.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .bench_llava import PLAIN
from .environment import QUIET, ROOT
from .llava import SIZES
from .llava_rivals import FastV
from .report import headline

BEGIN, END = "<!-- llava:begin -->\n", "<!-- llava:end -->\n"


def main(path: Path, page: Path = ROOT / "docs" / "benchmarks.md") -> None:
    text = page.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{page} has no place for the tables: lines {BEGIN.strip()} and {END.strip()}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(before + BEGIN + section(path) + END + after)


def section(path: Path) -> str:
    """Markdown of a run: what was measured where, and a table for each number of images."""
    record = json.loads(path.read_text())
    environment = record["environment"]
    results = [r for r in record["results"] if r["suite"] == "llava" and "rows" in r]
    disturbed = [r["params"] for r in results if (r["others_busy"] or 0) > QUIET]
    if disturbed or environment["dirty"]:
        sys.exit(f"{path} is not for the docs: dirty tree {environment['dirty']}, {disturbed=}")
    params, facts = results[0]["params"], results[0]["facts"]
    own, real = (facts["encoder_share"][name] for name in (params["size"], "7b"))
    depth, deep = (SIZES[name].text[1] for name in (params["size"], "7b"))
    lines = [
        f"{headline(environment)}, transformers {environment['versions']['transformers']}:"
        f" [{path.name}](../{path.resolve().relative_to(ROOT)}). LLaVA-1.5 of size"
        f" {params['size']}, {params['dtype']}, random weights"
        f" ({facts['weights_bytes'] / 2**30:.2f} GiB); the encoder does {own:.1%} of the products"
        f" up to the first token of an unmodified answer (7b: {real:.1%}). Prompts of"
        f" {params['before']} + {params['after']} words; times are of all images together, median"
        " [20th, 80th percentile]. *As many tokens* takes the first tokens without a look; what is"
        " above it, turn by turn, is the share of compression in the time to the first token."
        f" FastV keeps all tokens in {FastV.LAYER} of {depth} layers (7b: of {deep}). *Operators*:"
        " importance and merge alone. The cache is all it holds, CMAI's state included; the peak"
        " is of tensors beside the weights, up to the first token.",
        "",
    ]
    for batch in dict.fromkeys(r["params"]["B"] for r in results):
        lines += _table(batch, [r for r in results if r["params"]["B"] == batch])
    return "\n".join(lines)


def _table(batch: int, results: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"**{batch} {'image' if batch == 1 else 'images'}**",
        "",
        "| visual tokens | | first token, ms | faster | above as many tokens | operators, ms |"
        " tokens/s | cache, MiB | peak, MiB |",
        "|---|---" + "|---:" * 7 + "|",
    ]
    for i, result in enumerate(sorted(results, key=lambda r: -r["params"]["tokens"])):
        rows = {row["name"]: row for row in result["rows"]}
        order = [PLAIN] * (i == 0) + [name for name in rows if name != PLAIN]
        lines += [_line(rows[name], rows[PLAIN], result, batch) for name in order]
    return [*lines, ""]


def _line(row: dict[str, Any], plain: dict[str, Any], result: dict[str, Any], batch: int) -> str:
    params, facts = result["params"], result["facts"]["rows"].get(row["name"])
    cells = [str(params["of" if row["name"] == PLAIN else "tokens"]), row["name"]]
    if facts is None:
        return "| " + " | ".join([*cells, row["status"], *[""] * 6]) + " |"
    median, low, high = (f"{batch * row['ms'][key]:.1f}" for key in ("median", "p20", "p80"))
    faster = plain["ms"] and f"{plain['ms']['median'] / row['ms']['median']:.2f}x"
    over, operators = facts.get("over_least"), facts.get("operators_ms")
    cells += [
        f"{median} [{low}, {high}]",
        faster or "",
        f"{over['median']:.1%} [{over['p20']:.1%}, {over['p80']:.1%}]" if over else "",
        f"{operators['median']:.2f}" if operators else "",
        f"{facts['tokens_per_second']:.0f}",
        f"{facts['cache_bytes'] / 2**20:.1f}",
        f"{facts['peak_bytes'] / 2**20:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
