"""merge_tokens whole (selection, clustering, merge) against k-means libraries that only cluster."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import vmtc_kernels
from vmtc_kernels import MergedTokens

from .clustering import Problem, rivals
from .data import DATASETS
from .runner import Case, Cost, Kind, Provider, Target, Verdict

# merged tokens are averages in float32, rounded once where they are of another type: difference to
# float64, relative to the largest value
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Setup:
    data: str = "blobs"
    D: int = 1024
    B: int = 4
    N: int = 576
    P: int = 128
    K: int = 32
    iterations: int = 10


SETUPS = [Setup(data, D) for D in (1024, 4096) for data in ("blobs", "field")]


def case(setup: Setup) -> Case:
    x = DATASETS[setup.data](setup.B, setup.N, setup.D)
    scores = torch.rand(setup.B, setup.N, generator=torch.Generator().manual_seed(1))
    redundant = scores.argsort(dim=1, descending=True, stable=True)[:, setup.P :].sort().values
    gathered = x.gather(1, redundant[..., None].expand(-1, -1, setup.D))
    problem = Problem.of(gathered, setup.K, setup.iterations)

    def ours(backend: str, kind: Kind) -> Provider:
        def run() -> MergedTokens:
            with vmtc_kernels.use_backend(backend):
                return vmtc_kernels.merge_tokens(
                    x,
                    scores,
                    setup.P,
                    setup.K,
                    iterations=setup.iterations,
                    metric="euclidean",
                )

        return Provider(
            f"merge_tokens, {backend}",
            kind,
            "everything",
            run,
            lambda result: verify(result, x, scores, redundant, problem),
            vmtc_kernels.available_backends()[backend],
        )

    return Case(
        suite="merge_tokens",
        params={**asdict(setup), "metric": "euclidean", "dtype": "float32"},
        images=setup.B,
        cost=cost(setup),
        providers=[
            ours("cpu", "ours"),
            ours("reference", "reference"),
            *rivals(problem),
        ],
        targets=[
            Target("rival", 2.0 if setup.D <= 1024 else 1.5),
            Target("reference", 8.0),
        ],
        memory_unit=("the redundant tokens", gathered.nbytes),
    )


def cost(setup: Setup) -> Cost:
    """Bytes: everything read and written once. FLOPs: of Lloyd's algorithm with no distance
    skipped, which exact pruning may undercut."""
    B, N, P, K, D = setup.B, setup.N, setup.P, setup.K, setup.D
    redundant = N - P
    numbers = N * D + N + (P + K) * D + N + (P + K)
    assignments = (setup.iterations + 1) * 2 * redundant * K * D
    updates = setup.iterations * redundant * D
    return Cost(bytes=4 * B * numbers, flops=B * (assignments + updates + 2 * redundant * D))


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

    member = one_hot(owner, slots)
    if not torch.equal(member.sum(1), sizes.long()):
        return Verdict(False, "sizes do not count the tokens of each slot")
    weight = member * scores.double()[..., None]
    merged = (weight.mT @ x.double() / weight.sum(1)[..., None])[:, primary:]
    difference = (tokens[:, primary:] - merged).abs().max() / merged.abs().max()
    rounding = torch.finfo(x.dtype).eps if x.itemsize < 4 else 0.0
    if not difference <= TOLERANCE + rounding:
        return Verdict(False, f"merged tokens differ by {difference:.1e} of the largest value")
    return verdict
