"""What the parts of the report are written with: escaped text, tables, charts and their files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import svg


@dataclass(frozen=True)
class Html:
    """Text that is markup already; all else is escaped where it is put into the page."""

    text: str

    def __str__(self) -> str:
        return self.text


def safe(value: Any) -> str:
    return value.text if isinstance(value, Html) else escape(str(value))


def tag(name: str, *content: Any, **attributes: str) -> Html:
    """``class_`` stands for class, ``aria_label`` for aria-label."""
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value
    )
    return Html(f"<{name}{named}>{''.join(safe(part) for part in content)}</{name}>")


def join(parts: Sequence[Any]) -> Html:
    return Html("\n".join(safe(part) for part in parts))


def items(lines: Sequence[Any], **attributes: str) -> Html:
    return tag("ul", *(tag("li", line) for line in lines), **attributes) if lines else Html("")


@dataclass(frozen=True)
class Column:
    name: str
    # of its cells: num, name, long
    class_: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table; its first cell heads it. A group heads the lines below it."""

    cells: Sequence[Any]
    class_: str = ""
    group: bool = False


def table(columns: Sequence[Column], lines: Sequence[Line], caption: str) -> Html:
    """In a box of its own that scrolls sideways, also by keys."""
    head = (tag("th", c.name, scope="col", class_=c.class_) for c in columns)
    body = [_line(columns, line) for line in lines]
    whole = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", *head)),
        tag("tbody", join(body)),
    )
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _line(columns: Sequence[Column], line: Line) -> Html:
    if line.group:
        head = tag("th", tag("span", line.cells[0]), scope="rowgroup", colspan=str(len(columns)))
        return tag("tr", head, class_="group")
    cells = [
        tag("td", cell, class_=column.class_) if i else tag("th", cell, scope="row", class_="name")
        for i, (column, cell) in enumerate(zip(columns, line.cells, strict=True))
    ]
    return tag("tr", *cells, class_=line.class_)


@dataclass
class Album:
    """The charts of a run: each goes into the page and beside it, as a PNG of its own."""

    out: Path
    stem: str
    # what the numbers were measured on, for who sees a PNG alone
    source: str
    # names of files, of all runs of the page
    taken: set[str]

    def add(self, figure: Figure, what: str, heard: str, caption: Any = "") -> Html:
        """heard: what the chart shows, in words."""
        name = self._name(what)
        svg.png(figure, self.out / f"{name}.png", self.source)
        drawn = Html(svg.svg(figure, f"{name}-", heard))
        below = tag("figcaption", caption) if str(caption) else ""
        return tag("figure", drawn, below, class_="chart")

    def _name(self, what: str) -> str:
        """Safe as a file's name and as an id, and its own."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.stem}-{what}").strip("-.")[:120]
        free, count = name, 1
        while free in self.taken:
            count += 1
            free = f"{name}-{count}"
        self.taken.add(free)
        return free
