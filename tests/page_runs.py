"""Made-up runs of the benchmarks, for the tests of what is drawn of them."""

from __future__ import annotations

import itertools
from pathlib import Path

from bench import record
from bench.case import OWN_RULE
from bench.page import facts

MARK = "\"><script>alert('x')</script> & $\\alpha_1$"
REASON = "ImportError: <img src=x onerror=alert(1)> is missing"
CEILINGS = {"copy_bytes_per_s": 2e10, "flops_per_s": 1e11, "dtype": "float32"}


def environment(**changes):
    return {
        "date": "2026-03-01T10:00:00+00:00",
        "command": "vmtc bench",
        "commit": "abcdef012345",
        "dirty": False,
        "device": "cpu",
        "cpu": "Some Processor",
        "cpu_capability": "AVX2",
        "cores": 4,
        "threads": 2,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "faiss-cpu": None},
        "ceilings": CEILINGS,
        **changes,
    }


def row(name, kind, ms=None, scope="everything", spread=0.1, **changes):
    """A provider, timed where it has milliseconds; p20 and p80 lie a share of them away."""
    timed = ms is not None
    low, high = (ms * (1 - spread), ms * (1 + spread)) if timed else (None, None)
    found = {
        "name": name,
        "kind": kind,
        "scope": scope,
        "status": "ok" if timed else "missing",
        "detail": "0 labels differ" if timed else REASON,
        "ms": {"median": ms, "p20": low, "p80": high} if timed else None,
        "calls_per_sample": 3,
        "samples_ms": [low, ms, ms, high] if timed else [],
        "host_ms": None,
        "peak_bytes": 3 << 20 if timed else None,
    }
    return {**found, **changes}


def result(suite, params, rows, axis=None, images=4, **changes):
    found = {
        "suite": suite,
        "params": params,
        "axis": axis,
        "images": images,
        "unit": "sequence" if suite in ("focus", "decode") else "image",
        "cost": {"bytes": 10**6, "flops": 10**8},
        "rows": rows,
        "targets": [],
        "workspace": None,
        "others_busy": 0.0,
        "facts": {},
    }
    return {**found, **changes}


def sweep_over(axis, sizes, rows_of, **changes):
    params = {"data": "blobs", "D": 1024, "dtype": "float32", **changes}
    follows = {"N": lambda n: {"P": n // 4}}.get(axis, lambda n: {})
    return [
        result("merge", {**params, axis: n, **follows(n)}, rows_of(n), axis,
               images=n if axis == "B" else 4)
        for n in sizes
    ]  # fmt: skip


SIZES = (144, 576, 1024, 4096, 16384)


def of_size(n):
    """Ours wins from 4096 tokens on; the last size is too much for one of the rivals."""
    return [
        row("merge_tokens, cpu", "ours", 0.02 + n / 4e4),
        row("merge_tokens, reference", "reference", n / 50),
        row("faiss", "rival", n**1.2 / 1e5, "clustering alone", peak_bytes=None),
        row("torch Gram, compiled, graph", "rival", None if n > 9999 else n**2 / 1e5,
            status="failed" if n > 9999 else "ok"),
        row("flash-kmeans' kernels, graph", "rival"),
    ]  # fmt: skip


def cpu_run():
    usual = [
        row("merge_tokens, cpu", "ours", 1.0),
        row("merge_tokens, reference", "reference", 30.0),
        row("faiss", "rival", 2.5, "clustering alone"),
        row("torch Gram", "rival", 3.5, "clustering alone"),
        row("ToMe", "rival", 0.5, f"{OWN_RULE}: bipartite matching"),
        row("flash-kmeans", "rival"),
    ]
    aims = [
        {"against": "rival", "factor": 2.0, "named": "", "scope": "clustering alone",
         "provider": "faiss", "ratio": 2.5, "met": True},
        {"against": "floor", "factor": 1.3, "named": "", "provider": "k.sum(-1)", "ratio": 1.75,
         "met": False},
        {"against": "rival", "factor": 9.0, "named": "cuml", "provider": None, "ratio": None,
         "met": None},
    ]  # fmt: skip
    small = {"data": "blobs", "D": 1024, "dtype": "float32"}
    return [
        result("merge", {**small, "N": 576}, usual, targets=aims),
        result("merge", {**small, "N": 729}, usual, others_busy=1.5),
        *sweep_over("N", SIZES, of_size),
        {"suite": "merge", "params": {**small, "N": 65536, "P": 16384}, "axis": "N",
         "error": "MemoryError: too large"},
        *sweep_over("B", (1, 8, 64), lambda n: of_size(576)[:3], N=576),
        result("kmeans", {"K": 128}, [row("kmeans, cpu", "ours", 2.0),
                                      row(MARK, "rival", 1.5, MARK)]),
        {"suite": "kmeans", "params": {"K": 1000}, "axis": None, "error": f"RuntimeError: {MARK}"},
        result("importance", {"B": 1}, [row("token_importance, cpu", "ours", 1.0),
                                        row("k.sum(-1)", "floor", 1.1, "one read of k")]),
    ]  # fmt: skip


def gpu_run():
    rows = [
        row("focus_attention", "ours", 0.11, host_ms=0.02),
        row("focus_attention, triton", "ours", 0.12, host_ms=0.03),
        row("focus_attention, cuda", "ours", status="failed", detail="to time it: no graph"),
        row("torch, eager", "rival", 3.0),
        row("FlexAttention, making its mask", "rival", 0.4, "mask and attention"),
        *(row(f"SDPA {name}, ready mask", "rival", 0.2 + i / 50, "attention alone")
          for i, name in enumerate("abcdefghi")),
        *(row(f"SDPA {name}, causal", "floor", ms, "attention alone, nothing inhibited")
          for name, ms in (("flash", 0.1), ("cuDNN", 0.09), ("efficient", 0.15))),
    ]  # fmt: skip
    lengths = [
        result("focus", {"phase": "prefill", "B": 1, "L": n, "after": n - 611}, rows, "L")
        for n in (675, 1024, 4096)
    ]
    broken = [row("focus_attention", "ours", status="failed", detail="differs by 2"), rows[3]]
    params = {"phase": "prefill", "B": 8, "L": 675, "after": 64}
    return [
        result("focus", params, rows),
        *lengths,
        result("decode", {"B": 1, "dtype": "bfloat16"}, broken),
    ]


def llava_run():
    found = []
    for images, tokens in itertools.product((1, 4), (64, 160)):
        rows = [
            row("VMTC", "ours", 2.0 * tokens, "selects and merges"),
            row("VMTC + CMAI", "ours", 2.1 * tokens, "selects and merges, inhibits"),
            row("unmodified", "rival", 600.0, "nothing"),
            row("VisionZip", "rival", 2.0 * tokens, "selects and merges"),
            row("as many tokens", "floor", 1.9 * tokens, "takes the first tokens"),
        ]
        of_all = {"tokens_per_second": 43.25, "cache_bytes": 12 << 20, "peak_bytes": 34 << 20,
                  "over_least": {"median": -1e-5, "p20": -0.02, "p80": 0.03},
                  "operators_ms": {"median": 1.125}}  # fmt: skip
        params = {"size": "small", "B": images, "tokens": tokens, "of": 576, "dtype": "float32"}
        facts = {"rows": {r["name"]: of_all for r in rows}}
        found.append(result("llava", params, rows, images=images, facts=facts))
    return found


GPU = {"name": "NVIDIA H200", "capability": "9.0", "driver": "580.11", "cuda_of_torch": "13.0",
       "nvcc": "13.0"}  # fmt: skip
RUNS = {
    "cpu run": (environment(), cpu_run()),
    "gpu": (
        environment(gpu=GPU, date="2026-03-02T10:00:00+00:00", dirty=True, ceilings=None,
                    command="vmtc bench --quick"),
        gpu_run(),
    ),
    "llava": (environment(date="2026-02-01T10:00:00+00:00", dirty=None), llava_run()),
}  # fmt: skip


def run_of(name):
    return record.Run(Path(name), *RUNS[name])


def sweep_of(name, suite, axis):
    return next(s for s in facts.split(run_of(name))[suite][1] if s.axis == axis)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
