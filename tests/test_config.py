"""VMTCConfig and CMAIConfig: their checks, and that they call the operators they name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from cases import assert_close, assert_same_bits, normal, ragged, uniform
from sequences import attention_inputs

from vmtc_kernels import (
    CMAIConfig,
    FocusAttention,
    VMTCConfig,
    focus_attention,
    merge_tokens,
    token_importance,
)
from vmtc_kernels.integrations.vllm._settings import parse


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_primary": -1}, ValueError, "num_primary must be at least 0, got -1"),
        ({"num_merged": -1}, ValueError, "num_merged must be at least 0, got -1"),
        ({"num_primary": 1.5}, ValueError, r"num_primary as a share must be in \[0, 1\], got 1.5"),
        ({"num_merged": -0.1}, ValueError, r"num_merged as a share must be in \[0, 1\], got -0.1"),
        (
            {"num_primary": 0.7, "num_merged": 0.4},
            ValueError,
            r"at most 1 together, got 0.7 \+ 0.4",
        ),
        ({"num_merged": float("nan")}, ValueError, r"num_merged as a share must be in \[0, 1\]"),
        ({"num_primary": "128"}, TypeError, "num_primary must be an int, got str"),
        ({"num_merged": True}, TypeError, "num_merged must be an int, got bool"),
        ({"num_primary": 0, "num_merged": 0}, ValueError, "must not both be 0"),
        ({"num_primary": 0.0, "num_merged": 0}, ValueError, "must not both be 0"),
        (
            {"metric": "l2"},
            ValueError,
            r"metric must be one of \['cosine', 'euclidean'\], got 'l2'",
        ),
        ({"weighting": "max"}, ValueError, r"weighting must be one of \['score', 'uniform'\], got"),
        ({"iterations": -1}, ValueError, "iterations must be at least 0, got -1"),
        ({"iterations": 2.0}, TypeError, "iterations must be an int, got float"),
        ({"head_reduction": "sum"}, ValueError, r"head_reduction must be one of \['mean', 'max'\]"),
        ({"feature_layer": "values"}, ValueError, r"feature_layer must be one of \['keys'\], got"),
        (
            {"placement": "nowhere"},
            ValueError,
            r"placement must be one of \['before_projector', 'a",
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"VMTCConfig: .*{message}"):
        VMTCConfig(**settings)


def test_good_settings() -> None:
    config = VMTCConfig()
    assert (config.num_primary, config.num_merged, config.iterations) == (80, 80, 10)
    assert (config.metric, config.weighting, config.head_reduction) == ("cosine", "score", "mean")
    VMTCConfig(num_primary=0, feature_layer="keys", placement=12, head_reduction="max")
    VMTCConfig(num_merged=0, feature_layer=-1, placement="after_projector")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_primary = 3
    with pytest.raises(TypeError):
        VMTCConfig(128, 32)


@pytest.mark.parametrize(
    ("primary", "merged", "tokens", "counts"),
    [
        (128, 32, 576, (128, 32)),
        (128, 32, 160, (128, 32)),
        (0.25, 0.05, 576, (144, 29)),
        (0.5, 2, 5, (3, 2)),
        (0.5, 0.5, 4, (2, 2)),
        # halves go up: 2.5 and 0.5
        (0.25, 0.05, 10, (3, 1)),
        (1.0, 0, 7, (7, 0)),
        (0.0, 1.0, 7, (0, 7)),
        (0, 1, 1, (0, 1)),
    ],
)
def test_counts(primary: float, merged: float, tokens: int, counts: tuple[int, int]) -> None:
    got = VMTCConfig(num_primary=primary, num_merged=merged).counts(tokens)
    assert got == counts and all(isinstance(count, int) for count in got)


@pytest.mark.parametrize(
    ("primary", "merged", "tokens"), [(128, 32, 159), (0.5, 3, 5), (1, 1, 0), (11, 0.5, 10)]
)
def test_counts_that_do_not_fit_the_image(primary: float, merged: float, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"must be 1 to {tokens} for an image of {tokens} tokens"):
        VMTCConfig(num_primary=primary, num_merged=merged).counts(tokens)


@pytest.mark.parametrize("cls_index", [0, 3, None])
def test_importance(backend: str, cls_index: int | None) -> None:
    q, k = normal(2, 3, 33, 8), normal(2, 3, 33, 8, seed=1)
    mean = VMTCConfig().importance(q, k, cls_index=cls_index)
    assert_same_bits(mean, token_importance(q, k, cls_index=cls_index))
    heads = [token_importance(q[:, [h]], k[:, [h]], cls_index=cls_index) for h in range(3)]
    largest = VMTCConfig(head_reduction="max").importance(q, k, cls_index=cls_index)
    assert largest.shape == (2, 33)
    assert_close(largest, torch.stack(heads).amax(0))
    assert_close(mean, torch.stack(heads).mean(0))


def test_importance_defaults_to_the_first_token(backend: str) -> None:
    q, k = normal(2, 3, 33, 8), normal(2, 3, 33, 8, seed=1)
    for reduction in ("mean", "max"):
        config = VMTCConfig(head_reduction=reduction)
        assert_same_bits(config.importance(q, k), config.importance(q, k, cls_index=0))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("weighting", ["score", "uniform"])
def test_merge_is_merge_tokens(backend: str, metric: str, weighting: str) -> None:
    x, scores, valid = normal(3, 33, 8), uniform(3, 33), ragged(3, 33)
    features = normal(3, 33, 5, seed=1)
    for iterations in (0, 10):
        options = {"metric": metric, "weighting": weighting, "iterations": iterations}
        config = VMTCConfig(num_primary=0.25, num_merged=3, **options)
        assert_same_bits(config.merge(x, scores), merge_tokens(x, scores, 8, 3, **options))
        more = {"features": features, "valid": valid}
        assert_same_bits(
            config.merge(x, scores, **more), merge_tokens(x, scores, 8, 3, **options, **more)
        )


CMAI_REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"keep_ratio": None}, ValueError, "exactly one of keep_ratio and threshold"),
    ({"threshold": 0.5}, ValueError, "exactly one of keep_ratio and threshold"),
    ({"keep_ratio": 0.0}, ValueError, r"keep_ratio must be in \(0, 1\]"),
    ({"keep_ratio": None, "threshold": 1.0}, ValueError, r"threshold must be in \[0, 1\)"),
    ({"min_keep": 0}, ValueError, "min_keep must be at least 1"),
    ({"aggregate": "sum"}, ValueError, "aggregate must be one of"),
    ({"head_mode": "max"}, ValueError, "head_mode must be one of"),
    ({"suppression": 1.5}, ValueError, r"suppression must be in \[0, 1\]"),
    ({"layers": (0.5,)}, TypeError, "layers must be ints, got 0.5"),
    ({"layers": "lower"}, ValueError, "layers must be ints, 'upper' or None, got 'lower'"),
]


@pytest.mark.parametrize(("change", "error", "message"), CMAI_REFUSED)
def test_cmai_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CMAIConfig(**change)


def test_cmai_layers() -> None:
    assert [CMAIConfig().applies(i, 4) for i in range(4)] == [False, False, True, True]
    assert [CMAIConfig(layers="upper").applies(i, 3) for i in range(3)] == [False, True, True]
    assert CMAIConfig().applies(0, 1)
    assert all(CMAIConfig(layers=None).applies(i, 4) for i in range(4))
    some = CMAIConfig(layers=(0, -1))
    assert [some.applies(i, 4) for i in range(4)] == [True, False, False, True]
    with pytest.raises(ValueError, match=r"layers \[7\] are not among 4 layers"):
        CMAIConfig(layers=(1, 7)).applies(0, 4)


@pytest.mark.parametrize(
    ("layers", "inhibit"),
    [
        ("{}", [2, 3]),
        ('{"layers": "upper"}', [2, 3]),
        ('{"layers": null}', [0, 1, 2, 3]),
        ('{"layers": [0, -1]}', [0, 3]),
    ],
)
def test_cmai_layers_of_an_engine(layers: str, inhibit: list[int]) -> None:
    config = parse({"cmai": json.loads(layers)}).cmai
    assert config is not None and [i for i in range(4) if config.applies(i, 4)] == inhibit


OTHERS: list[dict[str, Any]] = [
    {},
    {"keep_ratio": None, "threshold": 0.8, "aggregate": "residual", "head_mode": "per_head"},
    {"min_keep": 3, "renormalize": False, "suppression": 0.25},
]


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_cmai_attention_is_focus_attention(backend: str, settings: dict[str, Any]) -> None:
    given, config = attention_inputs(3, 2, 1, 24, 8), CMAIConfig(**settings)
    options = {"keep_ratio": 0.5, **settings}
    assert_same_bits(
        config.attention(**given, num_image=12), focus_attention(**given, num_image=12, **options)
    )
    whole = config.attention(**given, num_image=12, return_lse=True, return_mask=True)
    assert isinstance(whole, FocusAttention) and whole.scores is None


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("settings", [{}, {"decode": False}, {"prefill": False}])
def test_cmai_paged_attention_is_attention(
    backend: str, settings: dict[str, Any], queries: int
) -> None:
    """In a cache of one block for each row, whose keys lie as they are."""
    given, config = attention_inputs(3, 2, 1, 24, 8), CMAIConfig(**settings)
    q, k, v = given["q"][:, :, -queries:], given["k"], given["v"]
    state = config.text_image(3, q.shape[1], 24, 12)
    config.attention(**given, num_image=12, text_image=state)
    expected = config.attention(q, k, v, given["modality"], 12, text_image=state.clone())
    blocks = [x.transpose(1, 2) for x in (k, v)]
    table = torch.arange(3, dtype=torch.int32)[:, None]
    lengths = torch.full((3,), 24, dtype=torch.int32)
    paged = config.paged_attention(
        q, *blocks, table, lengths, given["modality"], 12, text_image=state
    )
    torch.testing.assert_close(paged, expected, rtol=1e-5, atol=1e-5)


def test_cmai_of_one_phase_is_plain_in_the_other(backend: str) -> None:
    given = attention_inputs(3, 2, 1, 24, 8)
    for prefill in (True, False):
        config = CMAIConfig(prefill=prefill, decode=not prefill, keep_ratio=0.2)
        state = config.text_image(3, 2, 24, 12)
        prompt = {
            "q": given["q"][:, :, :23],
            **{name: given[name][:, :, :23] for name in "kv"},
            "modality": given["modality"][:, :23],
        }
        first = config.attention(**prompt, num_image=12, text_image=state)
        options = {"keep_ratio": 0.2, "suppression": 0.0 if prefill else 1.0}
        assert_same_bits(first, focus_attention(**prompt, num_image=12, **options))
        step = {**given, "q": given["q"][:, :, 23:]}
        second = config.attention(**step, num_image=12, text_image=state)
        whole = focus_attention(
            **given, num_image=12, keep_ratio=0.2, suppression=1.0 if prefill else 0.0
        )
        assert_close(second, whole[:, :, 23:])


def test_cmai_state() -> None:
    assert CMAIConfig().text_image(2, 4, 9, 5).shape == (2, 1, 9, 5)
    assert CMAIConfig(head_mode="per_head").text_image(2, 4, 9, 5).shape == (2, 4, 9, 5)


@pytest.mark.parametrize("primary, merged", [(0.75, 0.25), (0.5, 0.5), (0.01, 0.0), (0.0, 0.1)])
def test_shares_fit_images_of_every_size(primary: float, merged: float) -> None:
    config = VMTCConfig(num_primary=primary, num_merged=merged)
    for tokens in range(1, 200):
        kept, groups = config.counts(tokens)
        assert 0 < kept + groups <= tokens and abs(kept - primary * tokens) <= 1
        assert (groups > 0) <= (merged > 0) and (kept > 0) <= (primary > 0)


def test_counts_of_a_smaller_image_may_be_clipped() -> None:
    config = VMTCConfig(num_primary=4, num_merged=3)
    assert [config.counts(n, clip=True) for n in (9, 6, 3)] == [(4, 3), (4, 2), (3, 0)]
