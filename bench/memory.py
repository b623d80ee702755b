"""Peak of the tensor memory that a call holds besides its results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.utils._pytree import tree_leaves

# otherwise the profiler's library tells of each start and stop on stderr
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_workspace(call: Callable[[], Any]) -> int:
    """Bytes that torch's allocator handed out at the worst moment, results not counted.

    Measured by torch's profiler on the CPU; what a library takes from malloc itself is not seen.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    kept = {t.untyped_storage().data_ptr() for t in tree_leaves(result) if torch.is_tensor(t)}
    # no public interface tells which allocation is whose
    nodes = list(_walk(profile.profiler.kineto_results.experimental_event_tree()))
    events = [
        (node.extra_fields.ptr, node.extra_fields.alloc_size)
        for node in sorted(nodes, key=lambda node: node.start_time_ns)
        if node.tag == _EventType.Allocation
    ]
    return _peak(events, kept)


def _peak(events: list[tuple[int, int]], kept: set[int]) -> int:
    """Highest sum of live allocations; events are (pointer, bytes), negative for a release."""
    # an address may have served before: a result is the last allocation there
    results = {pointer: i for i, (pointer, size) in enumerate(events) if size > 0}
    live: dict[int, int] = {}
    total = peak = 0
    for i, (pointer, size) in enumerate(events):
        if size < 0:
            total -= live.pop(pointer, 0)
        elif not (pointer in kept and results[pointer] == i):
            live[pointer] = size
            total += size
        peak = max(peak, total)
    return peak


def _walk(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        yield node
        yield from _walk(node.children)
