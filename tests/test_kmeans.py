"""kmeans on every backend against its definition, scikit-learn and its own invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import (
    FLOATS,
    METRICS,
    array,
    assert_close,
    assert_same_bits,
    assert_same_clustering,
    assert_same_objective,
    bits,
    normal,
    place,
    ragged,
    uniform,
)
from clusters import assert_clusters, expected_clusters
from contract import OperatorContract
from hypothesis import given
from hypothesis import strategies as st

from vmtc_kernels import kmeans, use_backend


class TestContract(OperatorContract):
    op = "kmeans"
    # its test_aot_dispatch_dynamic adds up the outputs in the dtype of the first, here integers;
    # test_compiles_with_gradients holds instead
    opcheck_with_gradients = ("test_schema", "test_autograd_registration", "test_faketensor")


SIZES = [
    (1, 1, 1),
    (2, 3, 2),
    (7, 17, 5),
    (33, 17, 33),
    (33, 1, 2),
    (33, 64, 40),
    (97, 257, 32),
    (97, 3, 1),
    (577, 64, 32),
]


@pytest.mark.parametrize("masked", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize(("N", "D", "K"), SIZES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_the_definition(
    backend: str, dtype: torch.dtype, metric: str, N: int, D: int, K: int, masked: bool
) -> None:
    B = 1 if N > 500 else 5
    x = normal(B, N, D, dtype=dtype, seed=3)
    valid = ragged(B, N) if masked else None
    got = kmeans(x, K, metric=metric, valid=valid)
    assert_clusters(got, x, metric, valid)
    images = expected_clusters(x, K, 10, metric, valid)
    if metric == "cosine" and D == 1:
        # features are 1 and -1: hardly anything but ties
        for row, image in zip(array(got.labels), images, strict=True):
            assert_same_objective(row, image)
        return
    if N == 577:
        assert all(image.clear for image in images), "choose another seed: labels must be exact"
    assert_same_clustering(got.labels, images)


@pytest.mark.parametrize("metric", METRICS)
def test_float64_agrees_with_the_definition(metric: str) -> None:
    x = normal(3, 97, 17, dtype=torch.float64)
    with use_backend("reference"):
        got = kmeans(x, 8, metric=metric)
    assert_clusters(got, x, metric)
    assert_same_clustering(got.labels, expected_clusters(x, 8, 10, metric), exactly=True)


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 10, 50])
@pytest.mark.parametrize("D", [2, 24])
@pytest.mark.parametrize("metric", METRICS)
def test_runs_as_many_rounds_as_asked(backend: str, metric: str, D: int, iterations: int) -> None:
    """In the plane a token has many near rivals: a bound that is a little too tight shows."""
    x = normal(2, 321, D)
    images = expected_clusters(x, 12, iterations, metric)
    assert all(image.clear for image in images)
    assert_same_clustering(kmeans(x, 12, iterations=iterations, metric=metric).labels, images)


@pytest.mark.parametrize("metric", METRICS)
def test_more_rounds_change_nothing_once_no_label_changes(backend: str, metric: str) -> None:
    x = normal(3, 97, 24, seed=6)
    assert_same_bits(
        kmeans(x, 7, iterations=60, metric=metric), kmeans(x, 7, iterations=1000, metric=metric)
    )


def test_equals_scikit_learn_from_the_same_seeds(backend: str) -> None:
    KMeans = pytest.importorskip("sklearn.cluster").KMeans
    N, D, K = 97, 17, 6
    centers = 6 * normal(K, D, seed=7)
    x = centers[torch.arange(N) * K // N] + normal(N, D, seed=8)
    seeds = x[[(2 * k + 1) * N // (2 * K) for k in range(K)]]
    theirs = KMeans(K, init=seeds.cpu().numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=300)
    theirs.fit(x.cpu().numpy())
    ours = kmeans(x[None], K, iterations=300, metric="euclidean")
    assert np.array_equal(array(ours.labels[0]), theirs.labels_)
    assert_close(ours.centroids[0], theirs.cluster_centers_)


@given(st.data())
def test_exact_ties_go_to_the_smaller_cluster_and_position(
    backend: str, data: st.DataObject
) -> None:
    """Small integers: every distance to a seed is exact, and most are tied or duplicates."""
    B, N = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    D, K = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12))
    high = data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    x = place(torch.randint(0, high + 1, (B, N, D), generator=generator, device="cpu").float())
    valid = uniform(B, N, seed=N) < data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    for rounds in (0, 4):
        got = kmeans(x, K, iterations=rounds, metric="euclidean", valid=valid)
        assert_clusters(got, x, "euclidean", valid)
        images = expected_clusters(x, K, rounds, "euclidean", valid, exact_start=True)
        # after rounds of inexact means only where none of them met a near tie
        clear = [b for b, image in enumerate(images) if image.clear]
        assert_same_clustering(got.labels[clear], [images[b] for b in clear])
        assert rounds or len(clear) == B


@given(st.data())
def test_exact_ties_of_cosine_go_to_the_smaller_cluster(backend: str, data: st.DataObject) -> None:
    """Signed axes, scaled by powers of two, and zero vectors: all norms and products are exact."""
    N, D, K = (data.draw(st.integers(1, n)) for n in (40, 5, 8))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    axis = torch.randint(0, D, (1, N), generator=generator, device="cpu")
    scale = torch.tensor([0.0, 1.0, -1.0, 4.0, -0.5], device="cpu")
    factor = scale[torch.randint(0, 5, (1, N), generator=generator, device="cpu")]
    x = place(torch.nn.functional.one_hot(axis, D) * factor[..., None])
    got = kmeans(x, K, iterations=0)
    assert_same_clustering(got.labels, expected_clusters(x, K, 0), exactly=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_identical_tokens(backend: str, metric: str, dtype: torch.dtype) -> None:
    # 36 tokens less the 4 that repair the empty clusters leave 32: every mean is exact
    x = torch.tensor([3.0, 0.0, 4.0], dtype=dtype).expand(2, 36, 3)
    got = kmeans(x, 5, metric=metric)
    assert got.sizes.tolist() == 2 * [[32, 1, 1, 1, 1]]
    assert got.labels.tolist() == 2 * [[1, 2, 3, 4] + 32 * [0]]
    for tokens in (37, 97):
        x = normal(1, 1, 17, dtype=dtype).expand(2, tokens, 17)
        assert_clusters(kmeans(x, 5, metric=metric), x, metric)


def test_equal_seeds_leave_empty_clusters_that_repair_fills(backend: str) -> None:
    """Worked by hand: seeds 0, 0, 0; all join cluster 0; the farthest two, 9 and 8, found the
    others; then each is nearest to its own."""
    x = torch.tensor([0.0, 0.0, 8.0, 0.0, 9.0, 0.0]).view(1, 6, 1)
    seeds = [(2 * k + 1) * 6 // 6 for k in range(3)]
    assert x[0, seeds, 0].tolist() == [0, 0, 0]
    first = kmeans(x, 3, iterations=0, metric="euclidean")
    assert first.labels.tolist() == [[0, 0, 2, 0, 1, 0]]
    assert_same_bits(kmeans(x, 3, metric="euclidean"), first)
    assert first.centroids.flatten().tolist() == [0, 9, 8]


def test_a_cluster_of_two_gives_one_up(backend: str) -> None:
    """Worked by hand: seeds 0, 9, 9; the third cluster is empty and takes the 1 from 0 and 1."""
    x = torch.tensor([0.0, 1.0, 9.0, 9.0]).view(1, 4, 1)
    for iterations in (0, 5):
        got = kmeans(x, 3, iterations=iterations, metric="euclidean")
        assert got.labels.tolist() == [[0, 2, 1, 1]]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 1e4),
        (torch.bfloat16, 1e15),
        (torch.float32, 1e15),
        (torch.float32, 1e-12),
    ],
    ids=str,
)
def test_large_and_small_magnitudes(
    backend: str, dtype: torch.dtype, scale: float, metric: str
) -> None:
    x = (scale * normal(2, 97, 17, seed=9)).clamp(-6 * scale, 6 * scale).to(dtype)
    got = kmeans(x, 8, metric=metric)
    assert_clusters(got, x, metric)
    assert_same_clustering(got.labels, expected_clusters(x, 8, 10, metric))


@pytest.mark.parametrize(("scale", "offset"), [(1, 1000), (1e-2, 10), (1, -1e4)])
def test_a_large_mean_does_not_drown_small_clusters(
    backend: str, scale: float, offset: float
) -> None:
    """|f|^2 - 2 f.c + |c|^2 of such tokens is nothing but rounding."""
    centers = scale * 0.4 * normal(8, 17, seed=9)
    x = centers[torch.arange(97) * 8 // 97] + scale * 0.1 * normal(2, 97, 17, seed=10) + offset
    got = kmeans(x, 8, metric="euclidean")
    assert_clusters(got, x, "euclidean")
    images = expected_clusters(x, 8, 10, "euclidean")
    assert all(image.clear for image in images)
    assert_same_clustering(got.labels, images)
    # 1 - cos is a handful of epsilons here, so any label is as good as another
    assert_clusters(kmeans(x, 8), x, "cosine")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_changes_nothing_for_the_others(
    backend: str, bad: float, dtype: torch.dtype, metric: str
) -> None:
    # one token after a multiple of 2K moves no seed
    x = normal(2, 41, 24, dtype=dtype, seed=10)
    x[:, 40, 7] = bad
    got = kmeans(x, 5, metric=metric)
    without = kmeans(x[:, :40].contiguous(), 5, metric=metric)
    assert torch.equal(got.labels[:, :40], without.labels)
    assert (got.labels[:, 40] == 0).all()
    assert_same_bits(got.centroids, without.centroids)


@pytest.mark.parametrize("metric", METRICS)
def test_a_token_that_is_not_finite_has_no_gradient_and_spoils_no_other(
    backend: str, metric: str
) -> None:
    x = normal(1, 33, 8)
    x[0, 3:30:9, 2] = torch.tensor([torch.nan, torch.inf, torch.nan])
    x[0, 7] = 0
    bad = x.isfinite().all(-1).logical_not()
    x.requires_grad_()
    kmeans(x, 4, metric=metric).centroids.square().sum().backward()
    assert bad.sum() == 3 and (x.grad[bad] == 0).all()
    assert x.grad.isfinite().all() and x.grad.count_nonzero() > 200


@given(st.data())
def test_tokens_that_are_not_finite_anywhere(backend: str, data: st.DataObject) -> None:
    """Also as seeds and as the token that a repair moves; an overflowing norm counts as well."""
    N, K = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 6))
    x = normal(2, N, 8, seed=data.draw(st.integers(0, 10**6)))
    for i in data.draw(st.lists(st.integers(0, N - 1), max_size=N)):
        x[:, i, data.draw(st.integers(0, 7))] = data.draw(
            st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38])
        )
    metric = data.draw(st.sampled_from(METRICS))
    got = kmeans(x, K, metric=metric)
    assert got.centroids.isfinite().all()
    assert_clusters(got, x, metric)
    assert_same_clustering(got.labels, expected_clusters(x, K, 10, metric))


@given(st.data())
def test_ragged_shapes(backend: str, data: st.DataObject) -> None:
    B, N, D, K = (
        data.draw(st.integers(low, high)) for low, high in [(0, 4), (0, 50), (2, 40), (1, 9)]
    )
    seed = data.draw(st.integers(0, 10**6))
    x = normal(B, N, D, seed=seed)
    valid = uniform(B, N, seed=seed) < data.draw(st.floats(0, 1))
    metric = data.draw(st.sampled_from(METRICS))
    iterations = data.draw(st.sampled_from([0, 1, 10]))
    got = kmeans(x, K, iterations=iterations, metric=metric, valid=valid)
    assert_clusters(got, x, metric, valid)
    assert_same_clustering(got.labels, expected_clusters(x, K, iterations, metric, valid))


@pytest.mark.parametrize("metric", METRICS)
def test_tokens_that_are_not_valid_change_nothing(backend: str, metric: str) -> None:
    x = normal(2, 100, 17, seed=11)
    alone = kmeans(x, 6, metric=metric)
    valid = torch.arange(150) % 3 != 1
    padded = torch.full((2, 150, 17), torch.nan)
    padded[:, valid] = x
    got = kmeans(padded, 6, metric=metric, valid=valid.expand(2, 150))
    assert_same_bits(got.labels[:, valid], alone.labels)
    assert (got.labels[:, ~valid] == -1).all()
    assert_same_bits((got.centroids, got.sizes), (alone.centroids, alone.sizes))
    assert_same_bits(kmeans(x, 6, metric=metric, valid=x[..., 0] > -99), alone)


@pytest.mark.parametrize("power", [-20, 3, 30])
def test_scaling_by_a_power_of_two_is_exact(backend: str, power: int) -> None:
    x = normal(2, 97, 17, seed=12)
    for metric in METRICS:
        plain = kmeans(x, 6, metric=metric)
        scaled = kmeans(x * 2.0**power, 6, metric=metric)
        factor = 2.0**power if metric == "euclidean" else 1
        assert torch.equal(scaled.labels, plain.labels)
        assert_same_bits(scaled.centroids, plain.centroids * factor)


def test_a_translation_moves_euclidean_centroids_only(backend: str) -> None:
    # multiples of 1/64, so that the sum is exact
    x = (normal(2, 97, 17, seed=13) * 64).round() / 64
    plain = kmeans(x, 6, metric="euclidean")
    moved = kmeans(x + 128, 6, metric="euclidean")
    assert torch.equal(moved.labels, plain.labels)
    assert_close(moved.centroids, plain.centroids + 128)


def test_cosine_ignores_the_length_of_each_token(backend: str) -> None:
    x = normal(2, 97, 17, seed=14)
    lengths = 2.0 ** (uniform(2, 97, 1) * 20).floor()
    assert_same_bits(kmeans(x * lengths, 6), kmeans(x, 6))


def test_surplus_clusters_are_zero(backend: str) -> None:
    x = normal(1, 5, 4)
    valid = torch.tensor([[True, False, True, False, True]])
    got = kmeans(x, 7, valid=valid, iterations=3)
    assert sorted(got.sizes[0].tolist()) == [0, 0, 0, 0, 1, 1, 1]
    assert (bits(got.centroids[0, (got.sizes[0] == 0).cpu()]) == 0).all()
    nothing = kmeans(x[:, :0], 3)
    assert nothing.sizes.tolist() == [[0, 0, 0]] and (nothing.centroids == 0).all()
