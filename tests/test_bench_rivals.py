"""Token reduction and k-means of others in the benchmarks: against loops, and stand-ins of packages
that check how they are called."""
# bench is a folder of the project and not installed
# ruff: noqa: E402

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import vmtc_kernels
from bench import merging, packages
from bench.focus import near

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02}
N = 37


def name(value):
    return getattr(value, "name", None) or str(value).replace("torch.", "")


def tokens(dtype=torch.float32, batch=3, count=N, d=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, count, 9, generator=generator).to(dtype)
    scores = torch.randn(batch, count, generator=generator).softmax(-1)
    return x, scores, torch.randn(batch, count, d, generator=generator).to(dtype)


# ---- tokens


@pytest.mark.parametrize("dtype", TOLERANCES, ids=name)
@pytest.mark.parametrize("reduction", merging.REDUCTIONS, ids=name)
def test_a_reduction_is_its_loop(reduction, dtype):
    x, scores, keys = tokens(dtype)
    for count in (1, 2, 9, 16, N - 1, N):
        got = reduction.reduce(x, scores, keys, count)
        loops = [reduction.loop(*image, count) for image in zip(x, scores, keys, strict=True)]
        assert got.dtype == dtype and got.shape == (3, count, 9)
        verdict = near(got, torch.stack(loops), TOLERANCES[dtype], rows=0.0)
        assert verdict.ok, (count, verdict.detail)


@pytest.mark.parametrize("reduction", merging.REDUCTIONS, ids=name)
def test_a_reduction_breaks_ties_as_its_loop_does(reduction):
    """Whole numbers, whose cosines are exact: ties are true ones."""
    x, _, _ = tokens(count=32)
    keys = torch.eye(4)[torch.arange(96).view(3, 32) * 7 % 11 % 4]
    scores = torch.ones(3, 32) / 64
    # which of equal scores dominate, and which of equally near ones are nearest, is open
    if reduction.name == "VisionZip":
        scores = tokens(count=32)[1]
    if reduction.name.startswith("PruMerge"):
        keys = tokens(count=32)[2]
    for count in (3, 11, 20):
        got = reduction.reduce(x, scores, keys, count)
        loops = [reduction.loop(*image, count) for image in zip(x, scores, keys, strict=True)]
        assert near(got, torch.stack(loops), 1e-5, rows=0.0).ok, count


@pytest.mark.parametrize("reduction", merging.REDUCTIONS, ids=name)
def test_a_reduction_asks_the_host_nothing_and_compiles(reduction):
    """So that a graph can hold it: a tensor without values can answer none."""
    x, scores, keys = tokens()
    compiled = torch.compile(reduction.reduce, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x, scores, keys, 9), reduction.reduce(x, scores, keys, 9), rtol=0, atol=0
    )
    half = torch.bfloat16
    with FakeTensorMode():
        got = reduction.reduce(
            torch.empty(3, N, 9, dtype=half), torch.empty(3, N), torch.empty(3, N, 5, dtype=half), 9
        )
        keys = torch.empty(3, N, 5, dtype=half, device="cuda")
        like = merging._products(keys, keys.mT)
    assert (got.shape, got.dtype) == ((3, 9, 9), half)
    assert (like.dtype, like.device.type) == (torch.float32, "cuda")


def test_tome_by_hand():
    keys = torch.tensor([[1.0, 0.0], [4.0, 0.4], [0.0, 3.0], [1.0, 1.0], [1.0, -0.1]])[None]
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])[None, :, None]
    # even tokens 0, 2, 4 have their edges to 1, 3 and 1, of cosines 0.995, 0.707 and 0.980
    for count, merged, sizes in (
        (5, [1, 2, 4, 8, 16], [1, 1, 1, 1, 1]),
        (4, [4, 16, 1.5, 8], [1, 1, 2, 1]),
        (3, [4, 19 / 3, 8], [1, 3, 1]),
        # the only odd token now is the merged one, of key (2, 0.1): 8 is nearer to it than 4
        (2, [4, 27 / 4], [1, 4]),
        (1, [31 / 5], [5]),
    ):
        got, size = merging.tome(x, keys, count)
        assert got.flatten().tolist() == pytest.approx(merged), count
        assert size.tolist() == [sizes]


def test_tome_weights_with_sizes():
    x, _, keys = tokens()
    for count in (1, 7, 25):
        merged, sizes = merging.tome(x, keys, count)
        assert sizes.shape == (3, count) and (sizes.sum(1) == N).all() and (sizes >= 1).all()
        assert sizes[0].tolist() == merging.tome_loop(x[0], keys[0], count)[1].tolist()
        torch.testing.assert_close((merged * sizes[..., None]).sum(1), x.sum(1))


def test_tome_matches_half_types_as_exactly():
    """Though a step's keys are sums of rounded ones, and 601 tokens more than bfloat16 counts."""
    keys = torch.randn(1, 601, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = keys[..., :1]
    sizes = merging.tome(x, keys, 200)[1]
    assert sizes[0].tolist() == merging.tome_loop(x[0], keys[0], 200)[1].tolist()
    assert merging.tome(x, keys, 1)[1].tolist() == [[601]]


def test_prumerge_by_hand():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0])[None, :, None]
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    keys = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 2.0], [1.0, 7.0]])[None]
    # 1 and 3 stay; nearest to 1 is 0, to 3 is 2; the last is made of 0 and 2
    got = merging.prumerge(x, scores, keys, 3, neighbours=1)
    assert got.flatten().tolist() == pytest.approx([2 + 0.1, 8 + 0.2 * 4, 0.1 + 0.2 * 4])
    # half by score, which is 1; of the rest 0, 2, 3 the middle, whose nearest is 3, which goes
    got = merging.prumerge(x, scores, keys, 3, by_place=0.5, neighbours=1)
    assert got.flatten().tolist() == pytest.approx([2 + 0.1, 4 + 0.3 * 8, 0.1 + 0.3 * 8])
    # those that stay are neighbours too, and there are no more than the others
    got = merging.prumerge(x, scores, keys, 2, neighbours=32)
    assert got.flatten().tolist() == pytest.approx([2 + 0.1 + 0.8 + 2.4, 0.1 + 0.8 + 2.4])


def test_prumerge_takes_places_evenly():
    scores = torch.zeros(1, 100)
    scores[0, 50] = 1.0
    kept = merging._kept(scores, 12, by_place=0.75)
    assert kept[0, :3].tolist() == [50, 0, 1]
    steps = kept[0, 3:].diff()
    assert len(set(kept[0].tolist())) == 12 and steps.min() >= 10 and steps.max() <= 12


# ---- packages of k-means

DRAWN = torch.randperm(200, generator=torch.Generator().manual_seed(3))


def lloyd(x, first, rounds):
    """Centroids and labels of one image."""
    labels = torch.cdist(x, first).argmin(1)
    for _ in range(rounds):
        first = torch.stack([x[labels == k].mean(0) for k in range(len(first))])
        labels = torch.cdist(x, first).argmin(1)
    return first, labels


class FastKMeans:
    """As fastkmeans 0.5 draws its seeds."""

    def __init__(self, d, k, niter=25, tol=1e-8, gpu=True, seed=0):
        assert gpu is False
        self.k, self.niter, self.seed = k, niter, seed

    def fit_predict(self, data):
        torch.manual_seed(self.seed)
        x = torch.from_numpy(data)
        return lloyd(x, x[torch.randperm(len(x))[: self.k]], self.niter)[1].numpy()


class FlashKMeans:
    """As the plain torch of flash-kmeans 0.3.1: labels older than the centroids."""

    @staticmethod
    def batch_kmeans_Euclid_torch_native(
        x, n_clusters, max_iters=100, tol=0.0, init_centroids=None
    ):
        assert init_centroids.is_contiguous() and init_centroids.shape[1] == n_clusters
        found = [lloyd(*image, max_iters)[0] for image in zip(x, init_centroids, strict=True)]
        assert tol > 0
        return torch.zeros(x.shape[:2], dtype=torch.int32), torch.stack(found), max_iters

    @staticmethod
    def euclid_assign_torch_native_chunked(x, centroids, x_sq):
        assert x_sq.shape == x.shape[:2]
        return torch.cdist(x, centroids).argmin(2).int()


STAND_INS = {
    "fastkmeans": SimpleNamespace(FastKMeans=FastKMeans),
    "flash_kmeans.torch_fallback": FlashKMeans,
}


@pytest.mark.parametrize("stand_in", [True, False])
@pytest.mark.parametrize("which", range(2), ids=list(STAND_INS))
def test_packages_start_from_the_same_seeds(which, stand_in, monkeypatch):
    x = torch.randn(2, 200, 32, generator=torch.Generator().manual_seed(1))
    seeds = torch.tensor([20, 60, 100, 140, 180])
    module = list(STAND_INS)[which]
    if stand_in:
        monkeypatch.setitem(sys.modules, module.split(".")[0], SimpleNamespace())
        monkeypatch.setitem(sys.modules, module, STAND_INS[module])
    else:
        pytest.importorskip(module)
    package = packages.packages()[which]
    assert package.missing is None
    labels = package.prepare(x, seeds, 2)()
    assert labels.dtype == torch.int64

    def ours(rounds):
        with vmtc_kernels.use_backend("reference"):
            return vmtc_kernels.kmeans(x, 5, iterations=rounds, metric="euclidean").labels.long()

    # and so the labels are ours; without structure they hang on the seeds, and on the rounds
    assert torch.equal(labels, ours(2))
    assert (labels[0] != lloyd(x[0], x[0, seeds + 1], 2)[1]).float().mean() > 0.1
    assert (labels != ours(5)).float().mean() > 0.02


def test_missing_packages_are_told(monkeypatch):
    for module in ("fastkmeans", "flash_kmeans"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "flash_kmeans.torch_fallback", raising=False)
    assert all("does not import" in package.missing for package in packages.packages())
