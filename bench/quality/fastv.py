"""FastV (arXiv 2403.06764) in the laboratory's model, written from its paper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..llava_rivals import attention_row, pick

LAYER = 2  # so many layers see all tokens


def prune(model: Any, tokens: int, stack: ExitStack) -> None:
    """From layer `LAYER` of the language model on only ``tokens`` image tokens of each row: those
    to which the prompt's last token attends most in the layer before, at their places.

    For `generate` with its cache, and for a whole prompt: its logits ``[B, L - N + tokens, V]`` are
    of what is left. The stack undoes it. Raises ValueError for an attention other than sdpa; in a
    pass also for padding, a static cache, rows of unequal numbers of image tokens, and
    prompts read in pieces.
    """
    text = model.model.language_model
    if text.config._attn_implementation != "sdpa":
        raise ValueError(
            "FastV needs the language model's attention 'sdpa', which is causal without a mask,"
            f" got {text.config._attn_implementation!r}"
        )
    pruning = _Pruning(model.config.image_token_id, tokens)
    before = text.layers[LAYER - 1].self_attn
    hooks = [
        model.model.register_forward_pre_hook(pruning.begin, with_kwargs=True),
        before.q_proj.register_forward_hook(pruning.keep("q")),
        before.k_proj.register_forward_hook(pruning.keep("k")),
    ]
    for layer in text.layers[LAYER:]:
        hooks.append(layer.register_forward_pre_hook(pruning.shorten, with_kwargs=True))
    for hook in hooks:
        stack.callback(hook.remove)


class _Pruning:
    """What the hooks of one model tell one another in a pass."""

    def __init__(self, image: int, tokens: int) -> None:
        self.image, self.tokens = image, tokens
        # i64 [B, N], the places of image tokens in the prompt
        self.places = torch.empty(0, 0, dtype=torch.int64)
        self.projected: dict[str, Tensor] = {}
        # arguments of the layers that see fewer tokens
        self.kept = torch.empty(0)
        self.changed: dict[str, Any] = {}

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError("FastV needs input_ids, which say what is an image")
        if ids.shape[1] == 1:
            return  # decoding
        images = ids == self.image
        each = images.sum(1).tolist()
        if min(each) != max(each) or each[0] < self.tokens:
            raise ValueError(
                f"FastV keeps {self.tokens} image tokens of rows that have the same number of"
                f" them, at least as many, got {each}"
            )
        self.places = images.nonzero()[:, 1].view(len(ids), -1)

    def keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.projected[name] = output

        return hook

    def shorten(self, layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        states = args[0]
        if states.shape[1] == 1:
            # of no row is anything padding: the new token sees all that this layer's cache holds
            return args, {**kwargs, "attention_mask": None}
        if layer.self_attn.layer_idx == LAYER:
            self._choose(layer.self_attn, states, kwargs)
            states = pick(states, self.kept)
        return (states, *args[1:]), {**kwargs, **self.changed}

    def _choose(self, attention: Any, states: Tensor, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and cache.get_max_length() >= 0:
            raise ValueError("FastV needs a cache that grows, as layers hold unequal numbers")
        if cache is not None and int(cache.get_seq_length(LAYER)):
            raise ValueError("FastV reads a prompt in one piece: the cache holds tokens already")
        if kwargs["attention_mask"] is not None:
            raise ValueError("FastV needs prompts without padding")
        batch, length = states.shape[:2]
        cos, sin = (x.expand(batch, -1, -1) for x in kwargs["position_embeddings"])
        q, k = (
            _rotate(self.projected.pop(name).unflatten(2, (-1, attention.head_dim)), cos, sin)
            for name in ("q", "k")
        )
        k = k.repeat_interleave(attention.num_key_value_groups, dim=1)
        weights = attention_row(q[:, :, -1:], k, attention.scaling)  # [B, L]
        best = weights.gather(1, self.places).topk(self.tokens).indices
        stays = torch.ones_like(weights, dtype=torch.bool).scatter(1, self.places, False)
        stays = stays.scatter(1, self.places.gather(1, best), True)
        self.kept = stays.nonzero()[:, 1].view(batch, -1)
        where = kwargs.get("position_ids")
        if where is None:
            where = torch.arange(length, device=states.device)[None]
        self.changed = {
            "position_ids": where.expand(batch, -1).gather(1, self.kept),
            "position_embeddings": (pick(cos, self.kept), pick(sin, self.kept)),
        }


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[B, H, L, d]`` of x ``[B, L, H, d]``, by the angles of ``[B, L, d]``."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos[:, :, None] + turned * sin[:, :, None]).transpose(1, 2)
