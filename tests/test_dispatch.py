"""The choice between the two GPU backends, a pure function: no GPU is needed."""

from __future__ import annotations

import pytest

from vmtc_kernels import _dispatch

HOPPER, BLACKWELL = (9, 0), (10, 0)


@pytest.mark.parametrize("capability", [HOPPER, BLACKWELL])
def test_one_launch_where_the_pairs_fit_eight_blocks(capability: tuple[int, int]) -> None:
    for tokens, clusters in [(448, 32), (448, 64), (576, 32), (16, 4), (632, 16)]:
        assert _dispatch.clustering(capability, tokens, clusters)[0] == "cuda"
    for tokens, clusters in [(680, 32), (1024, 4), (2880, 32), (16384, 1000), (448, 1024)]:
        assert _dispatch.clustering(capability, tokens, clusters)[0] == "triton"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
def test_other_gpus_have_no_such_launch(capability: tuple[int, int]) -> None:
    first, why = _dispatch.clustering(capability, 448, 32)
    assert first == "triton" and "compute capability" in why


def test_every_choice_gives_its_reason() -> None:
    reasons = {
        _dispatch.clustering(HOPPER, 448, 32),
        _dispatch.clustering(HOPPER, 2880, 32),
        _dispatch.clustering((8, 0), 448, 32),
        _dispatch.importance(HOPPER),
    }
    assert len(reasons) == 4 and all(len(why) > 15 for _, why in reasons)


def test_what_fits_is_monotone_and_within_the_chip() -> None:
    largest = [
        max(t for t in range(1, 1200) if _dispatch.fits_one_launch(t, K)) for K in (1, 16, 64, 256)
    ]
    assert largest == sorted(largest, reverse=True)
    for tokens in range(1, largest[0], 37):
        assert _dispatch.fits_one_launch(tokens, 1)
    # the pairs alone must fit
    assert 4 * largest[0] ** 2 <= 8 * _dispatch.BLOCK_BYTES
