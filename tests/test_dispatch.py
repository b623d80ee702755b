"""The choice between the two GPU backends, a pure function: no GPU is needed."""

from __future__ import annotations

import pytest

from vmtc_kernels import _dispatch
from vmtc_kernels._registry import OPERATORS

CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rounds_in_one_launch_come_first(capability: tuple[int, int]) -> None:
    for tokens, clusters in [(448, 32), (448, 64), (576, 32), (1024, 256), (16, 4)]:
        assert _dispatch.clustering(capability, tokens, clusters)[0] == "cuda"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_many_tokens_or_clusters_go_to_triton(capability: tuple[int, int]) -> None:
    for tokens, clusters in [(1025, 4), (2880, 32), (16384, 1000), (448, 600), (1024, 500)]:
        assert _dispatch.clustering(capability, tokens, clusters)[0] == "triton"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_attention_goes_to_triton(capability: tuple[int, int]) -> None:
    for name, operator in OPERATORS.items():
        if "focus" in name or name == "masked_attention":
            assert operator.prefer is not None
            assert operator.prefer(capability, None, None)[0] == "triton"


def test_every_choice_gives_its_reason() -> None:
    reasons = {
        _dispatch.clustering((9, 0), 448, 32),
        _dispatch.clustering((9, 0), 2880, 32),
        _dispatch.clustering((8, 0), 448, 32),
        _dispatch.importance((9, 0)),
        _dispatch.attention((9, 0)),
    }
    assert len(reasons) == 5 and all(len(why) > 15 for _, why in reasons)


def test_what_fits_is_monotone() -> None:
    most = [
        max(K for K in range(1, 800) if _dispatch.fits_one_launch(t, K)) for t in (1, 448, 1024)
    ]
    # as csrc/cuda/lloyd.cu has it
    assert most == [667, 570, 445]
