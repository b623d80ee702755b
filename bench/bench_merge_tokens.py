"""Suite ``merge``: merge_tokens whole (selection, clustering, merge) against k-means that only
clusters tokens already gathered, and against other ways to the same number of tokens."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain

import torch
from torch import Tensor

import vmtc_kernels
from vmtc_kernels import MergedTokens, VMTCConfig

from . import kmeans_packages, kmeans_torch
from .case import CLUSTERS, OWN_RULE, Case, Cost, Provider, Target, Verdict
from .clustering import Problem, Task, flops
from .data import DATASETS
from .machine import Machine, Sets, Suite, near, ours
from .merging import REDUCTIONS, Reduction

# merged tokens are averages in float32, rounded once where they are of another type: difference to
# float64, relative to the largest value
TOLERANCE = 1e-5
# the reference takes 20 ms an image
JUDGED = 16
# features of a key, as of a head of the encoder
KEY = 64


@dataclass(frozen=True)
class Setup:
    data: str = "blobs"
    D: int = 1024
    B: int = 4
    N: int = 576
    P: int = 128
    K: int = 32
    iterations: int = 10
    metric: str = "euclidean"
    dtype: str = "float32"


ON_GPU = Setup(metric="cosine", dtype="bfloat16")
# as many tokens as the aims are about, half of them merged
DEFAULT = {"P": int(VMTCConfig.num_primary), "K": int(VMTCConfig.num_merged)}


def setups(machine: Machine) -> list[Setup]:
    if not machine.gpu:
        aims = [Setup(data, D) for D in (1024, 4096) for data in ("blobs", "field")]
        return [*aims, Setup("field", **DEFAULT)]
    # what matters most comes first, as a run may be cut short
    batches = (1, 8, 64, 256)
    aims, *others = [
        [replace(usual, B=B, D=D) for D in (1024, 4096) for B in batches]
        for usual in (ON_GPU, replace(ON_GPU, metric="euclidean"), replace(ON_GPU, data="field"))
    ]
    return [*aims, *(replace(ON_GPU, B=B, **DEFAULT) for B in batches), *chain(*others)]


def sweeps(machine: Machine) -> dict[str, list[Setup]]:
    usual = replace(ON_GPU, B=8) if machine.gpu else Setup(B=1)
    batches = (1, 4, 16, 64, 256) if machine.gpu else (1, 2, 4, 8, 16, 32)
    tokens = (144, 256, 576, 1024, 2304, 4096, 9216, 16384)
    return {
        # a quarter of the tokens stays, so that few are enough for the clusters
        "N": [replace(usual, N=N, P=N // 4) for N in tokens],
        "K": [replace(usual, K=K) for K in (4, 8, 16, 32, 64, 128, 256)],
        "D": [replace(usual, D=D) for D in (64, 256, 1024, 4096)],
        "B": [replace(usual, B=B) for B in batches],
    }


@dataclass(frozen=True)
class Inputs:
    """x [B, N, D], scores [B, N], keys [B, N, d], and the positions [B, R] of the redundant tokens,
    ascending."""

    x: Tensor
    scores: Tensor
    keys: Tensor
    redundant: Tensor

    @classmethod
    def of(cls, x: Tensor, num_primary: int, seed: int) -> Inputs:
        generator = torch.Generator(x.device).manual_seed(seed + 1)
        scores = torch.rand(x.shape[:2], generator=generator, device=x.device)
        order = scores.argsort(dim=1, descending=True, stable=True)
        mixing = torch.randn(x.shape[2], KEY, generator=generator, device=x.device)
        keys = (x.float() @ mixing / x.shape[2] ** 0.5).to(x.dtype)
        return cls(x, scores, keys, order[:, num_primary:].sort().values)

    def gathered(self) -> Tensor:
        rows = self.redundant[..., None].expand(-1, -1, self.x.shape[2])
        return self.x.gather(1, rows)


def case(setup: Setup, machine: Machine) -> Case:
    dtype = getattr(torch, setup.dtype)
    make = DATASETS[setup.data]
    shape = (setup.B, setup.N, setup.D)
    redundant = (setup.B, setup.N - setup.P, setup.D)

    def inputs(seed: int) -> Inputs:
        return Inputs.of(make(*shape, seed, machine.device).to(dtype), setup.P, seed)

    sets = machine.sets(inputs, setup.B * setup.N * setup.D * dtype.itemsize)
    gathered = sets.then(Inputs.gathered)
    settings = (setup.K, setup.iterations, setup.metric)
    task = Task(gathered, redundant, dtype, *settings, machine, JUDGED)

    def run(given: Inputs) -> MergedTokens:
        return vmtc_kernels.merge_tokens(
            given.x,
            given.scores,
            setup.P,
            setup.K,
            iterations=setup.iterations,
            metric=setup.metric,
        )

    def judge(result: MergedTokens) -> Verdict:
        cut, given = task.judged, sets.first
        some = MergedTokens(*(value[cut] for value in result))
        return verify(some, given.x[cut], given.scores[cut], given.redundant[cut], task.problem)

    return Case(
        suite="merge",
        params=asdict(setup),
        images=setup.B,
        cost=cost(setup),
        providers=[
            *ours("merge_tokens", sets.calls(run), judge, machine),
            *kmeans_torch.rivals(task),
            *kmeans_packages.rivals(task),
            *(_reduction(each, sets, setup) for each in REDUCTIONS),
        ],
        targets=_targets(setup, machine),
        memory_unit=(
            "the redundant tokens",
            dtype.itemsize * math.prod(redundant),
        ),
    )


def _reduction(method: Reduction, sets: Sets[Inputs], setup: Setup) -> Provider:
    """Another way to as many tokens, judged by what it says itself of the first image."""
    count = setup.P + setup.K

    def given(inputs: Inputs) -> tuple[Tensor, ...]:
        # what [CLS] attends to sums to one
        return inputs.x, inputs.scores / inputs.scores.sum(1, keepdim=True), inputs.keys

    @cache
    def expected() -> Tensor:
        # on the host, as it goes token by token
        return method.loop(*(value[0].cpu() for value in given(sets.first)), count)

    def judge(tokens: Tensor) -> Verdict:
        # who is nearest may hang on the last bit, and then a small weight goes to another token
        tolerance = 1e-3 if tokens.dtype == torch.float32 else 0.02
        found = near(tokens[0].double().cpu(), expected().double(), tolerance)
        return replace(found, detail=f"against a loop by its own rule: {found.detail}")

    run, *others = sets.then(given).calls(lambda values: method.reduce(*values, count))
    scope = f"{OWN_RULE}: {method.scope}"
    return Provider(method.name, "rival", scope, run, judge, others=tuple(others))


def _targets(setup: Setup, machine: Machine) -> list[Target]:
    if not machine.gpu:
        least = 2.0 if setup.D <= 1024 else 1.5
        return [Target("rival", least, scope=CLUSTERS), Target("reference", 8.0)]
    return [
        Target("rival", 1.0, scope=CLUSTERS),
        Target("rival", 20.0, "flash-kmeans"),
        Target("rival", 6.0 if setup.B <= 8 else 4.0, "torch", CLUSTERS),
    ]


def cost(setup: Setup) -> Cost:
    """Everything read and written once; FLOPs of the clustering that may be least, and of the
    merge."""
    B, N, P, K, D = setup.B, setup.N, setup.P, setup.K, setup.D
    redundant = N - P
    itemsize = getattr(torch, setup.dtype).itemsize
    numbers = itemsize * (N + P + K) * D + 4 * (2 * N + P + K)
    products = flops(redundant, K, setup.iterations, D) + 2 * redundant * D
    return Cost(bytes=B * numbers, flops=B * products)


def verify(
    result: MergedTokens, x: Tensor, scores: Tensor, redundant: Tensor, problem: Problem
) -> Verdict:
    """Primary tokens bit for bit, the labels of the reference, and the averages of those labels."""
    tokens, owner, sizes = result.tokens, result.owner.long(), result.sizes
    slots = tokens.shape[1]
    primary = slots - problem.clusters
    expected = torch.ones_like(owner, dtype=torch.bool).scatter(1, redundant, False)
    if not torch.equal(tokens[:, :primary].flatten(0, 1), x[expected]):
        return Verdict(False, "the primary tokens are not those of highest score")
    slot = torch.arange(primary, device=x.device)
    if not torch.equal(owner[expected], slot.repeat(len(x))):
        return Verdict(False, "primary tokens have the wrong owner")
    verdict = problem.judge(owner.gather(1, redundant) - primary, same_labels=True)
    if not verdict.ok:
        return verdict

    counts = torch.zeros_like(sizes, dtype=torch.int64)
    if not torch.equal(counts.scatter_add(1, owner, torch.ones_like(owner)), sizes.long()):
        return Verdict(False, "sizes do not count the tokens of each slot")
    slots_merged = torch.arange(primary, slots, device=x.device)
    weight = (owner[..., None] == slots_merged) * scores.double()[..., None]
    merged = weight.mT @ x.double() / weight.sum(1)[..., None]
    difference = (tokens[:, primary:] - merged).abs().max() / merged.abs().max()
    rounding = torch.finfo(x.dtype).eps if x.itemsize < 4 else 0.0
    if not difference <= TOLERANCE + rounding:
        return Verdict(False, f"merged tokens differ by {difference:.1e} of the largest value")
    return verdict


SUITE = Suite("merge", setups, sweeps, case)
