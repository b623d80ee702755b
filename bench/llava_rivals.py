"""VisionZip (arXiv 2412.04467) and FastV (arXiv 2403.06764), written from their papers.

The model's attention stays SDPA with both: each needs one row of one layer's attention weights,
which is computed beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .case import Kind
from .llava import First, Size, Variant


class VisionZip(First):
    """Dominant tokens by the attention of [CLS] in the layer that LLaVA reads, contextual ones in
    the proportion of its paper, 10 of 64."""

    kind: Kind = "rival"
    scope = "selects and merges"

    def __init__(self, name: str, size: Size, tokens: int) -> None:
        super().__init__(name, size, tokens)
        self.contextual = tokens * 10 // 64
        self.kept: dict[str, Tensor] = {}
        # of the first image of the first run, which is judged: what was selected from, and what was
        self.seen: tuple[Tensor, ...] = ()

    def enter(self, model: Any, stack: ExitStack) -> None:
        super().enter(model, stack)
        tower = model.model.vision_tower
        layers = next(m for m in tower.modules() if isinstance(m, nn.ModuleList))
        for name in ("q_proj", "k_proj"):
            module = getattr(layers[-2].self_attn, name)
            stack.callback(module.register_forward_hook(self._keep(name)).remove)

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            # [B, H, 1 + N, d]
            self.kept[name] = output.unflatten(2, (self.size.vision[2], -1)).transpose(1, 2)

        return hook

    def reduce(self, x: Tensor) -> Tensor:
        q, k = self.kept.pop("q_proj"), self.kept.pop("k_proj")
        scores = attention_row(q[:, :, :1], k, q.shape[3] ** -0.5)[:, 1:]
        keys = k[:, :, 1:].float().mean(1)
        out = visionzip(x, scores, keys, self.tokens - self.contextual, self.contextual)
        self.seen = self.seen or tuple(t[0].clone() for t in (x, scores, keys, out))
        return out


class FastV(Variant):
    """All tokens in two layers of the language model; then those that its last token attends to
    most in the second, at their places."""

    scope = "selects, after 2 layers"
    LAYER = 2
    KEY = "bench_fastv"

    def __init__(self, name: str, size: Size, tokens: int, before: int) -> None:
        super().__init__(name, size, tokens)
        self.before, self.placeholders = before, size.grid
        # the row of attention weights, and from LAYER on who is left and where
        self.weights = self.kept = torch.empty(0)
        self.places: dict[str, Any] = {}

    def left(self, layer: int) -> int:
        return self.tokens if layer >= self.LAYER else self.size.grid

    def enter(self, model: Any, stack: ExitStack) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        stock = AttentionInterface()["sdpa"]

        def attend(module: Any, q: Tensor, k: Tensor, *args: Any, **options: Any) -> Any:
            if module.layer_idx == self.LAYER - 1 and q.shape[2] > 1:
                self.weights = attention_row(q[:, :, -1:], k, options["scaling"])
            return stock(module, q, k, *args, **options)

        AttentionInterface.register(self.KEY, attend)
        AttentionMaskInterface.register(self.KEY, AttentionMaskInterface()["sdpa"])
        model.set_attn_implementation({"text_config": self.KEY})
        stack.callback(model.set_attn_implementation, {"text_config": "sdpa"})
        for layer in model.model.language_model.layers[self.LAYER :]:
            hook = layer.register_forward_pre_hook(self._shorten, with_kwargs=True)
            stack.callback(hook.remove)

    def _shorten(self, layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        states = args[0]
        if states.shape[1] == 1:
            return None  # decoding
        if layer.self_attn.layer_idx == self.LAYER:
            if kwargs["attention_mask"] is not None:
                raise ValueError("FastV is written for prompts without padding")
            end = self.before + self.size.grid
            best = self.weights[:, self.before : end].topk(self.tokens).indices.sort().values
            place = torch.arange(states.shape[1], device=states.device).expand(len(states), -1)
            self.kept = torch.cat(
                [place[:, : self.before], best + self.before, place[:, end:]], dim=1
            )
            states = pick(states, self.kept)
            cos_sin = kwargs["position_embeddings"]
            self.places = {
                "position_ids": self.kept,
                "position_embeddings": tuple(
                    pick(x.expand(len(states), -1, -1), self.kept) for x in cos_sin
                ),
            }
        return (states, *args[1:]), {**kwargs, **self.places}


def attention_row(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """f32 ``[B, L]``: the attention of one query ``[B, H, 1, d]``, the mean over heads."""
    return (q @ k.mT * scale).softmax(-1, dtype=torch.float32).mean(1)[:, 0]


def pick(x: Tensor, index: Tensor) -> Tensor:
    """``[B, K, D]`` of ``[B, N, D]``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def visionzip(x: Tensor, scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> Tensor:
    """VisionZip's tokens ``[B, dominant + contextual, D]`` of x ``[B, N, D]``.

    The dominant ones are those of the highest scores ``[B, N]``. Of the others every so many-th is
    a target, which becomes the mean of itself and those whose keys ``[B, N, d]`` are most like its
    own by cosine. On a GPU the host waits for nothing.
    """
    order = scores.argsort(dim=1, descending=True)
    first, rest = order[:, :dominant].sort().values, order[:, dominant:].sort().values
    others, directions = pick(x, rest), normalize(pick(keys, rest), dim=2)
    slots = torch.arange(contextual, device=x.device)
    targets = slots * max(1, rest.shape[1] // contextual)
    nearest = (directions @ directions[:, targets].mT).argmax(2)
    nearest[:, targets] = slots
    member = (nearest[..., None] == slots).to(x.dtype)
    merged = member.mT @ others / member.sum(1)[..., None]
    return torch.cat([pick(x, first), merged], dim=1)


def visionzip_loop(x: Tensor, scores: Tensor, keys: Tensor, contextual: int, count: int) -> Tensor:
    """What `visionzip` gives for one image of ``count`` tokens left, one token after another."""
    order = sorted(range(len(x)), key=lambda i: -float(scores[i]))
    kept, rest = sorted(order[: count - contextual]), sorted(order[count - contextual :])
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    unit = [key / key.norm() for key in keys]
    groups, ends = {target: [target] for target in targets}, torch.stack([unit[t] for t in targets])
    for token in rest:
        if token not in groups:
            groups[targets[int((ends @ unit[token]).argmax())]].append(token)
    return torch.stack([x[i] for i in kept] + [x[group].mean(0) for group in groups.values()])
