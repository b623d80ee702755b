"""How others attend where `focus_attention` does: SDPA by kernel, FlexAttention, eagerly."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .focus import Problem, Setup

# what a call does, in words for the table
PLAIN = "attention alone, nothing inhibited"
ALONE = "attention alone"
MAKING = "attention and its block mask"
# one matrix of probabilities in float32 takes no more bytes
MOST_PAIRS = 4 << 30

Attend = Callable[[], Tensor]


@dataclass(frozen=True)
class Mask:
    """Which pairs count, ready: allowed, bool ``[B, 1, Lq, L]``, and words, i32 ``[B, 1, Lq, W]``
    of `focus_mask`, whose bits inhibit image tokens."""

    allowed: Tensor
    words: Tensor

    @classmethod
    def of(cls, given: Problem) -> Mask:
        return cls(given.allowed(), given.ours(return_mask=True).mask)


@dataclass(frozen=True)
class Way:
    """A way to attend.

    prepare: makes what the way wants beforehand, untimed, and returns the call to time, which gives
        ``[B, H, Lq, d]``.
    inhibits: whether the mask counts; if not the result is plain causal attention's, a floor.
    missing: why it cannot run.
    slow: why its first call takes long.
    """

    name: str
    scope: str
    prepare: Callable[[Problem, Mask], Attend]
    inhibits: bool = True
    missing: str | None = None
    slow: str | None = None


def ways(setup: Setup, device: str) -> list[Way]:
    return [*sdpa(setup, device), *flex(setup, device)]


KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def sdpa(setup: Setup, device: str) -> list[Way]:
    """Each kernel of SDPA, causal and with the mask."""
    found = []
    for name in KERNELS:
        for masked in (False, True):
            copies, missing = kernel(name, setup, device, masked)
            found.append(
                Way(
                    f"SDPA {name}, {'ready mask' if masked else 'causal'}",
                    (ALONE if masked else PLAIN) + (", copies grouped keys" if copies else ""),
                    _sdpa(KERNELS[name], masked, copies),
                    masked,
                    missing,
                )
            )
    return found


def _sdpa(backend: SDPBackend, masked: bool, copies: bool) -> Callable[[Problem, Mask], Attend]:
    """masked: the mask is ready as what is added to the logits, so that no kernel converts it.

    copies: the kernel has no grouped heads, and each call makes keys and values for all of them, as
    models do.
    """

    def prepare(given: Problem, mask: Mask) -> Attend:
        share = given.setup.H // given.setup.G
        added = None
        if masked:
            zeros = torch.zeros_like(mask.allowed, dtype=given.q.dtype)
            added = zeros.masked_fill(~mask.allowed, -torch.inf)

        def attend() -> Tensor:
            k, v = given.k, given.v
            if copies:
                k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    given.q,
                    k,
                    v,
                    attn_mask=added,
                    is_causal=not masked and given.setup.phase == "prefill",
                    enable_gqa=share > 1 and not copies,
                )

        return attend

    return prepare


def kernel(name: str, setup: Setup, device: str, masked: bool) -> tuple[bool, str | None]:
    """Whether this kernel of SDPA needs copies of grouped keys, and why it cannot run at all."""
    pairs = 4 * setup.B * setup.H * setup.queries * setup.length
    if name == "math" and pairs > MOST_PAIRS:
        return False, f"it keeps {pairs / 1e9:.0f} GB of weights"
    if torch.device(device).type != "cuda":
        return False, None if name in ("flash", "math") else "a kernel for GPUs"
    refusal = _refusal(name, setup, device, masked)
    if refusal and setup.G != setup.H:
        return True, _refusal(name, replace(setup, G=setup.H), device, masked)
    return False, refusal


def _refusal(name: str, setup: Setup, device: str, masked: bool) -> str | None:
    """By a try on few tokens, as their number decides nothing; in torch's words."""
    queries, dtype = min(64, setup.queries), getattr(torch, setup.dtype)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            q, k, added = (
                torch.zeros(1, heads, rows, features, device=device, dtype=dtype)
                for heads, rows, features in (
                    (setup.H, queries, setup.d),
                    (setup.G, 64, setup.d),
                    (1, queries, 64),
                )
            )
            with sdpa_kernel(KERNELS[name]):
                scaled_dot_product_attention(
                    q,
                    k,
                    k,
                    attn_mask=added if masked else None,
                    is_causal=not masked and setup.phase == "prefill",
                    enable_gqa=setup.H != setup.G,
                )
            return None
        # the second is raised where torch has no CUDA
        except (RuntimeError, AssertionError) as error:
            said = [str(warning.message).split(" (Triggered")[0] for warning in heard]
            # besides headings, and that the other kernels are not wanted
            reasons = [text for text in said if not re.search("because:$|runtime disabled", text)]
            return reasons[0] if reasons else str(error).splitlines()[0]


def flex(setup: Setup, device: str) -> list[Way]:
    """FlexAttention, its mask_mod reading the pairs as bool or as words of bits, its block mask
    made in each call or beforehand. Grouped heads, prefill and decode."""
    missing = None
    if torch.device(device).type != "cuda" and not any(
        map(shutil.which, ("c++", "g++", "clang++"))
    ):
        missing = "torch.compile needs a C++ compiler"
    found = []
    for form, mask_mod in (("bool", _of_bools), ("words", _of_words)):
        for made in ("making its mask", "ready mask"):
            found.append(
                Way(
                    f"FlexAttention of {form}, {made}",
                    ALONE if made == "ready mask" else MAKING,
                    _flex(mask_mod, ready=made == "ready mask"),
                    missing=missing,
                    slow="it compiles",
                )
            )
    return found


MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _of_bools(setup: Setup, mask: Mask) -> MaskMod:
    allowed = mask.allowed

    def counts(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return allowed[b, 0, i, j]

    return counts


def _of_words(setup: Setup, mask: Mask) -> MaskMod:
    """Told where the image is, as one may be that writes for one prompt."""
    words, before, images = mask.words, setup.before, setup.images
    earlier = setup.length - setup.queries

    def counts(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        rank = j - before
        inside = rank.clamp(0, images - 1)
        bit = (words[b, 0, i, inside >> 5] >> (inside & 31)) & 1
        return (j <= i + earlier) & ((rank != inside) | (bit == 0))

    return counts


def _flex(
    mask_mod: Callable[[Setup, Mask], MaskMod], ready: bool
) -> Callable[[Problem, Mask], Attend]:
    def prepare(given: Problem, mask: Mask) -> Attend:
        setup, (attention, block_mask) = given.setup, _compiled()
        counts = mask_mod(setup, mask)

        def make() -> Any:
            size = setup.B, None, setup.queries, setup.length
            return block_mask(counts, *size, device=given.q.device)

        made = make() if ready else None

        def attend() -> Tensor:
            return attention(
                given.q,
                given.k,
                given.v,
                block_mask=made if ready else make(),
                enable_gqa=setup.H != setup.G,
            )

        return attend

    return prepare


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # every set-up compiles anew; beyond the limit torch would run them uncompiled
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
    return torch.compile(flex_attention, **options), torch.compile(create_block_mask, **options)


def importance_from_eager(
    q: Tensor, k: Tensor, v: Tensor, cls_index: int | None = 0
) -> tuple[Tensor, Tensor]:
    """Attention that keeps its weights, as models do when asked for them, and what tokens receive.

    What one does for scores who has only the model: its fused attention is off, every weight is in
    memory, in the dtype of q. q ``[B, H, N, d]``; k and v may have fewer heads. Returns the output
    ``[B, H, N, d]`` and the mean of the weights over the heads, f32 ``[B, N]``: of query
    ``cls_index``, or of all.
    """
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    weights = (q @ k.mT * q.shape[3] ** -0.5).softmax(-1, dtype=torch.float32).to(q.dtype)
    rows = weights if cls_index is None else weights[:, :, cls_index, None]
    return weights @ v, rows.mean((1, 2), dtype=torch.float32)
