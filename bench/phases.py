"""``python -m bench.phases --out FILE``: where a call of ours spends its time on a GPU, by kernel.

Microseconds of each kernel by torch's profiler, which adds gaps between launches but does not slow
a kernel: read shares here, and times of a call in the file of a run.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from . import environment
from .case import Provider
from .machine import GPU
from .record import label
from .runner import short
from .suites import plan

SUITES = ("focus", "decode", "importance", "kmeans", "merge")
WARM_UP, CALLS = 3, 8


def kernels(provider: Provider) -> dict[str, float]:
    """Microseconds of a call by kernel, in the order of the first launches."""
    calls = [provider.run, *provider.others][:CALLS]
    # the first call also makes its inputs
    for call in calls * WARM_UP:
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        for call in calls:
            call()
        torch.cuda.synchronize()
    total: Counter[str] = Counter()
    events = [e for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    for event in sorted(events, key=lambda e: e.time_range.start):
        name = re.sub(r"^void |\(anonymous namespace\)::|vmtc::cuda::", "", event.name)
        total[re.split(r"[(<]", name)[0][:80]] += event.time_range.elapsed_us()
    return {name: round(us / len(calls), 2) for name, us in total.items()}


def main(out: Path, only: str) -> None:
    found: list[dict[str, Any]] = []
    described = environment.describe(torch.get_num_threads(), "cuda")
    for planned in plan(GPU, SUITES, only, quick=True):
        name = label(planned.suite.name, planned.case.params)
        for provider in planned.case.providers:
            if provider.kind != "ours" or provider.missing or "automatic" in provider.name:
                continue
            line: dict[str, Any] = {"setup": name, "provider": provider.name}
            try:
                with torch.inference_mode():
                    line["kernels"] = kernels(provider)
            except Exception as error:
                line["error"] = short(error)
            found.append(line)
            print(json.dumps(line), flush=True)
            out.write_text(json.dumps({"environment": described, "phases": found}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="a text that a set-up's label must have")
    given = parser.parse_args()
    main(given.out, given.only)
