"""What the commands have in common: reading options, refusing them in a line, and their tables.

Needs the extra ``demo``.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from . import _registry
from .answers import Answer
from .patches import InputError

# an answer's column or row
_HOW = {
    "unmodified": "unmodified",
    "VMTC": "with VMTC",
    "CMAI": "with CMAI",
    "VMTC and CMAI": "with VMTC and CMAI",
}


def number(name: str, text: str) -> int | float:
    """A count, or a share if it has a point."""
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise InputError(f"--{name} must be a count or a share, got {text!r}") from None


def index(text: str | None) -> int | str | None:
    """An index, or a name as it is."""
    return int(text) if text is not None and text.lstrip("-").isdecimal() else text


def check_out(out: Path) -> None:
    """Refuse before the work what cannot be written after it."""
    if out.suffix.lower() != ".png":
        raise InputError(f"--out must end in .png, got {out}")
    if out.is_dir() or not out.parent.is_dir():
        reason = "is a directory" if out.is_dir() else f"no directory {out.parent}"
        raise InputError(f"cannot write {out}: {reason}")


def checked(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a call whose refusals are the user's to mend."""
    try:
        return call(*args, **kwargs)
    except (ValueError, _registry.BackendError) as error:
        text = str(error).removeprefix("VMTCConfig: ").removeprefix("CMAIConfig: ")
        raise InputError(text) from error


def table(rows: Iterable[tuple[str, str]], title: str = "") -> Table:
    """Names in bold, and what is said of each as it is, whatever brackets it has."""
    made = Table(title=title or None, box=box.SIMPLE, show_header=False, title_justify="left")
    made.add_column(style="bold")
    made.add_column()
    for name, value in rows:
        made.add_row(name, Text(value))
    return made


def answered(found: list[Answer]) -> Table:
    """A row an answer, which is printed as it is, whatever brackets it has."""
    made = Table(box=box.SIMPLE)
    made.add_column("model", no_wrap=True)
    made.add_column("image tokens", justify="right")
    made.add_column("time", justify="right", no_wrap=True)
    made.add_column("answer", style="bold")
    for each in found:
        seconds = f"{1e3 * each.seconds:.0f} ms" if each.seconds < 1 else f"{each.seconds:.1f} s"
        made.add_row(_HOW[each.how], str(each.image_tokens), seconds, Text(_printable(each.text)))
    return made


def answer_rows(found: Iterable[Answer]) -> list[tuple[str, str]]:
    """Answers as facts; what keeps a model from answering is one of these."""
    rows: list[tuple[str, str]] = []
    try:
        for each in found:
            rows.append((f"answer, {_HOW[each.how]}", _printable(each.text)))
    except InputError as error:
        rows.append(("no answer", str(error)))
    return rows


def _printable(text: str) -> str:
    """What a model writes, without codes that a terminal would follow."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
