"""What the suites of focus attention share: sequences of text and images, the ways of others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import vmtc_kernels
from vmtc_kernels.focus_mask import unpack

from .case import Cost, Verdict


@dataclass(frozen=True)
class Setup:
    """``before`` text tokens, one image of ``images`` tokens, ``after`` text tokens.

    phase: ``prefill`` of all of them, or ``decode`` of the last one over the keys of all.
    """

    phase: str = "prefill"
    B: int = 1
    H: int = 32
    G: int = 32
    d: int = 128
    before: int = 35
    images: int = 576
    after: int = 64
    keep_ratio: float = 0.5
    dtype: str = "float32"

    @property
    def length(self) -> int:
        return self.before + self.images + self.after

    @property
    def queries(self) -> int:
        return self.length if self.phase == "prefill" else 1


@dataclass
class Problem:
    """q, k, v, modality and, for decode, the state of the earlier text tokens."""

    setup: Setup
    q: Tensor
    k: Tensor
    v: Tensor
    modality: Tensor
    text_image: Tensor | None

    def ours(self, **options: Any) -> Any:
        return vmtc_kernels.focus_attention(
            self.q,
            self.k,
            self.v,
            self.modality,
            self.setup.images,
            keep_ratio=self.setup.keep_ratio,
            text_image=self.text_image,
            **options,
        )

    def causal(self) -> Tensor:
        """Without any inhibition: what nobody who attends at all can do without."""
        return scaled_dot_product_attention(
            self.q,
            self.k,
            self.v,
            is_causal=self.setup.phase == "prefill",
            enable_gqa=self.setup.H != self.setup.G,
        )

    def masked(self, allowed: Tensor) -> Tensor:
        """Given the mask, ready and dense: bool [B, 1, Lq, L]."""
        return scaled_dot_product_attention(
            self.q, self.k, self.v, attn_mask=allowed, enable_gqa=self.setup.H != self.setup.G
        )

    def allowed(self) -> Tensor:
        """bool [B, 1, Lq, L]: what is visible and not inhibited, by our own mask."""
        mask = self.ours(return_mask=True).mask
        setup = self.setup
        shape = (setup.B, 1, setup.queries, setup.length)
        allowed = torch.ones(shape, dtype=torch.bool, device=self.q.device)
        if setup.phase == "prefill":
            allowed = allowed.tril()
        allowed[..., setup.before : setup.before + setup.images] &= ~unpack(mask, setup.images)
        return allowed


def problem(setup: Setup, device: str = "cpu", seed: int = 0) -> Problem:
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, setup.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    length = setup.length
    modality = torch.ones(setup.B, length, dtype=torch.uint8, device=device)
    modality[:, setup.before : setup.before + setup.images] = 2
    state = None
    if setup.phase == "decode":
        shape = (setup.B, 1, length, setup.images)
        state = torch.rand(shape, generator=generator, device=device) / length
    return Problem(
        setup,
        normal(setup.B, setup.H, setup.queries, setup.d),
        normal(setup.B, setup.G, length, setup.d),
        normal(setup.B, setup.G, length, setup.d),
        modality,
        state,
    )


def eager(given: Problem) -> Tensor:
    """As one writes it into a model's eager attention: every matrix of probabilities in full."""
    setup = given.setup
    share = setup.H // setup.G
    k, v = (x.repeat_interleave(share, 1) for x in (given.k, given.v))
    logits = (given.q @ k.mT).float() * setup.d**-0.5
    length, queries = setup.length, setup.queries
    device = given.q.device
    place = torch.arange(length, device=device)
    visible = place <= place[length - queries :, None]
    logits = logits.masked_fill(~visible, -math.inf)
    mean = logits.softmax(-1).mean(1)  # [B, Lq, L]
    first, last = setup.before, setup.before + setup.images
    text = given.modality[:, None] == 1
    to_text = mean * text
    to_text = to_text / to_text.sum(-1, keepdim=True)
    if given.text_image is None:
        rows = mean[:, :, first:last]
    else:
        given.text_image[:, 0, length - queries :] = mean[:, :, first:last]
        rows = given.text_image[:, 0]
    scores = to_text @ (rows * text.mT)
    asks = given.modality[:, length - queries :] == 1
    keep = math.ceil(setup.keep_ratio * setup.images)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(-1, scores.topk(keep, dim=-1).indices, True)
    seen = visible[:, last - 1] & asks  # text queries before the image inhibit nothing
    logits[..., first:last] = logits[..., first:last].masked_fill(
        ~(kept | ~seen[..., None])[:, None], -math.inf
    )
    return logits.softmax(-1).to(v.dtype) @ v


def near(got: Tensor, expected: Tensor, tolerance: float, rows: float = 1e-3) -> Verdict:
    """Of the largest value; a share of ``rows`` may differ more: a score at the cut of a row may
    fall on either side."""
    if got.shape != expected.shape:
        return Verdict(False, f"shape {list(got.shape)}, expected {list(expected.shape)}")
    # on a GPU in float32, in pieces: both may be large
    worst = (got.float() - expected.float()).abs().amax(-1) / float(expected.abs().max())
    other = worst > tolerance
    share = float(other.float().mean())
    most = float(worst[~other].max()) if not other.all() else math.inf
    return Verdict(
        share <= rows,
        f"differs by {most:.0e} of the largest value, {share:.1%} of the rows by more",
    )


def cost(setup: Setup) -> Cost:
    """Plain causal attention: queries, keys and values in, the output out, two products."""
    itemsize = getattr(torch, setup.dtype).itemsize
    queries = 2 * setup.B * setup.H * setup.queries * setup.d
    keys = 2 * setup.B * setup.G * setup.length * setup.d
    pairs = setup.length if setup.phase == "decode" else setup.length * (setup.length + 1) // 2
    return Cost(bytes=itemsize * (queries + keys), flops=4 * setup.B * setup.H * pairs * setup.d)


def inference(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return call()

    return run
