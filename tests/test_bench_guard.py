"""The guard: what counts as moved, what is refused, and how callgrind is read."""
# the extras of the harness may be missing: it is imported after a look
# ruff: noqa: E402

from __future__ import annotations

import io
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

# bench is a folder of the project and not installed
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
pytest.importorskip("rich")
pytest.importorskip("typer")

from rich.console import Console

from bench import guard, guard_calls, guard_parts
from bench.guard_parts import Broken, Measured, NotHere, Part
from vmtc_kernels import _registry

STORED = json.loads(guard.STORED.read_text())


@pytest.mark.parametrize(
    ("fact", "old", "new", "said"),
    [
        ("own", 1000, 1030, ""),
        ("own", 1000, 1031, "own 1,000 -> 1,031 (+3.1%)"),
        ("own", 1000, 970, ""),
        ("own", 1000, 969, "own 1,000 -> 969 (-3.1%), improved"),
        ("torch", 1000, 1100, ""),
        ("torch", 1000, 1101, "torch 1,000 -> 1,101 (+10.1%)"),
        ("registers", 100, 104, "registers 100 -> 104 (+4.0%)"),
        ("spill_stores", 1000, 1001, "spill_stores 1,000 -> 1,001 (+0.1%)"),
        ("spill_loads", 0, 4, "spill_loads 0 -> 4"),
        ("stack", 8, 0, "stack 8 -> 0 (-100.0%), improved"),
        ("HGMMA", 0, 1, "HGMMA 0 -> 1"),
        ("HMMA", 64, 32, "HMMA 64 -> 32 (-50.0%)"),
        ("HMMA", 64, 65, ""),
    ],
)
def test_what_moved(fact: str, old: int, new: int, said: str) -> None:
    assert guard.change(fact, old, new) == said


def test_rows_that_moved_are_named() -> None:
    old = {"a": {"own": 100, "torch": 5}, "b": {"own": 100}, "c": {"own": 1}}
    new = {"a": {"own": 110, "torch": 9}, "b": {"own": 101}, "d": {"own": 1}}
    assert guard.moved(old, new) == [
        "a: own 100 -> 110 (+10.0%), torch 5 -> 9 (+80.0%)",
        "c: gone",
        "d: new",
    ]
    # what is zero is not written
    tensor_cores = ({"k": {"code": 16, "HMMA": 4}}, {"k": {"code": 16, "HGMMA": 1}})
    assert guard.moved(*tensor_cores) == ["k: HMMA 4 -> 0 (-100.0%), HGMMA 0 -> 1"]


class Guarded:
    """Calls of guard.guard on made-up parts and a file of its own.

    measured: how many parts were.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.measured = path, 0

    def part(self, rows: Any, known: dict[str, str] | None = None, **later: str) -> Part:
        """rows: or what is raised instead, for tools that are missing before it is measured."""
        facts = {"compiler": "12", **(known or {})}

        def made_with() -> dict[str, str]:
            if isinstance(rows, NotHere):
                raise rows
            return facts

        def measure(jobs: int) -> Measured:
            self.measured += 1
            if isinstance(rows, Exception):
                raise rows
            return Measured({**facts, **later}, rows)

        return Part(made_with, measure)

    def __call__(self, update: bool = False, **parts: Part) -> tuple[int, str]:
        out = io.StringIO()
        status = guard.guard(parts, self.path, Console(file=out, width=60), update=update)
        return status, out.getvalue()


@pytest.fixture
def guarded(tmp_path: Path) -> Guarded:
    """With a file of one part, ``a``."""
    made = Guarded(tmp_path / "guard.json")
    assert made(update=True, a=made.part({"y": {"own": 7}, "x [red]": {"own": 100}}))[0] == 0
    made.measured = 0
    return made


def test_rows_as_stored_pass(guarded: Guarded) -> None:
    status, text = guarded(a=guarded.part({"x [red]": {"own": 103}, "y": {"own": 7}}))
    assert status == 0 and "a: 2 rows" in text and "0 moved" in text
    assert "guard-update" not in text


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ({"x [red]": {"own": 104}, "y": {"own": 7}}, "x [red]: own 100 -> 104 (+4.0%)"),
        ({"x [red]": {"own": 96}, "y": {"own": 7}}, "x [red]: own 100 -> 96 (-4.0%), improved"),
        ({"x [red]": {"own": 100}}, "y: gone"),
        ({"x [red]": {"own": 100}, "y": {"own": 7}, "z": {"own": 1}}, "z: new"),
    ],
)
def test_a_row_that_moved_fails_until_it_is_stored(guarded: Guarded, rows: Any, told: str) -> None:
    part = guarded.part(rows)
    before = guarded.path.read_text()
    status, text = guarded(a=part)
    assert status == 1 and told in text and "make guard-update" in text
    assert guarded.path.read_text() == before
    status, text = guarded(update=True, a=part)
    assert status == 0 and told in text and "guard-update" not in text
    assert guarded(a=part)[0] == 0


def test_another_compiler_is_refused_before_anything_is_counted(guarded: Guarded) -> None:
    other = guarded.part({"x [red]": {"own": 90}, "y": {"own": 7}}, {"compiler": "13"})
    status, text = guarded(a=other)
    assert status == 2 and not guarded.measured
    assert "a: not judged" in text and "compiler 12 there, 13 here" in text
    assert "make guard-update" in text
    # numbers of two compilers are not compared when they are stored either
    status, text = guarded(update=True, a=other)
    assert status == 0 and "0 moved" in text
    assert guarded(a=other)[0] == 0


def test_what_is_only_known_afterwards_is_refused_too(guarded: Guarded) -> None:
    status, text = guarded(a=guarded.part({}, processor="AVX512"))
    assert status == 2 and "processor None there, AVX512 here" in text


def test_what_is_missing_is_said(guarded: Guarded) -> None:
    absent = guarded.part(NotHere("valgrind is not on PATH (Debian package valgrind)"))
    before = guarded.path.read_text()
    for update in (False, True):
        status, text = guarded(a=absent, update=update)
        assert status == 2 and "a: not judged: valgrind is not on PATH" in text
        assert not guarded.measured
    status, text = guarded(b=guarded.part({}))
    assert status == 2 and "b: not judged: nothing is stored of it" in text
    status, text = guarded(update=True, a=guarded.part(Broken("k does not compile")))
    assert status == 1 and "a: k does not compile" in text
    assert guarded.path.read_text() == before


def test_what_moved_outweighs_what_was_not_judged(guarded: Guarded) -> None:
    parts = {"a": guarded.part({}), "b": guarded.part({})}
    for order in (("a", "b"), ("b", "a")):
        status, text = guarded(**{name: parts[name] for name in order})
        assert status == 1 and "y: gone" in text and "b: not judged" in text


def test_an_update_of_one_part_keeps_the_others(guarded: Guarded) -> None:
    guarded(update=True, b=guarded.part({"k": {"code": 16}}))
    stored = json.loads(guarded.path.read_text())
    assert stored["a"]["rows"] == {"x [red]": {"own": 100}, "y": {"own": 7}}
    assert stored["b"] == {"made_with": {"compiler": "12"}, "rows": {"k": {"code": 16}}}
    assert '   "x [red]": {"own": 100},\n   "y": {"own": 7}\n' in guarded.path.read_text()


def test_the_file_in_the_repository_is_as_it_would_be_written(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    guard.write(path, {name: Measured(**part) for name, part in STORED.items()})
    assert path.read_text() == guard.STORED.read_text()


DUMP = """\
# callgrind format
version: 1
cmd:  python -m some.script --ob=(9) /no/such.so
positions: line
events: Ir
summary: 1000

ob=(1) /usr/lib/libpython3.so
fl=(1) ceval.c
fn=(1) run
12 5
cob=(2) /some/where/_C.so
cfi=(2) ???
cfn=(2) vmtc::kernel(int, long) const
calls=1 0
+3 700
* 2

ob=(2)
fl=(2)
fn=(2)
0 100
fi=(3) vector.h
+7 20
-7 3
cob=(3) /lib/libtorch_cpu.so
cfn=(4) sgemm
calls=6 0
0 500
fe=(2)
0 4
cfn=(5) vmtc::helper()
calls=1 0
* 77

fn=(5)
0 77

ob=(3)
fn=(4)
0 500

totals: 711
"""


def test_the_cost_of_functions_is_summed_by_the_file_that_holds_them() -> None:
    assert guard_parts.by_object(DUMP) == {
        "libpython3.so": 5 + 2,
        "_C.so": 100 + 20 + 3 + 4 + 77,
        "libtorch_cpu.so": 500,
    }


def test_ours_is_told_from_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        __file__ = "/any/where/_C.so"

    monkeypatch.setattr(_registry, "_C", Module)
    assert guard_parts.counts(DUMP) == {"own": 204, "torch": 500}
    large = DUMP.replace("0 100\n", "0 1234567\n").replace("\n0 500\n\n", "\n0 56789\n\n")
    assert guard_parts.counts(large) == {"own": 1235000, "torch": 57000}


def test_a_call_is_counted() -> None:
    try:
        guard_parts.cpu_tools()
    except NotHere as reason:
        pytest.skip(str(reason))
    got = guard_parts.count_instructions("token_importance: cls, f32")
    if platform.machine() == "x86_64":
        # on any: valgrind shows a processor of its own making
        assert got.made_with["processor"] == "AVX2"
    ((name, row),) = got.rows.items()
    assert name == "token_importance: cls, f32"
    # two images, four heads, 197 keys of 64 numbers, eight at a time
    products = 2 * 4 * 197 * 64 // 8
    assert products < row["own"] < 20 * products
    # what else is done is no more than to call it
    assert row["torch"] < 100_000


def test_tools_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_C", None)
    with pytest.raises(NotHere, match=r"Debian package g\+\+"):
        guard_parts.cpu_tools()
    monkeypatch.setattr(_registry, "_C", object())
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(NotHere, match="Debian package valgrind"):
        guard_parts.cpu_tools()
    pytest.importorskip("triton")
    with pytest.raises(NotHere, match="Debian package nvidia-cuda-toolkit"):
        guard_parts.cuda_tools()
    monkeypatch.setattr(shutil, "which", lambda name, **__: name if name == "nvcc" else None)
    with pytest.raises(NotHere, match="Debian package binutils"):
        guard_parts.cuda_tools()


def test_a_kernel_that_does_not_compile_is_no_row() -> None:
    row = {"file": "a.cu", "kernel": "a", "arch": "90a", "error": "no such type"}
    with pytest.raises(Broken, match=r"a\.cu a sm_90a: no such type"):
        guard_parts.code([row], guard_parts.cuda_name)


def test_every_operator_with_a_kernel_for_cpus_is_stored() -> None:
    stored = STORED["instructions"]["rows"]
    called = guard_calls.names()
    assert len(called) == len(set(called))
    assert sorted(stored) == sorted(called)
    sources = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    registered = {name for name in _registry.OPERATORS if name in sources}
    assert {name.partition(":")[0] for name in stored} == registered
    if _registry._C:
        with_kernel = {n for n, op in _registry.OPERATORS.items() if "cpu" in op.implementations}
        assert registered == with_kernel


def test_every_triton_kernel_is_stored_for_every_architecture() -> None:
    pytest.importorskip("triton")
    from bench import aot_calls

    for arch in guard_parts.ARCHS:
        names = [name.split()[:2] for name in STORED["triton"]["rows"]]
        found = {kernel for kernel, chip in names if chip == f"sm_{arch}"}
        assert found == aot_calls.kernels()


def test_every_file_of_cuda_kernels_is_stored() -> None:
    sources = (ROOT / "csrc" / "cuda").glob("*.cu")
    with_kernels = {path.name for path in sources if "__global__" in path.read_text()}
    assert {name.split()[0] for name in STORED["cuda"]["rows"]} == with_kernels
