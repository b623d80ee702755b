"""paged_focus_attention on every backend against focus_attention over the same keys in a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FLOATS, assert_close, assert_same_bits, place, some
from sequences import attention_inputs
from test_focus_attention import RULES, Expected
from torch import Tensor

from vmtc_kernels import focus_attention, paged_focus_attention
from vmtc_kernels._registry import OPERATORS


@pytest.fixture(autouse=True)
def has_kernel(backend: str) -> None:
    if backend not in OPERATORS["paged_focus_attention"].implementations:
        pytest.skip(f"paged_focus_attention has no {backend} kernel")


def paged(k: Tensor, v: Tensor, size: int, spare: int = 3) -> dict[str, Tensor]:
    """k, v [B, G, L, *] in blocks in any order; blocks that nobody owns hold NaN."""
    batch, groups, length = k.shape[:3]
    each = -(-length // size)
    generator = torch.Generator().manual_seed(size)
    order = torch.randperm(batch * each + spare, generator=generator, device="cpu")
    table = place(order[: batch * each].view(batch, each).int())
    caches = []
    for x in (k, v):
        cache = torch.full((batch * each + spare, size, groups, x.shape[3]), torch.nan).to(x)
        rows = torch.full((batch, groups, each * size, x.shape[3]), torch.nan).to(x)
        rows[:, :, :length] = x
        blocks = rows.unflatten(2, (each, size)).permute(0, 2, 3, 1, 4)
        cache[table.long()] = blocks
        caches.append(cache)
    return {"k_cache": caches[0], "v_cache": caches[1], "block_table": table}


def call(given: dict[str, Tensor], size: int, lens: Tensor, **options: Any) -> Tensor:
    caches = paged(given["k"], given["v"], size)
    return paged_focus_attention(
        given["q"], **caches, seq_lens=lens, modality=given["modality"], **options
    )


@pytest.mark.parametrize("size", [1, 8, 16, 64])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_whole_sequences(backend: str, size: int, rule: dict[str, Any]) -> None:
    batch = some(backend, 8)
    given = attention_inputs(batch, 4, 2, 40, 16, dv=12, first=size)
    want = Expected({**given, "num_image": 20, **rule})
    lens = torch.full((batch,), 40, dtype=torch.int32)
    want.assert_right(call(given, size, lens, num_image=20, **rule))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("queries", [1, 4])
def test_sequences_of_different_lengths(backend: str, queries: int, dtype: torch.dtype) -> None:
    given = attention_inputs(5, 4, 2, 48, 16, queries=queries, dtype=dtype)
    lens = torch.tensor([48, 17, 5, 1, 0], dtype=torch.int32)
    state = torch.rand(5, 1, 50, 20, generator=torch.Generator().manual_seed(0), device="cpu")
    state = place(state)
    before = state.clone()
    got = call(given, 8, lens, num_image=20, keep_ratio=0.4, text_image=state)
    for b, length in enumerate(lens.tolist()):
        count = min(queries, length)
        assert (got[b, :, : queries - count] == 0).all()
        if not count:
            continue
        alone = {name: value[b : b + 1] for name, value in given.items()}
        alone.update({name: alone[name][:, :, :length] for name in "kv"})
        alone["q"] = alone["q"][:, :, queries - count :]
        alone["modality"] = alone["modality"][:, :length]
        want = Expected(
            {**alone, "num_image": 20, "keep_ratio": 0.4, "text_image": before[b : b + 1]}
        )
        want.assert_right(got[b : b + 1, :, queries - count :])
        assert_close(state[b : b + 1], want.state)


def test_a_table_that_names_no_block(backend: str) -> None:
    """The keys of such an entry are padding, whatever the modality says."""
    given = attention_inputs(2, 2, 1, 40, 16)
    lens = torch.full((2,), 40, dtype=torch.int32)
    caches = paged(given["k"], given["v"], 8)
    caches["block_table"][:, 1], caches["block_table"][:, 3] = -1, 10**6
    got = paged_focus_attention(
        given["q"],
        **caches,
        seq_lens=lens,
        modality=given["modality"],
        num_image=20,
        keep_ratio=0.5,
    )
    padded = given["modality"].clone()
    padded[:, 8:16], padded[:, 24:32] = 0, 0
    want = focus_attention(given["q"], given["k"], given["v"], padded, num_image=20, keep_ratio=0.5)
    assert_close(got, want)


def test_any_strides_of_the_cache(backend: str) -> None:
    """[blocks, G, block_size, d], as some caches lie in memory."""
    given = attention_inputs(2, 4, 2, 40, 16)
    lens = torch.full((2,), 40, dtype=torch.int32)
    caches = paged(given["k"], given["v"], 8)
    rest = {"seq_lens": lens, "modality": given["modality"], "num_image": 20, "keep_ratio": 0.5}
    want = paged_focus_attention(given["q"], **caches, **rest)
    for name in ("k_cache", "v_cache"):
        caches[name] = caches[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(paged_focus_attention(given["q"], **caches, **rest), want)


def test_opcheck_and_compile(backend: str) -> None:
    given = attention_inputs(2, 4, 2, 24, 16, queries=1)
    lens = torch.tensor([20, 24], dtype=torch.int32)
    state = torch.rand(2, 1, 24, 10)
    arguments = {
        "q": given["q"],
        **paged(given["k"], given["v"], 8),
        "seq_lens": lens,
        "modality": given["modality"],
        "num_image": 10,
        "keep_ratio": 0.5,
        "text_image": state,
    }
    arguments = {
        name: value.nan_to_num() if name.endswith("cache") else value
        for name, value in arguments.items()
    }
    torch.library.opcheck(torch.ops.vmtc.paged_focus_attention.default, (), arguments)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda a: paged_focus_attention(**a), fullgraph=True, backend="aot_eager"
    )
    assert_same_bits(compiled(arguments), paged_focus_attention(**arguments))


K = torch.zeros(6, 4, 2, 3)
GOOD: dict[str, Any] = {
    "q": torch.zeros(2, 4, 1, 3),
    "k_cache": K,
    "v_cache": K,
    "block_table": torch.zeros(2, 2, dtype=torch.int32),
    "seq_lens": torch.ones(2, dtype=torch.int32),
    "modality": torch.ones(2, 8, dtype=torch.uint8),
    "num_image": 3,
    "keep_ratio": 0.5,
    "text_image": torch.zeros(2, 1, 8, 3),
}
BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({"k_cache": K[0]}, ValueError, r"k_cache must be \[blocks, block_size, G, d\], got shape"),
    ({"k_cache": K.half()}, TypeError, "k_cache must be torch.float32 like q, got torch.float16"),
    ({"k_cache": K[..., 1:]}, ValueError, r"k_cache must be \[6, 4, 2, 3\] .d of q., got"),
    ({"k_cache": K[:0]}, ValueError, r"k_cache must have blocks of rows, got \[0, 4, 2, 3\]"),
    ({"v_cache": K[:, :0]}, ValueError, r"v_cache must have blocks of rows, got \[6, 0, 2, 3\]"),
    ({"v_cache": K[1:]}, ValueError, r"v_cache must be \[6, 4, 2, 3\] .*, got \[5, 4, 2, 3\]"),
    ({"v_cache": K[..., :0]}, ValueError, "v_cache must have at least one feature"),
    ({"q": torch.zeros(2, 3, 1, 3)}, ValueError, "k_cache must have heads that divide the 3 of q"),
    ({"block_table": GOOD["block_table"].long()}, TypeError, "block_table must be int32, got"),
    (
        {"block_table": GOOD["block_table"][:1]},
        ValueError,
        r"block_table must be \[2, 2\] .B of q.",
    ),
    ({"block_table": GOOD["block_table"][:, 1:]}, ValueError, "modality must have at most .* = 4"),
    ({"seq_lens": GOOD["seq_lens"].float()}, TypeError, "seq_lens must be int32, got"),
    ({"seq_lens": GOOD["seq_lens"][:1]}, ValueError, r"seq_lens must be \[2\] .B of q., got \[1\]"),
    ({"text_image": None}, ValueError, "text_image must be given where there are fewer queries"),
    ({"keep_ratio": 0.0}, ValueError, r"keep_ratio must be in \(0, 1\], got 0.0"),
    ({"suppression": 2.0}, ValueError, r"suppression must be in \[0, 1\], got 2.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_bad_input_is_refused(
    backend: str, change: dict[str, Any], error: Any, message: str
) -> None:
    given = {**GOOD, **change}
    moved = {n: place(t) if isinstance(t, Tensor) else t for n, t in given.items()}
    with pytest.raises(error, match=message):
        paged_focus_attention(**moved)
