"""Settings of the method, with every choice that the paper leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import _checks, _modality
from .focus_attention import FocusAttention, focus_attention
from .kmeans import METRICS
from .merge_tokens import WEIGHTINGS, MergedTokens, merge_tokens
from .paged_focus_attention import paged_focus_attention
from .token_importance import token_importance

PLACEMENTS = ("before_projector", "after_projector")
SCORE_SOURCES = ("auto", "cls", "received")


@dataclass(frozen=True, kw_only=True)
class VMTCConfig:
    """How visual tokens are scored, clustered and merged.

    Attributes:
        num_primary, num_merged: tokens kept and merged tokens for each image: a count (int), or a
            share of the image's tokens in [0, 1] (float; rounded to the nearest token, halves up).
            The paper's budgets are not known; that half of them are merged was measured on a toy,
            docs/quality.md.
        metric: ``"cosine"`` (reported) or ``"euclidean"``.
        weighting: ``"score"``, merged according to importance (reported), or ``"uniform"``.
        iterations: rounds of k-means after the first assignment (not known; 10).
        score_layer: encoder layer whose attention gives the importance, counted as in a Python
            list (not known; -2, the layer whose output LLaVA uses).
        score_source: ``"cls"``, the attention from [CLS] (reported); ``"received"``, what a token
            receives from all, for encoders without [CLS] (ours); ``"auto"``, the first that the
            encoder has.
        feature_layer: what is clustered: ``None`` for the tokens that are merged, ``"keys"`` for
            the attention keys of ``score_layer``, or a layer whose output is taken (not known).
        head_reduction: ``"mean"`` (reported) or ``"max"`` over the heads of ``score_layer``.
        placement: ``"before_projector"``, ``"after_projector"``, or an encoder layer after which
            the remaining layers run on fewer tokens (not known).
    """

    num_primary: int | float = 80
    num_merged: int | float = 80
    metric: str = "cosine"
    weighting: str = "score"
    iterations: int = 10
    score_layer: int = -2
    score_source: str = "auto"
    feature_layer: int | Literal["keys"] | None = None
    head_reduction: str = "mean"
    placement: int | str = "before_projector"

    def __post_init__(self) -> None:
        name = "VMTCConfig"
        for field in ("num_primary", "num_merged"):
            value = getattr(self, field)
            if isinstance(value, float):
                if not 0 <= value <= 1:
                    raise ValueError(f"{name}: {field} as a share must be in [0, 1], got {value}")
            else:
                _checks.count(name, field, value, 0)
        if self.num_primary == self.num_merged == 0:
            raise ValueError(f"{name}: num_primary and num_merged must not both be 0")
        shares = [x for x in (self.num_primary, self.num_merged) if isinstance(x, float)]
        if sum(shares) > 1 + 1e-9:
            raise ValueError(
                f"{name}: num_primary and num_merged as shares must be at most 1 together, got"
                f" {self.num_primary} + {self.num_merged}"
            )
        _checks.option(name, "metric", self.metric, METRICS)
        _checks.option(name, "weighting", self.weighting, WEIGHTINGS)
        _checks.count(name, "iterations", self.iterations, 0)
        _checks.option(name, "score_source", self.score_source, SCORE_SOURCES)
        _checks.option(name, "head_reduction", self.head_reduction, ("mean", "max"))
        if isinstance(self.feature_layer, str):
            _checks.option(name, "feature_layer", self.feature_layer, ("keys",))
        if isinstance(self.placement, str):
            _checks.option(name, "placement", self.placement, PLACEMENTS)

    def counts(self, num_tokens: int, *, clip: bool = False) -> tuple[int, int]:
        """``(P, K)`` for an image of ``num_tokens`` tokens.

        Where they exceed it, raises; with ``clip``, and where both are shares, they become less,
        merged tokens first. There is always at least one.
        """
        primary, merged = (
            int(value * num_tokens + 0.5) if isinstance(value, float) else value
            for value in (self.num_primary, self.num_merged)
        )
        if isinstance(self.num_primary, float) and isinstance(self.num_merged, float):
            clip = True  # both were rounded up, or down
        if clip:
            primary = min(primary, num_tokens)
            merged = min(merged, num_tokens - primary)
            if primary + merged or not num_tokens:
                return primary, merged
            return (1, 0) if self.num_primary else (0, 1)
        if not 0 < primary + merged <= num_tokens:
            raise ValueError(
                f"VMTCConfig: num_primary + num_merged must be 1 to {num_tokens} for an image of"
                f" {num_tokens} tokens, got {primary} + {merged}"
            )
        return primary, merged

    def importance(self, q: Tensor, k: Tensor, *, cls_index: int | None = 0) -> Tensor:
        """`token_importance` of q, k ``[B, H, N, d]`` under ``head_reduction``: f32 ``[B, N]``."""
        if self.head_reduction == "mean":
            return token_importance(q, k, cls_index=cls_index)
        batch, heads = q.shape[:2]
        each = token_importance(
            q.flatten(0, 1)[:, None], k.flatten(0, 1)[:, None], cls_index=cls_index
        )
        return each.unflatten(0, (batch, heads)).amax(dim=1)

    def merge(
        self,
        x: Tensor,
        scores: Tensor,
        *,
        features: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> MergedTokens:
        """`merge_tokens` of x ``[B, N, D]`` and scores ``[B, N]`` under these settings."""
        return merge_tokens(
            x,
            scores,
            *self.counts(x.shape[1]),
            iterations=self.iterations,
            metric=self.metric,
            weighting=self.weighting,
            features=features,
            valid=valid,
        )


@dataclass(frozen=True, kw_only=True)
class CMAIConfig:
    """Which text-image pairs are inhibited, in which layers and phases.

    Attributes:
        keep_ratio: share of the visible image tokens that each text token keeps, in (0, 1], or None
            (not known; 0.5).
        threshold: instead of it, the share of a text token's largest focus score below which a pair
            is inhibited, in [0, 1) (not known).
        min_keep: image tokens that every text token keeps (ours; 1).
        aggregate: ``"product"``, text-to-image attention aggregated by text-to-text attention
            (the abstract), or ``"residual"``, which adds that to the token's own (a reading of
            summaries).
        head_mode: ``"mean"``, one decision for all heads, or ``"per_head"`` (not known).
        renormalize: divide each row of text-to-text attention by its sum (not known; ours).
        suppression: in [0, 1], what the weight of an inhibited pair is multiplied by: 0 removes it,
            as the modified causal mask does (reported).
        layers: the layers that inhibit, counted as in a Python list; ``"upper"``, the upper half of
            them (not known; measured on a toy, docs/quality.md), or None for all.
        prefill, decode: whether pairs are inhibited while the prompt is read, and while tokens are
            generated (not known; both).
    """

    keep_ratio: float | None = 0.5
    threshold: float | None = None
    min_keep: int = 1
    aggregate: str = "product"
    head_mode: str = "mean"
    renormalize: bool = True
    suppression: float = 0.0
    layers: tuple[int, ...] | Literal["upper"] | None = "upper"
    prefill: bool = True
    decode: bool = True

    def __post_init__(self) -> None:
        name = "CMAIConfig"
        _modality.check_selection(name, self.keep_ratio, self.threshold, self.min_keep)
        _checks.option(name, "aggregate", self.aggregate, _modality.AGGREGATES)
        _checks.option(name, "head_mode", self.head_mode, _modality.HEAD_MODES)
        _modality.check_suppression(name, self.suppression)
        if isinstance(self.layers, str):
            if self.layers != "upper":
                raise ValueError(
                    f"{name}: layers must be ints, 'upper' or None, got {self.layers!r}"
                )
            return
        for layer in self.layers or ():
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise TypeError(f"{name}: layers must be ints, got {layer!r}")

    def applies(self, layer: int, num_layers: int) -> bool:
        """Whether layer ``layer``, counted from 0, of ``num_layers`` is one of ``layers``."""
        if self.layers is None:
            return True
        if isinstance(self.layers, str):
            return layer >= num_layers // 2
        outside = [i for i in self.layers if not -num_layers <= i < num_layers]
        if outside:
            raise ValueError(f"CMAIConfig: layers {outside} are not among {num_layers} layers")
        return layer in {i % num_layers for i in self.layers}

    def text_image(
        self,
        batch: int,
        heads: int,
        positions: int,
        num_image: int,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A new state for `attention` of one layer: f32 ``[batch, M, positions, num_image]``."""
        matrices = 1 if self.head_mode == "mean" else heads
        return torch.zeros(batch, matrices, positions, num_image, device=device)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        modality: Tensor,
        num_image: int,
        *,
        scale: float | None = None,
        text_image: Tensor | None = None,
        query_positions: Tensor | None = None,
        return_lse: bool = False,
        return_scores: bool = False,
        return_mask: bool = False,
    ) -> Tensor | FocusAttention:
        """`focus_attention` under these settings; a single query counts as decode.

        In a phase that does not inhibit it is plain attention, which keeps ``text_image`` up to
        date for the other phase.
        """
        return focus_attention(
            q,
            k,
            v,
            modality,
            num_image,
            **self._settings(q.shape[2]),
            scale=scale,
            text_image=text_image,
            query_positions=query_positions,
            return_lse=return_lse,
            return_scores=return_scores,
            return_mask=return_mask,
        )

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        modality: Tensor,
        num_image: int,
        *,
        scale: float | None = None,
        text_image: Tensor | None = None,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """`paged_focus_attention` under these settings, as `attention` is `focus_attention`."""
        return paged_focus_attention(
            q,
            k_cache,
            v_cache,
            block_table,
            seq_lens,
            modality,
            num_image,
            **self._settings(q.shape[2]),
            scale=scale,
            text_image=text_image,
            query_positions=query_positions,
        )

    def _settings(self, queries: int) -> dict[str, Any]:
        inhibits = self.decode if queries == 1 else self.prefill
        return {
            "keep_ratio": self.keep_ratio,
            "threshold": self.threshold,
            "aggregate": self.aggregate,
            "head_mode": self.head_mode,
            "renormalize": self.renormalize,
            "min_keep": self.min_keep,
            "suppression": self.suppression if inhibits else 1.0,
        }
