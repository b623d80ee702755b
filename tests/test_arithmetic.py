"""What the process around an operator may change of its arithmetic: nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vmtc_kernels import kmeans, merge_tokens, token_importance, use_backend
from vmtc_kernels.kmeans import METRICS


@pytest.fixture(params=["highest", "medium"])
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(former)


@pytest.mark.parametrize("D", [256, 512, 1024])
def test_labels_do_not_follow_the_rounding_of_a_gemm(
    backend: str, matmul_precision: str, D: int
) -> None:
    """Rows constant along D: every product has one sign, so a sum in sequence loses the most."""
    for seed in range(10):
        row = torch.rand(1, 112, 1, generator=torch.Generator().manual_seed(seed))
        x = (0.5 + 0.5 * row).expand(1, 112, D).contiguous()
        seeds = (2 * torch.arange(40) + 1) * 112 // 80
        exact = (row[0] - row[0, seeds].T).abs().argmin(1)
        labels = kmeans(x, 40, iterations=0, metric="euclidean").labels[0]
        assert torch.equal(labels.long(), exact)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-17, 1e-20, 1e-22, 1e-30])
def test_tokens_whose_squares_are_subnormal(backend: str, metric: str, scale: float) -> None:
    for seed in range(5):
        x = torch.randn(1, 60, 16, generator=torch.Generator().manual_seed(seed)) * scale
        with use_backend("reference"):
            expected = kmeans(x, 7, metric=metric)
        assert torch.equal(kmeans(x, 7, metric=metric).labels, expected.labels)


@pytest.mark.parametrize("cls_index", [0, None])
def test_autocast_lowers_nothing(backend: str, cls_index: int | None) -> None:
    q, k = torch.randn(2, 1, 4, 64, 32).requires_grad_()

    def importance_and_gradients() -> list[torch.Tensor]:
        importance = token_importance(q, k, cls_index=cls_index)
        return [importance, *torch.autograd.grad(importance[:, 3].sum(), (q, k))]

    expected = importance_and_gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = importance_and_gradients()
    for value, exact in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, exact)


def test_scores_that_add_up_beyond_float32(backend: str) -> None:
    x = torch.arange(6.0).reshape(1, 2, 3)
    merged = merge_tokens(x, torch.full((1, 2), 3e38), 0, 1)
    assert torch.equal(merged.tokens[0, 0], x[0].mean(0))


def test_an_outlier_that_leaves_a_cluster_leaves_no_trace(backend: str) -> None:
    """Its digits drown those of the others in a sum from which it is only subtracted."""
    small = torch.tensor([1.0, 2, 3, 4, 5, 6, 7])
    large = torch.tensor([1.0, 1.65, 2.2, 1.65, 1.65]) * 1e18
    x = torch.stack([torch.cat([small, large]), torch.ones(12)], dim=-1)[None]
    outlier = 7  # first nearer to the small seed, then to the mean of the other large ones
    labels = [
        kmeans(x, 2, iterations=rounds, metric="euclidean").labels[0, outlier] for rounds in (0, 1)
    ]
    assert labels == [0, 1]
    for rounds in (1, 2, 10):
        centroids = kmeans(x, 2, iterations=rounds, metric="euclidean").centroids[0]
        assert centroids[0].tolist() == [4.0, 1.0]


def test_no_images_take_no_memory(backend: str) -> None:
    assert kmeans(torch.randn(0, 4, 8), 10**9).centroids.shape == (0, 10**9, 8)
    merged = merge_tokens(
        torch.randn(0, 4, 8), torch.randn(0, 4), 1, 10**9, valid=torch.ones(0, 4) > 0
    )
    assert merged.tokens.shape == (0, 10**9 + 1, 8)
