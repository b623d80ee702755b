"""focus_attention on every backend: the three parts as one, whole, in chunks and token by token."""

from __future__ import annotations

from typing import Any

import focus_oracle as oracle
import numpy as np
import pytest
import torch
from cases import (
    FLOATS,
    array,
    assert_close,
    assert_same_bits,
    is_simulated,
    peak_memory,
    some,
)
from contract import OperatorContract
from hypothesis import given
from hypothesis import strategies as st
from sequences import attention_inputs, positions_of, sequence, sequences, unpacked
from test_focus_scores import expected as expected_scores
from test_masked_attention import expected as expected_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from work import is_slow

from vmtc_kernels import focus_attention, focus_mask, masked_attention, use_backend

# pairs whose score is that close to the cut may fall on either side of it
MOST_AT_THE_CUT = 0.02

RULES: list[dict[str, Any]] = [
    {"keep_ratio": 0.4},
    {"keep_ratio": 0.1, "min_keep": 3, "suppression": 0.25, "head_mode": "per_head"},
    {"threshold": 0.9, "aggregate": "residual"},
    {"threshold": 0.7, "renormalize": False, "head_mode": "per_head", "scale": -0.2},
]
SELECTION = ("keep_ratio", "threshold", "min_keep")


class TestContract(OperatorContract):
    op = "focus_attention"


class Expected:
    """What the definition says, and which rows [B, H, Lq] rounding cannot change."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        given = dict(arguments)
        rule = {name: given.pop(name) for name in SELECTION if name in given}
        v, suppression = given.pop("v"), given.pop("suppression", 0.0)
        self.scores, self.state = expected_scores(**given)
        places = positions_of(given, given["q"].shape[2])
        rows = list(zip(self.scores, array(given["modality"]), places, strict=True))
        self.bits = np.stack([oracle.inhibited(*row, **rule) for row in rows])
        self.cut = np.stack([oracle.at_the_cut(*row, **rule) for row in rows])
        heads = given["q"].shape[1]
        clear = torch.from_numpy(~self.cut.any(-1))
        self.clear = clear.expand(-1, heads, -1) if clear.shape[1] == 1 else clear
        words = -(-self.bits.shape[-1] // 32)
        packed = np.zeros((*self.bits.shape[:3], 32 * words), bool)
        packed[..., : self.bits.shape[-1]] = self.bits
        value = (packed.reshape(*packed.shape[:3], words, 32) << np.arange(32)).sum(-1)
        self.mask = torch.from_numpy(value.astype(np.uint32).view(np.int32))
        self.out, self.lse = expected_attention(
            given["q"],
            given["k"],
            v,
            given["modality"],
            self.mask,
            given.get("query_positions"),
            suppression=suppression,
            scale=given.get("scale"),
        )

    def assert_right(self, out: Tensor) -> None:
        """The rows whose inhibition is clear, nearly all of them."""
        assert self.clear.double().mean() >= 1 - 2 * MOST_AT_THE_CUT
        assert out.shape == self.out.shape
        assert_close(out[self.clear.to(out.device)], self.out[self.clear.numpy()])


SIZES = [
    # B, H, G, L, d, dv, I
    (8, 2, 1, 13, 3, 5, 7),
    (8, 4, 2, 40, 16, 16, 40),
    (2, 3, 3, 70, 72, 80, 33),
    (1, 4, 1, 150, 64, 64, 75),
]


@pytest.mark.parametrize(("B", "H", "G", "L", "d", "dv", "num_image"), SIZES)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_the_definition(
    backend: str,
    dtype: torch.dtype,
    rule: dict[str, Any],
    B: int,
    H: int,
    G: int,
    L: int,
    d: int,
    dv: int,
    num_image: int,
) -> None:
    given = {
        **attention_inputs(some(backend, B), H, G, L, d, dv=dv, dtype=dtype, first=L + d),
        "num_image": num_image,
        **rule,
    }
    want = Expected(given)
    want.assert_right(focus_attention(**given))
    whole = focus_attention(**given, return_lse=True, return_scores=True, return_mask=True)
    want.assert_right(whole.out)
    assert_close(whole.scores, want.scores)
    # only pairs at the cut may differ, and what is returned is right for the mask returned
    differ = unpacked(whole.mask, num_image) != want.bits
    assert not (differ & ~want.cut).any() and want.cut.mean() <= MOST_AT_THE_CUT
    attention = {name: given[name] for name in ("q", "k", "v", "modality")}
    options = {name: rule[name] for name in ("suppression", "scale") if name in rule}
    out, lse = expected_attention(**attention, mask=whole.mask, **options)
    assert_close(whole.out, out)
    assert_close(whole.lse, lse)


def test_float64_agrees_with_the_definition() -> None:
    given = {**attention_inputs(8, 4, 2, 30, 8, dtype=torch.float64), "num_image": 13}
    with use_backend("reference"):
        for rule in RULES:
            Expected({**given, **rule}).assert_right(focus_attention(**given, **rule))


@given(st.data())
def test_any_shape(backend: str, data: st.DataObject) -> None:
    B, G, share, d, dv = (
        data.draw(st.integers(low, high))
        for low, high in ((0, 3), (1, 3), (1, 3), (1, 20), (1, 20))
    )
    L, num_image = data.draw(st.integers(1, 24)), data.draw(st.integers(0, 30))
    queries, rule = data.draw(st.integers(1, L)), data.draw(st.sampled_from(RULES))
    dtype = data.draw(st.sampled_from(FLOATS))
    given = attention_inputs(B, G * share, G, L, d, dv=dv, queries=queries, dtype=dtype, first=L)
    matrices = G * share if rule.get("head_mode") == "per_head" else 1
    generator = torch.Generator().manual_seed(L)
    state = torch.rand(B, matrices, L + 2, num_image, generator=generator, device="cpu")
    state = state.to(given["q"].device)
    before = state.clone()
    got = focus_attention(**given, num_image=num_image, text_image=state, **rule)
    assert got.shape == (B, G * share, queries, dv)
    if B:
        want = Expected({**given, "num_image": num_image, "text_image": before, **rule})
        rows = want.clear.to(got.device)
        if rows.any():
            assert_close(got[rows], want.out[want.clear.numpy()])
        assert_close(state, want.state)


def test_nothing_inhibited_is_causal_attention(backend: str) -> None:
    given = attention_inputs(1, 4, 2, 70, 16)
    q, k, v = (given[name].double() for name in "qkv")
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    rules: list[dict[str, Any]] = [
        {"keep_ratio": 1.0},
        {"threshold": 0.0},
        {"keep_ratio": 0.1, "suppression": 1.0},
    ]
    for rule in rules:
        assert_close(focus_attention(**given, num_image=35, **rule), want)
    assert_close(focus_attention(**given, num_image=0, keep_ratio=0.1), want)
    given["modality"] = torch.ones_like(given["modality"])
    assert_close(focus_attention(**given, num_image=35, keep_ratio=0.1), want)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("parts", [[17, 23], [1, 5, 30, 4], [12, *[1] * 28]], ids=len)
def test_chunks_and_decode_equal_prefill(
    backend: str, parts: list[int], rule: dict[str, Any]
) -> None:
    batch = some(backend, 8)
    if is_simulated(backend) and len(parts) > 10:
        parts = [32, *[1] * 8]
    given = attention_inputs(batch, 2, 1, 40, 8, first=len(parts))
    want = Expected({**given, "num_image": 20, **rule})
    state = torch.full((batch, len(want.state[0]), 40, 20), torch.nan)
    begin, outs = 0, []
    for part in parts:
        end = begin + part
        outs.append(
            focus_attention(
                given["q"][:, :, begin:end],
                given["k"][:, :, :end],
                given["v"][:, :, :end],
                given["modality"][:, :end],
                20,
                text_image=state,
                **rule,
            )
        )
        begin = end
    want.assert_right(torch.cat(outs, 2))
    text = (given["modality"] == 1)[:, None, :, None].expand_as(state)
    assert_close(state[text], want.state[text.cpu().numpy()])


def test_a_static_cache(backend: str) -> None:
    """What lies behind the current length is padding and holds anything."""
    given, rule = attention_inputs(4, 4, 2, 40, 8), {"num_image": 20, "keep_ratio": 0.4}
    want = Expected({**given, **rule})
    state = torch.full((4, 1, 48, 20), torch.nan)
    cache = {name: torch.full((4, 2, 48, 8), torch.nan) for name in "kv"}
    modality, outs = torch.zeros(4, 48, dtype=torch.uint8), []
    for begin, end in ((0, 25), (25, 26), (26, 27), (27, 40)):
        for name, held in cache.items():
            held[:, :, begin:end] = given[name][:, :, begin:end]
        modality[:, begin:end] = given["modality"][:, begin:end]
        places = torch.arange(begin, end, dtype=torch.int32).expand(4, -1)
        q = given["q"][:, :, begin:end]
        outs.append(
            focus_attention(
                q, **cache, modality=modality, text_image=state, query_positions=places, **rule
            )
        )
    want.assert_right(torch.cat(outs, 2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("H", "G"), [(4, 4), (8, 1)])
def test_decode_over_many_keys(backend: str, dtype: torch.dtype, H: int, G: int) -> None:
    L = 100 if is_slow(backend) else 1500
    given = {
        **attention_inputs(2, H, G, L, 32, queries=1, dtype=dtype),
        "modality": torch.stack([sequence("two images", L), sequence("left padding", L)]),
        "num_image": L // 2,
        "keep_ratio": 0.25,
    }
    given["modality"] = given["modality"].to(given["q"].device)
    generator = torch.Generator().manual_seed(0)
    state = torch.rand(2, 1, L, L // 2, generator=generator, device="cpu") / L
    want = Expected({**given, "text_image": state})
    want.assert_right(focus_attention(**given, text_image=state.to(given["q"].device)))


def test_every_text_row_keeps_what_it_should(backend: str) -> None:
    given = attention_inputs(8, 2, 1, 40, 8)
    whole = focus_attention(**given, num_image=20, keep_ratio=0.3, return_mask=True)
    assert whole.scores is None and whole.lse is None
    bits = unpacked(whole.mask, 20)
    for b, i in np.ndindex(8, 40):
        seen = oracle.seen_images(array(given["modality"])[b], i, 20)
        assert bits[b, 0, i].sum() == seen - min(seen, max(1, int(np.ceil(0.3 * seen))))


def test_permuting_heads_permutes_the_result(backend: str) -> None:
    given = attention_inputs(4, 4, 4, 30, 8)
    options = {"num_image": 15, "head_mode": "per_head", "keep_ratio": 0.3}
    order = torch.tensor([2, 0, 3, 1])
    got = focus_attention(**given, **options)
    permuted = {**given, **{name: given[name][:, order] for name in "qkv"}}
    assert_same_bits(focus_attention(**permuted, **options), got[:, order])


def test_the_gradient_holds_the_mask_fixed(backend: str) -> None:
    given = attention_inputs(2, 2, 1, 30, 8)
    options = {"num_image": 15, "keep_ratio": 0.3}
    mask = focus_attention(**given, **options, return_mask=True).mask
    grads = []
    for call in (
        lambda a: focus_attention(**a, **options),
        lambda a: masked_attention(**a, mask=mask).out,
    ):
        leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in given.items()}
        call(leaves).square().sum().backward()
        grads.append([leaves[name].grad for name in "qkv"])
    for one, other in zip(*grads, strict=True):
        assert_close(one, other)


def test_a_state_has_no_gradient_but_the_result_has(backend: str) -> None:
    given = attention_inputs(2, 2, 1, 30, 8, queries=4)
    for name in "qkv":
        given[name].requires_grad_()
    state = torch.rand(2, 1, 30, 15)
    out = focus_attention(**given, num_image=15, keep_ratio=0.3, text_image=state)
    out.sum().backward()
    assert all(given[name].grad is not None for name in "qkv") and not state.requires_grad


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck_with_a_state(backend: str, gradient: bool) -> None:
    given = attention_inputs(2, 2, 1, 12, 8, queries=5)
    for name in "qkv":
        given[name].requires_grad_(gradient)
    state = torch.rand(2, 1, 14, 6)
    torch.library.opcheck(
        torch.ops.vmtc.focus_attention.default,
        (),
        {**given, "num_image": 6, "keep_ratio": 0.5, "text_image": state},
    )


def test_a_written_state_is_noticed(backend: str) -> None:
    """Autograd must not use a tensor that an operator changed in the meantime."""
    given = attention_inputs(1, 2, 1, 12, 8, queries=5)
    state = torch.rand(1, 1, 12, 6)
    weight = torch.ones(1, requires_grad=True)
    product = (state * weight).sum()
    focus_attention(**given, num_image=6, keep_ratio=0.5, text_image=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_decode_loop_compiles_as_one_graph(backend: str) -> None:
    graphs = []
    torch.compiler.reset()

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(
        q: Tensor, k: Tensor, v: Tensor, modality: Tensor, state: Tensor, at: Tensor
    ) -> Tensor:
        return focus_attention(
            q, k, v, modality, 10, keep_ratio=0.5, text_image=state, query_positions=at
        )

    compiled = torch.compile(step, fullgraph=True, backend=count)
    given = attention_inputs(2, 2, 1, 20, 8)
    states = [torch.zeros(2, 1, 20, 10) for _ in range(2)]
    for i in range(14, 20):
        at = torch.full((2, 1), i, dtype=torch.int32)
        rest = (given["q"][:, :, i : i + 1], given["k"], given["v"], given["modality"])
        assert_same_bits(compiled(*rest, states[0], at), step(*rest, states[1], at))
    assert_same_bits(*states)
    assert len(graphs) == 1


def test_no_matrix_of_all_pairs_is_stored(kernel: str) -> None:
    L, H = (256, 2) if is_slow(kernel) else (2048, 4)
    given = attention_inputs(1, H, 1, L, 16)
    given["modality"] = sequences(1, L)
    call = lambda: focus_attention(**given, num_image=16, keep_ratio=0.5)  # noqa: E731
    assert peak_memory(call) < H * L * L * 4


def test_parts_and_whole_agree_bit_for_bit_in_the_mask(backend: str) -> None:
    """focus_mask on the scores that were returned is the mask that was returned."""
    given = attention_inputs(8, 2, 1, 40, 8)
    whole = focus_attention(
        **given, num_image=20, threshold=0.8, return_scores=True, return_mask=True
    )
    assert_same_bits(focus_mask(whole.scores, given["modality"], threshold=0.8), whole.mask)
