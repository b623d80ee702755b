"""What the compilers make of the GPU kernels, without a GPU: bench/aot.py on typical calls.

Compiled here are the Triton kernels of bfloat16 calls of CLIP-L's size for three architectures and
the CUDA C++ kernels for one; ``python -m bench.aot`` compiles all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]
# bytes of shared memory a block may have. 8.6 and 8.9 take the tiles of 8.0 and have least
SHARED = {"80": 99 * 1024, "90": 227 * 1024, "100": 227 * 1024}

TEXT_ROWS = ("focus_logits.text_softmax_kernel", "focus_logits.text_attention_kernel")

Row = dict[str, Any]


def compiled(folder: Path, *options: str) -> dict[str, Any]:
    """By the command, in a process of its own: interpreted kernels cannot be compiled."""
    path = folder / "aot.json"
    command = [sys.executable, "-m", "bench.aot", *options, "--json", str(path)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    # it fails where a kernel does not compile, which is a test of its own
    assert path.exists(), run.stdout + run.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled(tmp_path_factory.mktemp("aot"), "--quick", "--gpus", "90a")


@pytest.fixture(scope="module")
def triton_rows(seen: dict[str, Any]) -> list[Row]:
    return [row for row in seen["triton"] if "error" not in row]


@pytest.fixture(scope="module")
def cuda_rows(seen: dict[str, Any]) -> list[Row]:
    if seen["missing"]:
        pytest.skip(seen["missing"])
    return [row for row in seen["cuda"] if "error" not in row]


def of(rows: list[Row], *kernels: str) -> list[Row]:
    """The rows of these kernels, of each at least one for every architecture."""
    found = [row for row in rows if row["kernel"].partition("<")[0] in kernels]
    there = {(row["kernel"].partition("<")[0], row["arch"]) for row in found}
    assert there == {(kernel, row["arch"]) for kernel in kernels for row in rows}
    return found


def told(row: Row) -> str:
    return f"{row['kernel']} sm_{row['arch']} {row.get('arguments', '')}"


def test_every_kernel_compiles(seen: dict[str, Any]) -> None:
    failed = [told(row) + row["error"] for row in seen["triton"] + seen["cuda"] if "error" in row]
    assert not failed, "\n".join(failed)
    for arch in SHARED:
        assert {row["kernel"] for row in seen["triton"] if row["arch"] == arch} == set(
            seen["kernels"]
        )


def test_a_new_batch_or_number_of_tokens_compiles_nothing(seen: dict[str, Any]) -> None:
    first: dict[tuple[str, ...], Row] = {}
    compared = 0
    for call in seen["calls"]:
        former = first.setdefault((call["op"], call["kind"], call["arch"]), call)
        compared += former is not call
        new = set(call["variants"]) ^ set(former["variants"])
        said = "\n".join(seen["variants"][i] for i in new)
        assert not new, f"{call['op']} {call['kind']}: {former['sizes']}, {call['sizes']}\n{said}"
    assert compared > 100


def spilled(seen: dict[str, Any]) -> list[tuple[str, int, dict[str, int]]]:
    version = tuple(int(part) for part in seen["tools"]["triton"].split(".")[:2])
    # the tiles were chosen with Triton 3.9; an older one hands out registers otherwise
    allowed = 0 if version >= (3, 9) else 96
    return [
        (told(row), row["stack_bytes"], row["local_memory"])
        for row in seen["triton"]
        if "error" not in row
        and (row["stack_bytes"] > allowed or (row["local_memory"] and not allowed))
    ]


def test_nothing_spills(seen: dict[str, Any]) -> None:
    assert not spilled(seen)


def test_pairs_of_any_rows_do_not_spill(tmp_path: Path) -> None:
    seen = compiled(tmp_path, "--kernels", "pairs", "--arch", "90", "--gpus", "")
    assert {row["arguments"]["UNIT"] for row in seen["triton"]} == {"1", "4", "8"}
    assert not spilled(seen)


def test_shared_memory_fits_every_chip(triton_rows: list[Row]) -> None:
    for row in triton_rows:
        shared = row["static_shared_bytes"] + row["dynamic_shared_bytes"]
        assert shared <= SHARED[row["arch"]], told(row)


def test_half_types_are_multiplied_by_tensor_cores(triton_rows: list[Row]) -> None:
    received = ("received.query_softmax_kernel", "received.received_kernel")
    few = ("focus_decode.few_logits_kernel", "focus_values.few_values_kernel")
    for row in of(triton_rows, "pairs.pairs_kernel", "direct.assign_kernel", *received, *few):
        assert row["tensor_cores"], told(row)
    # where a tile is large enough for them by the newest instructions
    newest = {"80": "HMMA", "90": "HGMMA", "100": "UTCHMMA"}
    for row in of(triton_rows, "flash.flash_kernel", *TEXT_ROWS):
        assert newest[row["arch"]] in row["tensor_cores"], (told(row), row["tensor_cores"])
    for row in of(triton_rows, "pairs.pairs_kernel", *received):
        if int(row["arguments"].get("BLOCK_M") or row["arguments"]["BLOCK_R"]) >= 64:
            assert newest[row["arch"]] in row["tensor_cores"], (told(row), row["tensor_cores"])


@pytest.mark.parametrize(
    ("kernel", "load"),
    [
        ("token_importance.cls_logits_kernel", "LDG.128"),
        ("segments.mean_kernel", "LDG.128"),
        ("direct.norms_kernel", "LDG.128"),
        ("pairs.pairs_kernel", "LDGSTS.128"),
        ("received.query_softmax_kernel", "LDGSTS.128"),
        ("received.received_kernel", "LDGSTS.128"),
        ("flash.flash_kernel", "LDGSTS.128"),
        ("focus_logits.text_softmax_kernel", "LDGSTS.128"),
        ("focus_logits.text_attention_kernel", "LDGSTS.128"),
        ("focus_decode.few_logits_kernel", "LDG.128"),
        ("focus_values.few_values_kernel", "LDGSTS.128"),
    ],
)
def test_tokens_are_read_16_bytes_at_a_time(triton_rows: list[Row], kernel: str, load: str) -> None:
    for row in of(triton_rows, kernel):
        memory = row["global_memory"]
        assert memory.get(load, 0) >= 2, (told(row), memory)
        # an element by itself is a score, or of tokens so close that they are looked at again
        given = row["arguments"]
        scores = given.get("scores_ptr", "").startswith("*bf16")
        again = kernel == "pairs.pairs_kernel" and given["EUCLIDEAN"] == "True"
        assert scores or again or "LDG.16" not in memory, (told(row), memory)


def test_pairs_are_written_16_bytes_at_a_time(triton_rows: list[Row]) -> None:
    for row in of(triton_rows, "pairs.pairs_kernel"):
        assert row["global_memory"].get("STG.128", 0) >= 2, (told(row), row["global_memory"])


def test_keys_are_read_once(triton_rows: list[Row]) -> None:
    """All loads of a program are there at once: 16 KB in flight for 128 threads are eight each."""
    for row in of(triton_rows, "token_importance.cls_logits_kernel"):
        assert row["global_memory"]["LDG.128"] >= 8, (told(row), row["global_memory"])


def test_nothing_of_cuda_spills(cuda_rows: list[Row]) -> None:
    sources = (ROOT / "csrc" / "cuda").glob("*.cu")
    assert {row["file"] for row in cuda_rows} == {
        path.name for path in sources if "__global__" in path.read_text()
    }
    assert not [
        (told(row), row["stack_bytes"], row["local_memory"])
        for row in cuda_rows
        if row["stack_bytes"] or row["local_memory"]
    ]


def test_pairs_of_cuda_use_tensor_cores_and_wide_loads(cuda_rows: list[Row]) -> None:
    by_type: dict[str, list[Row]] = defaultdict(list)
    for row in of(cuda_rows, "pairs_kernel", "attention_kernel"):
        half = "half" in row["kernel"] or "bfloat16" in row["kernel"]
        by_type["half" if half else "float"].append(row)
    assert all("HMMA" in row["tensor_cores"] for row in by_type["half"])
    # float32 is not rounded to tf32
    assert not any(row["tensor_cores"] for row in by_type["float"])
    wide = [row for row in by_type["half"] if "LDGSTS.128" in row["global_memory"]]
    assert len(wide) >= len(by_type["half"]) / 2
