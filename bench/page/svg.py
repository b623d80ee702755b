"""A chart as SVG inside a page, whose colours and letters are the page's, and as PNG."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from .canvas import WIDTH, fold
from .style import COLOURS, MUTED

# the same bytes for the same chart: matplotlib draws ids by chance without a salt
_SVG: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "vmtc"}
# below a PNG, for where its numbers are from: inches of a line, and points of its letters
_FOOT, _LETTERS = 0.13, 7.0
_NAMES = {light: name for name, (light, _) in COLOURS.items()}


def svg(figure: Figure, prefix: str, label: str) -> str:
    """prefix: what makes its ids its own on the page; label: what one hears who sees no chart."""
    out = io.StringIO()
    with matplotlib.rc_context(_SVG):
        figure.savefig(out, format="svg", transparent=True)
    _, _, text = out.getvalue().partition("<svg ")
    viewbox = re.search(r'viewBox="[\d. ]+"', text)
    assert viewbox is not None
    _, _, body = text.partition(">")
    # the day is in it, and the same run is to give the same page
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    # a style sheet inside would hold for the whole page
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(|xlink:href=")#', rf"\1#{prefix}", body).replace("xlink:href", "href")
    body = re.sub(r"#[0-9a-f]{6}\b", _variable, body)
    body = re.sub(r"font-family: [^;\"]*;?|(font: [^;\"]*?px) '[^;\"]*", _font, body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg role="img" aria-label="{escape(label)}" {viewbox[0]}>{body.rstrip()}'


def _variable(found: re.Match[str]) -> str:
    name = _NAMES.get(found[0])
    return f"var(--{name})" if name else found[0]


def _font(found: re.Match[str]) -> str:
    """The page's own letters: those that the chart was measured with are wider."""
    return f"{found[1]} var(--letters)" if found[1] else ""


def png(figure: Figure, path: Path, source: str) -> None:
    """source: a line below the chart, of what the numbers were measured on."""
    width, height = figure.get_size_inches()
    lines = fold(source, WIDTH - 16, _LETTERS)
    foot = figure.text(
        0.02, 0, "\n".join(lines), fontsize=_LETTERS, color=MUTED, va="top", parse_math=False
    )
    below = _FOOT * len(lines) + 0.06
    figure.savefig(
        path,
        dpi=150,
        facecolor="white",
        bbox_inches=Bbox([[0, -below], [width, height]]),
        metadata={"Software": None},
    )
    foot.remove()
