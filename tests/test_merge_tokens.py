"""merge_tokens on every backend against its definition and its own invariants."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import (
    FLOATS,
    METRICS,
    WEIGHTINGS,
    array,
    assert_close,
    assert_same_bits,
    normal,
    peak_memory,
    place,
    ragged,
    uniform,
)
from clusters import assert_merged, assert_same_owners
from contract import OperatorContract, results
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vmtc_kernels import merge_tokens, use_backend


class TestContract(OperatorContract):
    op = "merge_tokens"
    no_gradient = ("features",)


SIZES = [
    (1, 1, 1, 0),
    (1, 3, 0, 1),
    (2, 17, 1, 1),
    (7, 1, 2, 3),
    (7, 3, 3, 4),
    (33, 64, 32, 1),
    (33, 17, 0, 32),
    (33, 257, 33, 0),
    (97, 257, 20, 5),
    (577, 64, 128, 32),
]


@pytest.mark.parametrize("masked", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize(("N", "D", "P", "K"), SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_the_definition(
    backend: str, dtype: torch.dtype, N: int, D: int, P: int, K: int, masked: bool
) -> None:
    B = 1 if N > 500 else 5
    x, scores = normal(B, N, D, dtype=dtype, seed=3), normal(B, N, seed=23)
    valid = ragged(B, N) if masked else None
    for metric, weighting in zip(METRICS, WEIGHTINGS, strict=True):
        got = merge_tokens(x, scores, P, K, metric=metric, weighting=weighting, valid=valid)
        assert_merged(got, x, scores, P, K, weighting, valid)
        # cosine of one feature is hardly anything but ties
        if K and (D > 1 or metric == "euclidean"):
            assert_same_owners(got, x, scores, P, K, 10, metric, valid)


@pytest.mark.parametrize("metric", METRICS)
def test_sends_every_token_where_the_reference_does(backend: str, metric: str) -> None:
    """At a usual size: every label is the same, and so every merged value nearly is."""
    x = normal(1, 576, 1024) + normal(1, 48, 1024, seed=1).repeat(1, 12, 1)
    scores = uniform(1, 576)
    got = merge_tokens(x, scores, 128, 32, metric=metric)
    with use_backend("reference"):
        want = merge_tokens(x, scores, 128, 32, metric=metric)
    assert torch.equal(got.owner, want.owner)
    assert_close(got.tokens, want.tokens)


def test_float64_agrees_with_the_definition() -> None:
    x, scores = normal(2, 97, 17, dtype=torch.float64), normal(2, 97, dtype=torch.float64)
    with use_backend("reference"):
        got = merge_tokens(x, scores, 20, 5)
    assert_merged(got, x, scores, 20, 5)
    assert_same_owners(got, x, scores, 20, 5)


@pytest.mark.parametrize("iterations", [0, 1, 50])
def test_features_of_another_size_and_dtype_are_clustered(backend: str, iterations: int) -> None:
    x, scores = normal(2, 97, 9, dtype=torch.bfloat16), uniform(2, 97, dtype=torch.float16)
    for dtype, metric in zip(FLOATS[:2], METRICS, strict=True):
        features = normal(2, 97, 32, dtype=dtype, seed=4)
        got = merge_tokens(
            x, scores, 20, 5, iterations=iterations, metric=metric, features=features
        )
        assert_merged(got, x, scores, 20, 5)
        assert_same_owners(got, features, scores, 20, 5, iterations, metric)


def test_ties_between_scores_go_to_the_smaller_position(backend: str) -> None:
    x = normal(1, 10, 3)
    # 0 and -0 tie, and so do NaN and -inf
    scores = [torch.nan, 0.0, -torch.inf, -0.0, 1.0, -torch.nan, 0.0, torch.inf, -2.0, 1.0]
    order = [7, 4, 9, 1, 3, 6, 8, 0, 2, 5]
    for dtype in FLOATS:
        for P in range(1, 11):
            got = merge_tokens(x, torch.tensor([scores], dtype=dtype), P, 0)
            assert array(got.owner[0]).argsort(kind="stable")[-P:].tolist() == sorted(order[:P])
            assert_same_bits(got.tokens[0], x[0, sorted(order[:P])])


@given(st.data())
def test_all_kinds_of_scores(backend: str, data: st.DataObject) -> None:
    N = data.draw(st.integers(1, 24))
    kind = st.sampled_from([0.0, -0.0, 0.5, 0.5, 3.0, -1.0, -torch.inf, torch.nan, 1e-30, 1e30])
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    scores = torch.tensor(data.draw(st.lists(kind, min_size=N, max_size=N)), dtype=dtype)[None]
    P = data.draw(st.integers(0, N))
    K = data.draw(st.integers(0 if P else 1, max(N - P, 0 if P else 1)))
    x = normal(1, N, 5, dtype=data.draw(st.sampled_from(FLOATS)), seed=N)
    weighting = data.draw(st.sampled_from(WEIGHTINGS))
    got = merge_tokens(x, scores, P, K, weighting=weighting)
    assert_merged(got, x, scores, P, K, weighting)


@pytest.mark.parametrize("value", [0.0, -3.0, torch.nan, -torch.inf])
def test_a_cluster_without_weight_is_averaged(backend: str, value: float) -> None:
    x, scores = normal(2, 33, 8), torch.full((2, 33), value)
    assert_same_bits(
        merge_tokens(x, scores, 0, 4), merge_tokens(x, scores, 0, 4, weighting="uniform")
    )


def test_scores_whose_sum_overflows_still_weigh(backend: str) -> None:
    x, scores = normal(1, 33, 8), 3e38 * (0.5 + 0.5 * uniform(1, 33))
    got = merge_tokens(x, scores, 0, 2)
    assert_merged(got, x, scores, 0, 2)


def test_weights_are_the_scores(backend: str) -> None:
    """Worked by hand: one cluster of four tokens, of which two weigh nothing."""
    x = torch.tensor([[[0.0, 4.0], [8.0, 0.0], [100.0, 100.0], [50.0, 0.0]]])
    scores = torch.tensor([[0.75, 0.25, -1.0, torch.nan]])
    assert merge_tokens(x, scores, 0, 1).tokens.tolist() == [[[2.0, 3.0]]]
    assert merge_tokens(x, scores, 0, 1, weighting="uniform").tokens.tolist() == [[[39.5, 26.0]]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_primary_tokens_keep_their_bits(backend: str, dtype: torch.dtype) -> None:
    integer = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    generator = torch.Generator().manual_seed(0)
    limit = torch.iinfo(integer)
    pattern = torch.randint(
        limit.min, limit.max, (2, 33, 17), dtype=integer, generator=generator, device="cpu"
    )
    # every bit pattern may occur: NaN with a payload, -0, subnormal numbers
    pattern[:, :, 0] = -1
    pattern[:, :, 1] = limit.min
    pattern[:, :, 2] = 3
    x = place(pattern.view(dtype))
    assert x.isnan().any()
    assert_same_bits(merge_tokens(x, uniform(2, 33), 33, 0).tokens, x)


@given(st.data())
def test_ragged_shapes(backend: str, data: st.DataObject) -> None:
    B, N, D, P = (
        data.draw(st.integers(low, high)) for low, high in [(0, 4), (0, 50), (2, 40), (0, 30)]
    )
    K = data.draw(st.integers(0 if P else 1, 9))
    seed = data.draw(st.integers(0, 10**6))
    dtype = data.draw(st.sampled_from(FLOATS))
    x, scores = normal(B, N, D, dtype=dtype, seed=seed), normal(B, N, seed=seed + 1)
    valid = uniform(B, N, seed=seed) < data.draw(st.floats(0, 1))
    metric = data.draw(st.sampled_from(METRICS))
    got = merge_tokens(x, scores, P, K, metric=metric, valid=valid)
    assert_merged(got, x, scores, P, K, valid=valid)
    if K:
        assert_same_owners(got, x, scores, P, K, 10, metric, valid)


def test_fewer_valid_tokens_than_slots(backend: str) -> None:
    """Primary slots are filled first; what is left over is zero and of size 0."""
    x, scores = normal(4, 9, 3), uniform(4, 9)
    valid = torch.arange(9)[None] < torch.tensor([0, 1, 4, 5])[:, None]
    got = merge_tokens(x, scores, 4, 2, valid=valid)
    assert_merged(got, x, scores, 4, 2, valid=valid)
    assert got.sizes.tolist() == [[0] * 6, [1] + [0] * 5, [1] * 4 + [0] * 2, got.sizes[3].tolist()]
    assert sorted(got.sizes[3, 4:].tolist()) == [0, 1]
    no_tokens = merge_tokens(x[:, :0], scores[:, :0], 4, 2, valid=valid[:, :0])
    assert (no_tokens.tokens == 0).all() and (no_tokens.sizes == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_spoils_only_its_slot(
    backend: str, bad: float, dtype: torch.dtype
) -> None:
    # one redundant token after a multiple of 2K moves no seed
    x, scores = normal(2, 47, 24, dtype=dtype), 0.1 + uniform(2, 47)
    scores[:, 46] = 0.05
    without = merge_tokens(x[:, :46].contiguous(), scores[:, :46].contiguous(), 6, 5)
    x[:, 46, 3] = bad
    got = merge_tokens(x, scores, 6, 5)
    assert_merged(got, x, scores, 6, 5)
    assert torch.equal(got.owner[:, :46], without.owner) and (got.owner[:, 46] == 6).all()
    others = torch.arange(11) != 6
    assert_same_bits(got.tokens[:, others], without.tokens[:, others])


def test_spoiled_features_do_not_spoil_tokens(backend: str) -> None:
    x, scores, features = normal(2, 33, 8), uniform(2, 33), normal(2, 33, 8, seed=1)
    features[:, 5:20:5] = torch.nan
    got = merge_tokens(x, scores, 3, 4, features=features)
    assert got.tokens.isfinite().all()
    assert_merged(got, x, scores, 3, 4)
    assert_same_owners(got, features, scores, 3, 4)


def test_gradients_stay_finite_outside_a_spoiled_slot(backend: str) -> None:
    x, scores = normal(1, 33, 8), 0.1 + uniform(1, 33)
    x[0, 20, 2] = torch.nan
    scores[0, 20] = 0.05
    x.requires_grad_(), scores.requires_grad_()
    got = merge_tokens(x, scores, 4, 3)
    spoiled = got.owner[0, 20]
    assert got.tokens[0, spoiled].isnan().any()
    got.tokens.sum().backward()
    others = got.owner[0] != spoiled
    assert 0 < others.sum() < 33
    assert x.grad.isfinite().all()
    assert scores.grad[0, others].isfinite().all()
    # a primary token passes its gradient through, and its score has none
    primary = got.owner[0] < 4
    assert (x.grad[0, primary] == 1).all() and (scores.grad[0, primary] == 0).all()


def test_a_loss_without_the_spoiled_slot_has_finite_gradients(backend: str) -> None:
    x, scores = normal(1, 33, 8), 0.1 + uniform(1, 33)
    x[0, 20, 2] = torch.nan
    scores[0, 20] = 0.05
    x.requires_grad_(), scores.requires_grad_()
    got = merge_tokens(x, scores, 4, 3)
    healthy = torch.arange(7) != got.owner[0, 20]
    got.tokens[0, healthy].sum().backward()
    assert x.grad.isfinite().all() and scores.grad.isfinite().all()
    assert scores.grad.count_nonzero() > 0


def test_scores_of_no_weight_have_no_gradient(backend: str) -> None:
    x, scores = normal(1, 12, 4), torch.tensor([[1.0, -1.0, torch.nan, 0.0] * 3])
    x.requires_grad_(), scores.requires_grad_()
    merge_tokens(x, scores, 0, 1).tokens.square().sum().backward()
    assert (scores.grad[0, scores[0].isnan() | (scores[0] <= 0)] == 0).all()
    assert (scores.grad[0, scores[0] > 0] != 0).all()
    assert (x.grad[0, (scores[0] > 0).logical_not()] == 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("power", [-20, 4])
def test_scaling_x_by_a_power_of_two_scales_the_merge(
    backend: str, power: int, metric: str
) -> None:
    x, scores = normal(2, 97, 17), uniform(2, 97)
    plain = merge_tokens(x, scores, 20, 5, metric=metric)
    scaled = merge_tokens(x * 2.0**power, scores, 20, 5, metric=metric)
    assert_same_bits(scaled.tokens, plain.tokens * 2.0**power)
    assert torch.equal(scaled.owner, plain.owner)


def test_scaling_the_scores_by_a_power_of_two_changes_nothing(backend: str) -> None:
    x, scores = normal(2, 97, 17), normal(2, 97)
    assert_same_bits(merge_tokens(x, scores, 20, 5), merge_tokens(x, scores * 8, 20, 5))


def test_a_translation_moves_the_merge(backend: str) -> None:
    x, scores = (normal(2, 97, 17) * 64).round() / 64, uniform(2, 97)
    plain = merge_tokens(x, scores, 20, 5, metric="euclidean")
    moved = merge_tokens(x + 128, scores, 20, 5, metric="euclidean")
    assert torch.equal(moved.owner, plain.owner)
    assert_close(moved.tokens, plain.tokens + 128)


def test_tokens_that_are_not_valid_change_nothing(backend: str) -> None:
    x, scores = normal(2, 96, 17), uniform(2, 96)
    alone = merge_tokens(x, scores, 20, 5)
    padded, padded_scores = torch.full((2, 120, 17), torch.nan), torch.full((2, 120), 9.0)
    valid = torch.arange(120) % 5 != 2
    padded[:, valid], padded_scores[:, valid] = x, scores
    got = merge_tokens(padded, padded_scores, 20, 5, valid=valid.expand(2, 120))
    assert_same_bits((got.tokens, got.sizes), (alone.tokens, alone.sizes))
    assert_same_bits(got.owner[:, valid], alone.owner)
    assert (got.owner[:, ~valid] == -1).all()
    assert_same_bits(merge_tokens(x, scores, 20, 5, valid=scores > -1), alone)


def test_features_default_to_x(backend: str) -> None:
    x, scores = normal(2, 97, 17), uniform(2, 97)
    assert_same_bits(merge_tokens(x, scores, 20, 5), merge_tokens(x, scores, 20, 5, features=x))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 1e4), (torch.bfloat16, 1e15), (torch.float32, 1e15)],
    ids=str,
)
def test_large_magnitudes(backend: str, dtype: torch.dtype, scale: float) -> None:
    x = (scale * normal(2, 97, 17)).clamp(-6 * scale, 6 * scale).to(dtype)
    scores = scale * uniform(2, 97)
    for metric in METRICS:
        got = merge_tokens(x, scores, 20, 5, metric=metric)
        assert got.tokens.isfinite().all()
        assert_merged(got, x, scores, 20, 5)
        assert_same_owners(got, x, scores, 20, 5, 10, metric)


def test_a_token_whose_norm_overflows_still_merges_its_value(backend: str) -> None:
    x, scores = normal(1, 33, 8), uniform(1, 33)
    x[0, 7] = 1e38
    scores[0, 7] = 0
    got = merge_tokens(x, scores, 3, 4, weighting="uniform")
    assert got.tokens.isfinite().all() and got.tokens.max() > 1e36
    assert_merged(got, x, scores, 3, 4, "uniform")


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_compiles_to_code_around_the_operator() -> None:
    """Through the default backend of torch.compile, between other operations that it fuses."""

    def layer(x: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        tokens, owner, sizes = merge_tokens((2 * x).transpose(1, 2), scores.sigmoid(), 4, 3)
        return tokens * 2 + 1, owner + 1, sizes

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (7, 2):
        inputs = normal(batch, 16, 33), normal(batch, 33)
        assert_same_bits(compiled(*inputs), layer(*inputs))


@pytest.mark.parametrize("batch", [1, 4])
def test_workspace(kernel: str, batch: int) -> None:
    """At most one and a half times the redundant tokens in float32, beside the results."""
    N, P, D = 576, 128, 1024
    x, scores = normal(batch, N, D), uniform(batch, N)
    size = sum(t.nbytes for t in results(merge_tokens(x, scores, P, 32)))
    peak = peak_memory(lambda: merge_tokens(x, scores, P, 32, metric="euclidean"))
    assert size < peak <= size + 1.5 * batch * (N - P) * D * 4


def test_more_slots_than_tokens_are_fine_with_valid(backend: str) -> None:
    x, scores = normal(2, 8, 3), uniform(2, 8)
    assert merge_tokens(x, scores, 7, 7, valid=scores >= 0).tokens.shape == (2, 14, 3)
