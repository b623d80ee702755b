"""``python -m bench.guard``: what can be counted of our kernels without a GPU, against guard.json.

instructions: of each call in guard_calls.py, one thread, as callgrind counts them: ``own`` in
    vmtc_kernels._C, ``torch`` in what that calls, torch and its BLAS.
triton, cuda: what the compilers make of the Triton kernels of typical calls, and of the CUDA C++
    kernels (see aot.py).

A row that moved by more than 3% fails, for better or worse, so that the file stays true; no count
is a time. Exit status: 1 where a row moved, else 2 where a part could not be judged.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .guard_parts import AOT, PARTS, Broken, Facts, Measured, NotHere, Part, Row

STORED = Path(__file__).with_name("guard.json")

# share of the old number beyond which a row has moved; what was 0, and is not, always has
LIMIT = 0.03
# what BLAS does also depends on where its operands lie
LIMITS = {"torch": 0.1, "stack": 0.0, "spill_stores": 0.0, "spill_loads": 0.0}


def moved(old: dict[str, Row], new: dict[str, Row]) -> list[str]:
    """A line for each row that is gone, new, or has moved beyond a limit."""
    lines = [f"{name}: gone" for name in old if name not in new]
    lines += [f"{name}: new" for name in new if name not in old]
    for name in old.keys() & new.keys():
        facts = dict.fromkeys([*old[name], *new[name]])
        changes = (change(fact, old[name].get(fact, 0), new[name].get(fact, 0)) for fact in facts)
        if said := [text for text in changes if text]:
            lines.append(f"{name}: {', '.join(said)}")
    return sorted(lines)


def change(fact: str, old: int, new: int) -> str:
    """What there is to say of a number; empty where it did not move."""
    if abs(new - old) <= LIMITS.get(fact, LIMIT) * old:
        return ""
    percent = f" ({(new - old) / old:+.1%})" if old else ""
    # more of an instruction of tensor cores, which have names in capitals, is not worse
    better = ", improved" if new < old and fact.islower() else ""
    return f"{fact} {old:,} -> {new:,}{percent}{better}"


def refuse(stored: Measured, here: Facts) -> None:
    """Raises where the stored rows were made with something else."""
    pairs = {key: (stored.made_with.get(key), value) for key, value in here.items()}
    if others := [f"{key} {a} there, {b} here" for key, (a, b) in pairs.items() if a != b]:
        raise NotHere(
            f"the stored rows were made otherwise: {'; '.join(others)}. Use the same, or run"
            " make guard-update here on the commit to compare with, and then make guard"
        )


def examine(part: Part, stored: Measured | None, jobs: int) -> tuple[Measured, list[str]]:
    if not stored:
        raise NotHere("nothing is stored of it: make guard-update")
    refuse(stored, part.made_with())
    measured = part.measure(jobs)
    refuse(stored, measured.made_with)
    return measured, moved(stored.rows, measured.rows)


def renew(part: Part, stored: Measured | None, jobs: int) -> tuple[Measured, list[str]]:
    part.made_with()
    measured = part.measure(jobs)
    comparable = stored and stored.made_with == measured.made_with
    return measured, moved(stored.rows, measured.rows) if stored and comparable else []


def guard(
    parts: dict[str, Part], path: Path, console: Console, *, update: bool = False, jobs: int = 2
) -> int:
    """The exit status of comparing these parts with what ``path`` holds, or writing them there."""
    stored = {name: Measured(**part) for name, part in read(path).items()}
    statuses, anything = set(), False
    for name, part in parts.items():
        start = time.monotonic()
        try:
            with console.status(f"{name}, some minutes"):
                measured, lines = (renew if update else examine)(part, stored.get(name), jobs)
        except (NotHere, Broken) as error:
            statuses.add(2 if isinstance(error, NotHere) else 1)
            say(console, f"{name}: {'not judged: ' * isinstance(error, NotHere)}{error}", "red")
            continue
        if update:
            stored[name] = measured
            write(path, stored)
        elif lines:
            statuses.add(1)
        anything = anything or bool(lines)
        took = f"{time.monotonic() - start:.0f} s"
        say(console, f"{name}: {len(measured.rows)} rows in {took}, {len(lines)} moved")
        for line in lines:
            say(console, f"  {line}", "" if update else "red")
    if anything and not update:
        say(console, "if that is meant: make guard-update, and commit bench/guard.json with it")
    return min(statuses, default=0)


def say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, parts: dict[str, Measured]) -> None:
    """A row a line, so that a diff tells what moved."""
    texts = []
    for name, part in parts.items():
        rows = [f"   {json.dumps(row)}: {json.dumps(part.rows[row])}" for row in sorted(part.rows)]
        made_with = json.dumps(part.made_with, indent=3).replace("\n}", "\n  }")
        body = ",\n".join(rows)
        texts.append(f' "{name}": {{\n  "made_with": {made_with},\n  "rows": {{\n{body}\n  }}\n }}')
    path.write_text("{\n" + ",\n".join(texts) + "\n}\n")


def main(
    update: Annotated[bool, typer.Option("--update", help="write guard.json")] = False,
    only: Annotated[str, typer.Option(help="instructions, aot, or of that triton or cuda")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="compilers at a time")] = 2,
) -> None:
    """Compare what can be counted of the kernels without a GPU with what is stored."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    groups = {"": tuple(PARTS), "aot": AOT, **{name: (name,) for name in PARTS}}
    if only not in groups:
        raise typer.BadParameter(f"parts are {', '.join(filter(None, groups))}, got {only}")
    chosen = {name: PARTS[name] for name in groups[only]}
    raise typer.Exit(guard(chosen, STORED, Console(), update=update, jobs=jobs))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app(prog_name="python -m bench.guard")
