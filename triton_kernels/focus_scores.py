"""focus_scores: attention of text queries twice over their logits, then its product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .focus_decode import Logits, few, few_attention, few_logits
from .focus_layout import Layout, layout
from .focus_logits import text_attention, text_softmax, tile
from .focus_product import product
from .launch import device_guard
from .masked_attention import operands

# what the attention of text queries to text may take; more queries are done one part after another
WORKSPACE = 256 * 2**20


class Rule(NamedTuple):
    """How scores are made."""

    images: int
    aggregate: str
    head_mode: str
    renormalize: bool

    def heads(self, q: Tensor) -> int:
        return 1 if self.head_mode == "mean" else q.shape[1]


def state_of(q: Tensor, length: int, rule: Rule, positions: Tensor | None) -> Tensor:
    """The state of a call that has none: all its text keys are queries of its own."""
    shape = (q.shape[0], rule.heads(q), length, rule.images)
    # placed queries may leave out a text key, whose row is zero then
    made = torch.empty if positions is None else torch.zeros
    return made(shape, dtype=torch.float32, device=q.device)


def part(batch: int, heads: int, length: int, queries: int) -> int:
    """Text queries of a part: all that fit the workspace, in blocks of 64."""
    fit = WORKSPACE // (4 * batch * heads * length) // 64 * 64
    return min(queries, max(fit, 64))


def scored(
    given: dict[str, Any],
    at: Layout,
    rule: Rule,
    state: Tensor,
    scores: Tensor | None,
    logits: Logits | None,
) -> Iterator[tuple[int, Tensor]]:
    """Scores of the text queries, a part at a time: its first row, and f32 [B, M, rows, images].

    With ``scores`` [B, M, Lq, images] they are written there, to the places of the queries.
    logits: of few queries.
    """
    q = given["q_ptr"]
    B, _, Lq, d = q.shape
    M, length = rule.heads(q), at.keys.shape[2]
    rows = part(B, M, length, Lq)
    new = state.new_empty
    values = {
        **given,
        **at.values(),
        "state_ptr": state,
        **{f"stride_s{axis}": state.stride(n) for n, axis in enumerate("bhni")},
        "M": M,
        "images": rule.images,
        "rows": rows,
        "columns": length,
        "start_row": 0,
        "BY_QUERY": scores is not None,
        "RENORMALIZE": rule.renormalize,
        "RESIDUAL": rule.aggregate == "residual",
    }
    text = new(B, M, rows, length)
    out = new(B, M, rows, rule.images) if scores is None else scores
    if logits is not None:
        few_attention(logits, values | {"text_ptr": text})
        product(text, state, out, values)
        yield 0, out
        return
    values |= {name: new(B, q.shape[1], Lq) for name in ("largest_ptr", "inverses_ptr")}
    choice = tile(d, q.dtype)
    text_softmax(choice, values)
    for start in range(0, Lq, rows):
        values["start_row"] = start
        text_attention(choice, values | {"text_ptr": text})
        product(text, state, out, values)
        yield start, out


def focus_scores(
    q: Tensor,
    k: Tensor,
    modality: Tensor,
    num_image: int,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Tensor:
    """See `vmtc_kernels.focus_scores`. float32, float16 or bfloat16."""
    B, _, Lq, _ = q.shape
    rule = Rule(num_image, aggregate, head_mode, renormalize)
    shape = (B, rule.heads(q), Lq, num_image)
    scores = torch.zeros(shape, dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    with device_guard(q):
        at = layout(modality, Lq, query_positions)
        state = text_image
        if state is None:
            state = state_of(q, modality.shape[1], rule, query_positions)
        given = operands(q, k, None, scale)
        logits = few_logits(given | at.values()) if few(given) else None
        for _ in scored(given, at, rule, state, scores, logits):
            pass
    return scores
