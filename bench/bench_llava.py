"""LLaVA-1.5 from image to text: ``python -m bench llava``, with 576 visual tokens and with fewer.

The time to the first token is that of `generate`, from the call until it hands the token to its
streamer: encoder, projector, compression, prefill, argmax. Decoding is what follows in the same
call. The cost of compression is the difference to the first tokens taken without a look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import vmtc_kernels

from . import gpu_timing, runner
from .case import Case, Cost, Provider, Target, Verdict
from .llava import SIZES, Call, First, Ours, Prompt, Stage, Variant, Watched
from .llava_rivals import FastV, VisionZip, visionzip_loop
from .machine import Machine, Suite
from .packages import load
from .runner import Effort, Notify, Result, Row
from .timing import Clock

USUAL = {"cpu": "small", "cuda": "7b"}
BATCHES = {"cpu": (1, 4), "cuda": (8, 1, 32)}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# rounds, and how many of them go on to decode
EFFORT = {("cpu", False): (6, 3), ("cpu", True): (3, 2)}
EFFORT |= {("cuda", False): (11, 4), ("cuda", True): (5, 3)}
# of 576; the first is what the targets are about
BUDGETS = (160, 192, 64)
# of the logits' norm. Seen between backends: 2e-6 in float32; in bfloat16, where one bit grows from
# layer to layer, 0.02 after ten layers and 0.04 after 32. Between VMTC and VisionZip: 0.28 and more
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
PLAIN, MERGED, INHIBITED, LEAST = "unmodified", "VMTC", "VMTC + CMAI", "as many tokens"
# too small for what the aims are about
TOYS = ("tiny",)
# words around the image: about LLaVA's template and a short question
BEFORE, AFTER = 35, 29


@dataclass(frozen=True)
class Setup:
    """``B`` prompts of ``before`` words, an image with ``tokens`` of its ``of`` tokens left, and
    ``after`` words, answered by ``new_tokens``."""

    size: str
    B: int
    tokens: int
    of: int
    dtype: str
    before: int = BEFORE
    after: int = AFTER
    new_tokens: int = 25

    @property
    def judged(self) -> bool:
        return self.tokens * 576 == self.of * BUDGETS[0]


class Meter:
    """Times a `Call` to its first token; the variant is put in place before the clock starts."""

    def __init__(self, gpu: bool) -> None:
        self.notices_company = not gpu
        settle = 0.0 if gpu else runner.CPU.clock.settle
        # no sample is too short, as each is a single answer
        self.clock = Clock(lambda call, _: call.sample(), settle=settle, sample=0.0)
        self.memory: runner.Meter = gpu_timing.GpuMeter() if gpu else runner.CPU

    def prepare(self, provider: Provider) -> tuple[Any, int]:
        return provider.run, 1

    def host_seconds(self, provider: Provider) -> float | None:
        return None

    def peak_workspace(self, call: Any) -> int:
        return self.memory.peak_workspace(call)


def suite(size: str = "") -> Suite:
    """size: a name in `SIZES`; else what is usual on the machine."""
    stages: dict[str, Stage] = {}

    def setups(machine: Machine) -> list[Setup]:
        device = "cuda" if machine.gpu else "cpu"
        name = size or USUAL[device]
        grid = SIZES[name].grid
        return [
            Setup(name, batch, grid * budget // 576, grid, DTYPES[device])
            for budget in BUDGETS
            for batch in BATCHES[device]
        ]

    def stage(setup: Setup, machine: Machine) -> Stage:
        if setup.size not in stages:
            model = SIZES[setup.size], machine.device, getattr(torch, setup.dtype)
            stages[setup.size] = Stage(*model)
        return stages[setup.size]

    return Suite(
        "llava",
        setups,
        lambda machine: {},
        lambda setup, machine: case(setup, machine, stage(setup, machine)),
        lambda setup, machine, effort, notify: run(
            setup, machine, stage(setup, machine), effort.quick, notify
        ),
    )


def run(
    setup: Setup, machine: Machine, stage: Stage, quick: bool, notify: Notify = runner.silent
) -> Result:
    """The case, and ``facts``: what there is to say besides the time to the first token, of the
    model and, under ``rows``, of each provider that was timed."""
    meter = Meter(machine.gpu)
    repetitions, decodes = EFFORT["cuda" if machine.gpu else "cpu", quick]
    # the sample that tells how long one takes is no part of the rounds
    declared = case(setup, machine, stage, decodes + 1)
    calls: dict[str, Call] = {provider.name: provider.run for provider in declared.providers}
    result = runner.run_case(declared, Effort(repetitions, 3600.0), meter, notify)
    words = setup.before + setup.after
    result.facts = {
        "weights_bytes": _weights(setup),
        "flops": SIZES[setup.size].flops(setup.of, words),
        "encoder_share": {
            name: encoder_share(size.flops(size.grid, words)) for name, size in SIZES.items()
        },
        "rows": {
            row.name: _facts(calls[row.name], row, result.rows, meter, setup)
            for row in result.rows
            if row.ms
        },
    }
    if machine.gpu and declared.targets:
        result.targets.append(_within(result, INHIBITED, MERGED, 1.05))
    stage.clear()
    return result


def case(setup: Setup, machine: Machine, stage: Stage, decodes: int = 1) -> Case:
    size, tokens = SIZES[setup.size], setup.tokens
    prompt = Prompt(setup.B, setup.before, setup.after)
    variants: list[Variant] = [
        Ours(MERGED, size, tokens, stage, inhibits=False),
        Ours(INHIBITED, size, tokens, stage, inhibits=True),
        Variant(PLAIN, size, setup.of),
        VisionZip("VisionZip", size, tokens),
        FastV("FastV", size, tokens, setup.before),
        First(LEAST, size, tokens),
    ]
    _, missing = load("transformers", "transformers")
    providers = []
    for variant in variants:
        call = Call(stage, variant, prompt, setup.new_tokens, decodes)
        judge = _judge(call, setup)
        # its cache is told beside the peak
        providers.append(
            Provider(variant.name, variant.kind, variant.scope, call, judge, missing, traced=False)
        )
    width, depth = size.text[:2]
    length = tokens + prompt.words
    itemsize = getattr(torch, setup.dtype).itemsize
    targets = [Target("rival", 2.5 if machine.gpu else 2.0, named=PLAIN)]
    if machine.gpu:
        targets = targets * (setup.B == 8) + [Target("floor", 1.01)]
    return Case(
        suite="llava",
        params=asdict(setup),
        images=setup.B,
        cost=Cost(
            bytes=_weights(setup) + 2 * setup.B * depth * length * width * itemsize,
            flops=setup.B * sum(size.flops(tokens, prompt.words).values()),
        ),
        providers=providers,
        targets=targets if setup.judged and setup.size not in TOYS else [],
    )


def _judge(call: Call, setup: Setup) -> Callable[[Any], Verdict]:
    @cache
    def expected() -> Tensor | None:
        if not isinstance(call.variant, Ours):
            return None
        with vmtc_kernels.use_backend("reference"):
            logits: Tensor = call().logits[0]
        return logits

    return lambda outcome: verdict(outcome, call.variant, setup, expected())


def _weights(setup: Setup) -> int:
    return SIZES[setup.size].parameters * getattr(torch, setup.dtype).itemsize


def encoder_share(flops: dict[str, int]) -> float:
    return flops["encoder"] / sum(flops.values())


def verdict(outcome: Any, variant: Variant, setup: Setup, expected: Tensor | None) -> Verdict:
    """Whether each layer has as many tokens as it should, and the logits are what they should."""
    words = setup.before + setup.after
    got = [layer.keys.shape[2] for layer in _layers(outcome) if layer.keys is not None]
    want = [variant.left(i) + words for i in range(len(got))]
    if got != want or len(got) != variant.size.text[1]:
        return Verdict(False, f"tokens in the layers' caches: {got}, expected {want}")
    logits = outcome.logits[0]
    if not logits.isfinite().all():
        return Verdict(False, "logits are not finite")
    if isinstance(variant, VisionZip):
        *given, out = (x.cpu().double() for x in variant.seen)
        looped = visionzip_loop(*given, contextual=variant.contextual, count=setup.tokens)
        # what is rounded to bfloat16 there is the mean of a group, and nothing before it
        return _near("tokens of an image, against a loop,", out, looped, 0.01)
    if expected is None:
        return Verdict(True, "logits are finite")
    return _near("logits, against the reference,", logits, expected, TOLERANCES[setup.dtype])


def _near(what: str, got: Tensor, expected: Tensor, tolerance: float) -> Verdict:
    if got.shape != expected.shape:
        return Verdict(False, f"{what} have shape {list(got.shape)}, not {list(expected.shape)}")
    off = float((got.double() - expected.double()).norm() / expected.double().norm())
    return Verdict(off <= tolerance, f"{what} differ by {off:.0e}")


def _layers(outcome: Any) -> list[Any]:
    cache = getattr(outcome, "cache", None)
    return (outcome.past_key_values if cache is None else cache).layers


def cache_bytes(outcome: Any) -> int:
    """All that the cache holds: keys, values, and CMAI's state."""
    held = [tree_leaves(vars(layer)) for layer in _layers(outcome)]
    tensors = {id(x): x for leaves in held for x in leaves if isinstance(x, Tensor)}
    return sum(x.nbytes for x in tensors.values())


def _facts(call: Call, row: Row, rows: list[Row], meter: Meter, setup: Setup) -> dict[str, Any]:
    """Of one provider; what is worth a look is added to its row as well."""
    steps = [1e3 * step for step in call.steps[1:]]
    held: list[int] = []
    # the call keeps no tensor, so that its cache is part of the peak
    peak = meter.peak_workspace(lambda: held.append(cache_bytes(call())))
    row.peak_bytes = peak
    facts: dict[str, Any] = {
        "decode_ms": {**_spread(steps), "samples": steps},
        "tokens_per_second": 1e3 * setup.B / float(np.median(steps)),
        "cache_bytes": held[-1],
        "peak_bytes": peak,
    }
    row.detail = (
        f"{facts['tokens_per_second']:.0f} tokens/s, cache {facts['cache_bytes'] / 2**20:.1f} MiB,"
        f" peak {facts['peak_bytes'] / 2**20:.0f} MiB; {row.detail}"
    )
    least = next((r.samples_ms for r in rows if r.name == LEAST), None)
    if least and row.name not in (LEAST, PLAIN):
        # turn by turn, so that a drift of the machine is in both
        pairs = zip(row.samples_ms, least, strict=True)
        facts["over_least"] = _spread([(ours - floor) / ours for ours, floor in pairs])
    if isinstance(call.variant, Ours):
        # all images together
        facts["operators_ms"] = _spread(list(_operators(call, call.variant, runs=3)))
    return facts


def _spread(samples: list[float]) -> dict[str, float]:
    p20, median, p80 = np.percentile(samples, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def _operators(call: Call, variant: Ours, runs: int) -> Iterator[float]:
    """Milliseconds in importance and merge, of several prefills."""
    settings = variant.vmtc
    variant.vmtc = watched = Watched(**asdict(settings))
    call.stage.clear()
    call()
    for _ in range(runs):
        watched.spent.clear()
        call()
        if call.stage.device == "cuda":
            torch.cuda.synchronize()
        yield 1e3 * math.fsum(seconds() for seconds in watched.spent)
    variant.vmtc = settings
    call.stage.clear()


def _within(result: Result, name: str, base: str, factor: float) -> dict[str, Any]:
    """The target that one of ours takes at most so many times as long as another."""
    ms = {row.name: row.ms["median"] for row in result.rows if row.ms}
    ratio = ms[name] / ms[base] if {name, base} <= set(ms) else None
    met = None if ratio is None or result.disturbed else ratio <= factor
    record = asdict(Target("floor", factor, named=f"{base} ({name})"))
    return {**record, "provider": base, "ratio": ratio, "met": met}
