"""What the docs say of a whole model: tables, and the README's sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bench_llava import INHIBITED, MERGED, PLAIN
from .llava import SIZES
from .llava_rivals import FastV
from .record import Run


def section(run: Run) -> str:
    """Markdown of a run: what was measured, and a table for each number of images."""
    results = _results(run)
    params, facts = results[0]["params"], results[0]["facts"]
    own, real = (facts["encoder_share"][name] for name in (params["size"], "7b"))
    depth, deep = (SIZES[name].text[1] for name in (params["size"], "7b"))
    lines = [
        f"transformers {run.environment['versions']['transformers']}; LLaVA-1.5 of size"
        f" {params['size']}, {params['dtype']}, random weights"
        f" ({facts['weights_bytes'] / 2**30:.2f} GiB); the encoder does {own:.1%} of the products"
        f" up to the first token of an unmodified answer (7b: {real:.1%}). Prompts of"
        f" {params['before']} + {params['after']} words; times are of all images together, median"
        " [20th, 80th percentile]. *As many tokens* takes the first tokens without a look; what is"
        " above it, turn by turn, is the share of compression in the time to the first token."
        " VMTC leaves four fifths of its tokens as they are, CMAI inhibits in all layers."
        f" FastV keeps all tokens in {FastV.LAYER} of {depth} layers (7b: of {deep}). *Operators*:"
        " importance and merge alone. The cache is all it holds, CMAI's state included; the peak"
        " is of tensors beside the weights, up to the first token.",
        "",
    ]
    for batch in dict.fromkeys(r["params"]["B"] for r in results):
        lines += _table(batch, [r for r in results if r["params"]["B"] == batch])
    return "\n".join(lines)


def sentence(run: Run) -> str:
    """What fewer tokens give, of the number that the aims are about."""
    judged = [r for r in _results(run) if r["targets"]]
    params, facts = judged[0]["params"], judged[0]["facts"]["rows"]
    parts = ", ".join(
        f"{faster(result, MERGED):.1f} times sooner for {images(result['params']['B'])}"
        f" ({faster(result, INHIBITED):.1f} with CMAI in all layers on top)"
        for result in judged
    )
    merged, inhibited = (
        facts[name]["cache_bytes"] / facts[PLAIN]["cache_bytes"] for name in (MERGED, INHIBITED)
    )
    return (
        f"With {params['tokens']} of {params['of']} tokens a LLaVA-1.5 of size {params['size']} and"
        f" random weights gives its first token {parts}, and its cache shrinks to {merged:.0%}"
        f" ({inhibited:.0%} with CMAI's state)"
    )


def faster(result: dict[str, Any], name: str) -> float:
    """Of the median time to the first token, against the unmodified model."""
    ms = {row["name"]: row["ms"]["median"] for row in result["rows"] if row["ms"]}
    return float(ms[PLAIN] / ms[name])


def images(count: int) -> str:
    return "one image" if count == 1 else f"{count} images"


def _results(run: Run) -> Sequence[dict[str, Any]]:
    return [r for r in run.results if r["suite"] == "llava" and "rows" in r]


def _table(batch: int, results: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"**{images(batch).capitalize()}**",
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
