"""Timing on a GPU: CUDA graphs over rotated inputs, between events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from .case import Provider
from .timing import Clock

Call = Callable[[], Any]
WARM_UP = 3
HOST_CALLS = 20
# more sets than these make graphs of too many nodes; the smallest inputs then stay in the cache
MOST_SETS = 64


def rotation(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs make a round that the cache cannot hold, within `MOST_SETS`."""
    return min(MOST_SETS, max(2, math.ceil(2 * cache_bytes / max(1, set_bytes))))


class Device(Protocol):
    """What the meter asks of a GPU; a test stands in for it."""

    def capture(self, calls: Sequence[Call]) -> Call:
        """A callable that launches all calls as one graph."""
        ...

    def measure(self, call: Call, calls: int) -> float:
        """Seconds of the device for one call."""
        ...

    def synchronize(self) -> None: ...

    def peak(self, call: Call) -> int:
        """Bytes allocated at the worst moment of a call, its results not counted."""
        ...


class Cuda:
    """The current GPU, on its current stream."""

    def capture(self, calls: Sequence[Call]) -> Call:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # compilation, library handles and caches, none of which may happen in a capture
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        finally:
            # a capture that fails leaves torch on its stream
            torch.cuda.set_stream(current)
        return graph.replay

    def measure(self, call: Call, calls: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak(self, call: Call) -> int:
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        tensors = {t.untyped_storage().data_ptr(): t for t in tree_leaves(result)}
        kept = sum(t.untyped_storage().nbytes() for t in tensors.values())
        return torch.cuda.max_memory_allocated() - before - kept


class GpuMeter:
    """Measures a provider as a graph over all its sets of inputs, or call by call.

    Calls of one graph follow each other without the host, so the time is the device's own.
    """

    # what other processes do on the host does not slow a graph
    notices_company = False

    def __init__(self, device: Device | None = None, eager: bool = False) -> None:
        """eager: launch every provider call by call, as most models are."""
        self.device: Device = device or Cuda()
        self.eager = eager
        self.clock = Clock(self.device.measure, settle=0.0, sample=5e-3)

    def prepare(self, provider: Provider) -> tuple[Call, int]:
        calls = (provider.run, *provider.others)
        # each makes its inputs when it is first called, which is no part of a graph
        for call in calls:
            call()
        self.device.synchronize()
        if provider.launch == "graph" and not self.eager:
            return self.device.capture(calls), len(calls)

        def every() -> None:
            for call in calls:
                call()

        return every, len(calls)

    def host_seconds(self, provider: Provider) -> float:
        """What the host takes to launch one call without a graph, nothing waited for."""
        provider.run()
        self.device.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            provider.run()
        seconds = (time.perf_counter() - start) / HOST_CALLS
        self.device.synchronize()
        return seconds

    def peak_workspace(self, call: Call) -> int:
        return self.device.peak(call)
