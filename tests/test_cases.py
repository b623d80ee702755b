"""The tests' own tools: that memory is poisoned, and that the comparisons can fail."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import (
    FLOATS,
    array,
    assert_close,
    assert_same_bits,
    assert_same_clustering,
    normal,
    peak_memory,
    strided,
)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_fresh_memory_is_poisoned(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 5, dtype=dtype)
    fresh = [torch.empty(4, dtype=dtype), x.new_empty(3, 2), torch.empty_like(x)]
    fresh += [
        torch.empty_strided((3, 2), (2, 1), dtype=dtype),
        torch.empty(0, dtype=dtype).resize_(3),
    ]
    assert all(tensor.isnan().all() for tensor in fresh)
    largest = torch.iinfo(torch.int32).max
    assert (torch.empty(9, dtype=torch.int32) == largest).all()
    assert torch.empty(9, dtype=torch.bool).all()


def test_tolerances_bite() -> None:
    for dtype in FLOATS:
        x = normal(64, 64).to(dtype)
        assert_close(x, array(x))
        for wrong in (array(x) * (1 + 4e-2), array(x) + 1e-1 * (np.arange(64) == 3)):
            with pytest.raises(AssertionError):
                assert_close(x, wrong)
        x[3, 3] = torch.nan
        with pytest.raises(AssertionError, match="not finite"):
            assert_close(x, np.nan_to_num(array(x)))
    x = normal(64, 64)
    with pytest.raises(AssertionError):
        assert_close(x, array(x) * (1 + 1e-5))
    with pytest.raises(AssertionError):
        assert_close(x.int(), array(x.int()) + (np.arange(64) == 5))


def test_bits_bite() -> None:
    x = torch.tensor([0.0, torch.nan])
    assert_same_bits(x, x.clone())
    for wrong in (torch.tensor([-0.0, torch.nan]), x.double(), x[:1], torch.tensor([0.0, 1.0])):
        with pytest.raises(AssertionError):
            assert_same_bits(x, wrong)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_clusterings_that_differ_are_told_apart(metric: str) -> None:
    x = array(normal(200, 16))
    image = oracle.kmeans(x, 6, 10, metric)
    assert image.clear
    labels = torch.tensor(image.labels)[None]
    assert_same_clustering(labels, [image])
    wrong = labels.clone()
    wrong[0, 7] = (wrong[0, 7] + 1) % 6
    with pytest.raises(AssertionError, match="1 labels differ"):
        assert_same_clustering(wrong, [image])
    # even after a near tie somewhere, a token that was at none keeps its label
    image.clear = False
    with pytest.raises(AssertionError):
        assert_same_clustering(wrong, [image])
    unlabelled = labels.clone()
    unlabelled[0, 7] = -1
    with pytest.raises(AssertionError, match="wrong tokens"):
        assert_same_clustering(unlabelled, [image])


def test_near_ties_are_accepted_up_to_a_number() -> None:
    # token 2 is as near to one seed as to the other, but for the last bits
    line = np.array([-1.0, -1.0, 1e-7, 1.0, 1.0])
    image = oracle.kmeans(line[:, None], 2, 0, "euclidean")
    assert not image.clear and image.labels.tolist() == [0, 0, 1, 1, 1]
    assert_same_clustering(torch.tensor([[0, 0, 0, 1, 1]]), [image])
    with pytest.raises(AssertionError):
        assert_same_clustering(torch.tensor([[0, 0, 0, 1, 1]]), [image], exactly=True)
    many = np.concatenate([[-1.0] * 20, [1e-7] * 10, [1.0] * 20])
    image = oracle.kmeans(many[:, None], 2, 0, "euclidean")
    with pytest.raises(AssertionError, match="10 labels differ, at most 1 may"):
        assert_same_clustering(torch.tensor([20 * [0] + 10 * [0] + 20 * [1]]), [image])


def test_strided_copies_are_not_contiguous() -> None:
    for shape in [(2, 33), (2, 33, 5), (2, 3, 9, 4)]:
        x = normal(*shape)
        for other in strided(x).values():
            assert not other.is_contiguous() and torch.equal(other, x)


def test_peak_memory_counts_what_lives_at_once() -> None:
    def work() -> torch.Tensor:
        torch.empty(1000, dtype=torch.float32)
        torch.empty(3000, dtype=torch.float32)
        return torch.empty(2000, dtype=torch.float32)

    assert peak_memory(work) == 12000
    x = torch.empty(1000)
    # and a scalar or two
    assert 8000 <= peak_memory(lambda: x + x + 1) < 8100
