"""What is particular to the Triton kernels: their two forms, and the choices of their launchers.

The operators' own tests run on the backend "triton" too. The kernels need a GPU, or
TRITON_INTERPRET=1 in the environment before Python starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import (
    BACKENDS,
    FLOATS,
    METRICS,
    assert_close,
    assert_same_bits,
    assert_same_clustering,
    device_of,
    normal,
    ragged,
    uniform,
)
from clusters import assert_clusters, assert_merged, assert_same_owners, expected_clusters
from hypothesis import given
from hypothesis import strategies as st

from vmtc_kernels import kmeans, merge_tokens, use_backend

pytest.importorskip("triton", reason="triton is not installed")

from vmtc_kernels.triton_kernels import kmeans as launcher
from vmtc_kernels.triton_kernels import lloyd, pairs, primary
from vmtc_kernels.triton_kernels.launch import row_unit

runs = pytest.mark.skipif("triton" not in BACKENDS, reason="no GPU and not TRITON_INTERPRET=1")
FORMS = ("pairs", "direct")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way to cluster, whatever the launcher would choose."""
    monkeypatch.setattr(launcher, "form", lambda *_: request.param)
    former = torch.get_default_device()
    if device_of("triton") != former.type:
        torch.set_default_device(device_of("triton"))
    with use_backend("triton"):
        yield request.param
    if torch.get_default_device() != former:
        torch.set_default_device(None)


@runs
@pytest.mark.parametrize(("N", "D", "K"), [(1, 1, 1), (7, 17, 5), (33, 64, 40), (130, 33, 9)])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_both_forms_agree_with_the_definition(
    form: str, dtype: torch.dtype, metric: str, N: int, D: int, K: int
) -> None:
    for valid in (None, ragged(5, N)):
        x = normal(5, N, D, dtype=dtype, seed=3)
        got = kmeans(x, K, metric=metric, valid=valid)
        assert_clusters(got, x, metric, valid)
        if metric == "euclidean" or D > 1:
            assert_same_clustering(got.labels, expected_clusters(x, K, 10, metric, valid))


@runs
@pytest.mark.parametrize("metric", METRICS)
def test_both_forms_give_the_same_labels(form: str, metric: str) -> None:
    x, scores = normal(2, 97, 48), uniform(2, 97)
    got = merge_tokens(x, scores, 20, 6, metric=metric)
    assert_merged(got, x, scores, 20, 6)
    assert_same_owners(got, x, scores, 20, 6, 10, metric)
    with use_backend("reference"):
        assert torch.equal(got.owner, merge_tokens(x, scores, 20, 6, metric=metric).owner)


@runs
@pytest.mark.parametrize("rounds", [0, 1, 3, 30])
@pytest.mark.parametrize("metric", METRICS)
def test_both_forms_stop_when_they_should(form: str, metric: str, rounds: int) -> None:
    x = normal(2, 121, 3, seed=5)
    images = expected_clusters(x, 6, rounds, metric)
    assert all(image.clear for image in images)
    assert_same_clustering(kmeans(x, 6, iterations=rounds, metric=metric).labels, images)


@runs
@pytest.mark.parametrize("metric", METRICS)
def test_both_forms_repair_identical_tokens(form: str, metric: str) -> None:
    x = torch.tensor([3.0, 0.0, 4.0]).expand(2, 36, 3)
    assert kmeans(x, 5, metric=metric).labels.tolist() == 2 * [[1, 2, 3, 4] + 32 * [0]]


@runs
@given(st.data())
def test_both_forms_break_exact_ties(form: str, data: st.DataObject) -> None:
    N, D, K = (
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 12)),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    x = torch.randint(0, 3, (1, N, D), generator=generator, device="cpu").float()
    x = x.to(torch.get_default_device())
    got = kmeans(x, K, iterations=0, metric="euclidean")
    images = expected_clusters(x, K, 0, "euclidean", exact_start=True)
    assert_same_clustering(got.labels, images, exactly=True)


@runs
@given(st.data())
def test_both_forms_bear_tokens_that_are_not_finite(form: str, data: st.DataObject) -> None:
    N, K = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 6))
    x = normal(1, N, 8, seed=data.draw(st.integers(0, 10**6)))
    bad = st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38])
    for i in data.draw(st.lists(st.integers(0, N - 1), max_size=N)):
        x[:, i, data.draw(st.integers(0, 7))] = data.draw(bad)
    metric = data.draw(st.sampled_from(METRICS))
    got = kmeans(x, K, metric=metric)
    assert_clusters(got, x, metric)
    assert_same_clustering(got.labels, expected_clusters(x, K, 10, metric))


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_distant_groups_of_close_tokens_keep_their_digits(form: str, dtype: torch.dtype) -> None:
    """No single offset helps: |a|^2 + |b|^2 - 2 a.b is nothing but rounding in both groups."""
    D, K = 17, 8
    step = 2.0**-6 if dtype == torch.float32 else 1.0
    centers = step * (8 * normal(K, D, seed=9)).round()
    side = torch.where(torch.arange(K) % 2 == 0, 1000.0, -1000.0)[:, None]
    x = (centers + side)[torch.arange(96) * K // 96] + step * normal(2, 96, D, seed=10).round() / 2
    x = x.to(dtype)
    got = kmeans(x, K, metric="euclidean")
    images = expected_clusters(x, K, 10, "euclidean")
    assert all(image.clear for image in images)
    assert_clusters(got, x, "euclidean")
    assert_same_clustering(got.labels, images)
    assert_same_bits(got, kmeans(x, K, metric="euclidean"))


def test_form_is_chosen_by_work() -> None:
    assert launcher.form(448, 1024, 32, 10) == "pairs"
    assert launcher.form(448, 4096, 32, 10) == "pairs"
    # video: more tokens than a program holds
    assert launcher.form(lloyd.LARGEST_CAPACITY + 1, 4096, 1024, 10) == "direct"
    # a single assignment, or two clusters: less work than all pairs
    assert launcher.form(900, 1024, 32, 0) == "direct"
    assert launcher.form(900, 1024, 2, 10) == "direct"
    # few features: all pairs are more bytes than the tokens in every round
    assert launcher.form(1000, 64, 64, 10) == "direct"
    assert launcher.form(200, 8, 1, 0) == "pairs"
    # what a program sorts holds no larger number of a cluster
    assert launcher.form(4, 1, lloyd.MOST_CLUSTERS, 1) == "pairs"
    assert launcher.form(4, 1, lloyd.MOST_CLUSTERS + 1, 1) == "direct"
    last = (lloyd.MOST_CLUSTERS - 1 << 11) | (lloyd.LARGEST_CAPACITY - 1 << 1) | 1
    assert last < 2**31 - 1


@pytest.mark.parametrize("arch", [(8, 0), (9, 0), (10, 0)])
def test_tiles_fill_the_chip_before_they_grow(arch: tuple[int, int]) -> None:
    batches = (1, 4, 8, 64, 256)
    sides = [pairs.tile(B, 448, torch.bfloat16, "cosine", 8, arch).BLOCK_R for B in batches]
    assert sides == sorted(sides) and sides[0] == 32 and sides[-1] == 128
    for dtype, metric, unit in itertools.product(FLOATS, METRICS, (1, 8)):
        chosen = {pairs.tile(B, 448, dtype, metric, unit, arch) for B in batches}
        assert chosen <= set(pairs.tiles(dtype, metric, unit))


@runs
@pytest.mark.parametrize("D", [71, 72])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_tile_gives_the_pairs(
    dtype: torch.dtype, metric: str, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, valid = normal(3, 150, D, dtype=dtype), ragged(3, 150)
    x, valid = x.to(device_of("triton")), valid.to(device_of("triton"))
    sizes = torch.empty(3, 1, dtype=torch.int32, device=x.device)
    selection = primary.select(x, None, 0, valid, sizes)
    assert selection.counts.tolist() == valid.sum(1).tolist()
    for choice in pairs.tiles(dtype, metric, row_unit(x)):
        monkeypatch.setattr(pairs, "tile", lambda *_, choice=choice: choice)
        values, norms = pairs.pairs(x, selection, metric)
        for b in range(3):
            rows = x[b, valid[b]].double()
            R = len(rows)
            products = rows @ rows.T
            expected = products if metric == "cosine" else torch.cdist(rows, rows) ** 2
            assert_close(values[b, :R, :R], expected)
            assert_close(norms[b, :R], products.diagonal())
