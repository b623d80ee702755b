"""docs/quality.md's tables and pictures, from the file of a full run."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..report import headline
from .evaluate import questions, summary
from .grid import CONFIRMED
from .questions import FAMILIES

# of the budgets' lines: ours, those that choose or merge by what they see, those that do not look
_COLOURS = {
    "VMTC": "#c2410c",
    "VisionZip": "#1d4ed8",
    "ToMe": "#0f766e",
    "PruMerge": "#7c3aed",
    "PruMerge+": "#a78bfa",
    "FastV": "#0891b2",
    "downsampling": "#6b7280",
    "random": "#9ca3af",
    "strided": "#4b5563",
}
_DASHED = ("downsampling", "random", "strided")
_NAMES = {
    "open": "open, counting",
    "relations": "relations",
    "reading": "reading",
    "yes_no": "yes/no pairs",
    "choice": "multiple choice",
}


class Found:
    """A run: its rows by what they are called, and their summaries."""

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, json.loads(path.read_text())
        self.rows = {row["key"]: row for row in self.run["rows"]}
        counts = {key: np.array(row["counts"]) for key, row in self.rows.items()}
        self.plain = self.run["tables"][0][3]
        self.results = {key: summary(each, counts[self.plain]) for key, each in counts.items()}

    def of(self, part: str) -> list[tuple[str, int, str]]:
        """Name, tokens and key of a part's rows."""
        return [(name, tokens, key) for p, name, tokens, key in self.run["tables"] if p == part]

    def head(self, base: str = "all tokens") -> str:
        """What was measured with what; base: what changes are against."""
        images, seeds = self.run["images"], len(self.run["seeds"])
        machine = headline(self.run["environment"]).rpartition(", commit ")[0]
        return (
            f"{machine}, transformers {self.run['environment']['versions']['transformers']}; "
            f"{seeds} x {images} images of the test, percent and 95% intervals (bootstrap over"
            f" images); *change* is against {base} on the same images"
        )


def sections(found: Found) -> dict[str, str]:
    """Markdown by the name of its place."""
    return {name: write(found) for name, write in SECTIONS.items()}


def reached(found: Found) -> str:
    """The unreduced model on the test, and on scenes and wordings of the training."""
    columns = ["understanding", *FAMILIES, "strict", "loose", "each"]
    names = [_NAMES.get(c, c) for c in columns[:-3]]
    names += ["all instructions, strictly", "loosely", "each instruction"]
    test = found.results[found.plain]
    train = summary(np.array(found.run["training"]))
    lines = ["| | test | as in training |", "|---|---:|---:|"]
    for name, column in zip(names, columns, strict=True):
        lines.append(f"| {name} | {_cell(test[column])} | {_cell(train[column])} |")
    scenes = f"The second column is of {len(found.run['training'])} scenes, as in training."
    return "\n".join([f"{found.head()}. {scenes}", "", *lines])


def budgets(found: Found) -> str:
    """Every reducer at every budget."""
    rows = found.of("budgets")
    tokens = sorted({t for _, t, _ in rows}, reverse=True)[1:]
    cells = {(name, t): key for name, t, key in rows}
    names = list(dict.fromkeys(name for name, _, _ in rows if name != "none"))
    plain = found.results[found.plain]
    lines = [
        f"All {found.rows[found.plain]['tokens']} tokens: understanding"
        f" {_cell(plain['understanding'])}, all instructions strictly {_cell(plain['strict'])}.",
        "",
    ]
    for measure, title in (("understanding", "Understanding"), ("strict", "All instructions")):
        lines += [f"| {title} | " + " | ".join(f"{t} tokens" for t in tokens) + " |"]
        lines += ["|---|" + "---:|" * len(tokens)]
        best = {
            t: max(_share(found, cells[n, t], measure) for n in names if (n, t) in cells)
            for t in tokens
        }
        for name in names:
            told = [name]
            for t in tokens:
                key = cells.get((name, t))
                text = _cell(found.results[key][measure]) if key else ""
                if key and _share(found, key, measure) == best[t]:
                    text = f"**{text}**"
                told.append(text)
            lines.append("| " + " | ".join(told) + " |")
        lines.append("")
    return "\n".join(lines)


def families(found: Found) -> str:
    """The families at a quarter of the tokens."""
    rows = [(n, key) for n, t, key in found.of("budgets") if t in (36, 144)]
    lines = ["| | " + " | ".join(_NAMES[f] for f in FAMILIES) + " |", "|---|" + "---:|" * 5]
    for name, key in rows:
        cells = [f"{100 * found.results[key][f]['share']:.0f}" for f in FAMILIES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def variants(found: Found, part: str) -> str:
    """A part's rows with their change."""
    if not found.of(part):
        return "Not measured yet."
    lines = [
        "| | tokens | understanding | change | all instructions | change |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, tokens, key in found.of(part):
        result = found.results[key]
        cells = [name, str(tokens)]
        for measure in ("understanding", "strict"):
            cells += [_cell(result[measure]), _change(result[measure])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def confirmed(found: Found) -> str:
    """The defaults and their rivals on other images; change: against the first of each budget."""
    lines = [
        found.head("the first row of as many tokens"),
        "",
        "| | tokens | understanding | change | all instructions | change |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    first: dict[int, str] = {}
    for name, tokens, key in found.of(CONFIRMED):
        base = first.setdefault(tokens, key)
        result = summary(*(np.array(found.rows[k]["counts"]) for k in (key, base)))
        cells = [name, str(tokens)]
        for measure in ("understanding", "strict"):
            change = "" if key == base else _change(result[measure])
            cells += [_cell(result[measure]), change]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[Found], str]] = {
    "reached": reached,
    "budgets": budgets,
    "families": families,
    **{part: partial(variants, part=part) for part in ("vmtc", "cmai", "pilot", "tuned")},
}


def _share(found: Found, key: str, measure: str) -> float:
    return float(found.results[key][measure]["share"])


def _cell(share: dict[str, Any]) -> str:
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{100 * share['share']:.1f} [{low:.0f}, {high:.0f}]"


def _change(share: dict[str, Any]) -> str:
    change, low, high = (100 * value for value in share["change"])
    return f"{change:+.1f} [{low:+.0f}, {high:+.0f}]"


def draw(found: Found, folder: Path) -> None:
    """The pictures quality-world, quality-budgets and quality-pilot."""
    _draw_world(found, folder)
    _draw_budgets(found, folder)
    _draw_pilot(found, folder)


def _draw_world(found: Found, folder: Path) -> None:
    from matplotlib.figure import Figure

    told = found.run["examples"]
    pixels = questions(found.run["seeds"][0], 1 + max(each["image"] for each in told)).pixels
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    for axis, each in zip(figure.subplots(2, 4).flat, told, strict=False):
        axis.imshow(pixels[each["image"]])
        axis.set_xticks([])
        axis.set_yticks([])
        lines = [*textwrap.wrap(each["question"], 34), ""]
        for tokens, response in (("144", each["all"]), (" 36", each["quarter"])):
            shown = textwrap.shorten(response.replace("\n", " / "), 40, placeholder=" ...")
            lines += textwrap.wrap(f"{tokens} tokens: {shown}", 34, subsequent_indent=" " * 12)
        axis.set_xlabel("\n".join(lines), loc="left", fontsize=8, family="monospace")
    # texts are of any number of lines
    figure.savefig(
        folder / "quality-world.png", dpi=110, metadata=_source(found), bbox_inches="tight"
    )


def _draw_budgets(found: Found, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = found.of("budgets")
    plain = found.results[found.plain]
    whole = found.rows[found.plain]["tokens"]
    for axis, measure, title in (
        (left, "understanding", "Understanding, %"),
        (right, "strict", "All instructions followed, %"),
    ):
        for name, colour in _COLOURS.items():
            points = sorted(
                (found.rows[key]["mean_tokens"], found.results[key][measure])
                for n, _, key in rows
                if n == name
            )
            points.append((whole, plain[measure]))
            x = [t for t, _ in points]
            y = [100 * s["share"] for _, s in points]
            ours = name == "VMTC"
            axis.plot(
                *(x, y),
                color=colour,
                label=name,
                marker="o",
                markersize=6 if ours else 4,
                linewidth=2.6 if ours else 1.3,
                linestyle="--" if name in _DASHED else "-",
                zorder=3 if ours else 2,
            )
            if ours:
                low, high = ([100 * s[end] for _, s in points] for end in ("low", "high"))
                axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks([17, 36, 72, 144], ["17", "36", "72", "144"])
        axis.minorticks_off()
        axis.set_xlabel("visual tokens, mean over the language model's layers")
        axis.set_title(title, loc="left", fontsize=11)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9
    )
    figure.suptitle("A toy model on a toy world: what reducers leave", x=0.01, ha="left")
    figure.savefig(folder / "quality-budgets.png", dpi=130, metadata=_source(found))


def _draw_pilot(found: Found, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    whole = found.rows[found.plain]["tokens"]
    rows = [(whole, found.plain), *((t, key) for _, t, key in found.of("pilot"))]
    for measure, label, colour in (
        ("understanding", "understanding", "#1d4ed8"),
        ("strict", "all instructions followed", "#c2410c"),
    ):
        shares = [found.results[key][measure] for _, key in rows]
        y = np.array([100 * s["share"] for s in shares])
        ends = np.abs(np.array([[100 * s[e] for s in shares] for e in ("low", "high")]) - y)
        x = [t for t, _ in rows]
        axis.errorbar(x, y, yerr=ends, color=colour, label=label, marker="o", capsize=3)
    axis.set_xscale("log", base=2)
    axis.set_xticks([t for t, _ in rows], [str(t) for t, _ in rows])
    axis.minorticks_off()
    axis.set_ylim(0, 100)
    axis.set_xlabel("visual tokens after spatial downsampling")
    axis.set_ylabel("%")
    axis.set_title("Downsampling in a toy model, no fine-tuning", loc="left", fontsize=11)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(folder / "quality-pilot.png", dpi=130, metadata=_source(found))


def _source(found: Found) -> dict[str, str]:
    return {"Source": f"{found.path.name}, commit {found.run['environment']['commit']}"}
