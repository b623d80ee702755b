"""Where the encoders of vLLM have what compression needs, and which image shows which row."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from ...config import VMTCConfig
from .._layout import Layout, by_size


class Images(NamedTuple):
    """Some images as they pass through a projector: ``units``, the rows of each unit of each
    image; the others as in `Layout`."""

    units: list[list[Tensor]]
    rows: Tensor
    splits: list[int]
    size: int
    fixed: Tensor
    whole: int | None = None

    def layouts(self, configs: list[VMTCConfig]) -> list[tuple[VMTCConfig, Layout]]:
        """Those of the same settings together; the fixed rows are in the first."""
        together: dict[VMTCConfig, list[Tensor]] = {}
        for units, config in zip(self.units, configs, strict=True):
            together.setdefault(config, []).extend(units)
        none = self.fixed[:0]
        return [
            (config, Layout(by_size(units), *self[1:4], none if i else self.fixed, self.whole))
            for i, (config, units) in enumerate(together.items())
        ]

    def shown(self, configs: list[VMTCConfig]) -> list[int]:
        """How many placeholders each image keeps."""
        stays = torch.zeros(len(self.rows), dtype=torch.bool)
        for config, layout in self.layouts(configs):
            stays |= layout.placeholders(config) & (self.rows >= 0)
        stays |= self.rows < 0
        return [int(part.sum()) for part in stays.split(self.splits)]


def grid_images(tokens: list[int], first: int = 0) -> Images:
    """Images whose rows follow one another, the ``first`` of each fixed; each is a unit."""
    rows = list(torch.arange(sum(tokens)).split(tokens))
    return Images(
        [[part[first:]] for part in rows],
        torch.arange(sum(tokens)),
        tokens,
        sum(tokens),
        torch.cat([part[:first] for part in rows]) if rows else torch.arange(0),
    )


def llava_images(config: Any, count: int) -> Images:
    """Of ``count`` images that a LLaVA-1.5 of this configuration reads."""
    first = _cls_rows(config)
    return grid_images([_grid(config) + first] * count, first)


def llava_next_images(
    config: Any, sizes: list[list[int]], padded: list[int] | None = None
) -> Images:
    """Of images of these heights and widths; ``padded``: how many tiles each has, with padding."""
    # vLLM's own method packs, cuts and ends the lines: places go the way of features
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration as Stock
    from vllm.model_executor.models.llava_next import get_anyres_image_grid_shape

    grid, side = _grid(config), config.vision_config.image_size
    newline = torch.tensor([-1.0], dtype=torch.float64)
    model = SimpleNamespace(config=config, image_newline=newline)
    units: list[list[Tensor]] = []
    rows, size = [], 0
    for i, (height, width) in enumerate(sizes):
        shape = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, side)
        tiles = padded[i] if padded else 1 + shape[0] * shape[1]
        places = torch.arange(size, size + tiles * grid, dtype=torch.float64)
        packed = Stock._merge_image_patch_embeddings(
            model,
            torch.tensor([height, width]),
            places.view(tiles, grid, 1),
            strategy="spatial_unpad",
        )
        rows.append(packed[:, 0].long())
        seen = torch.zeros(size + tiles * grid, dtype=torch.bool)
        seen[rows[-1][rows[-1] >= 0]] = True
        of_tiles = places.long().split(grid)
        units.append([tile[seen[tile]] for tile in of_tiles])
        size += tiles * grid
    return Images(
        units,
        torch.cat(rows),
        [len(part) for part in rows],
        size,
        torch.arange(0),
        whole=grid,
    )


def _grid(config: Any) -> int:
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def _cls_rows(config: Any) -> int:
    """Rows of [CLS] that the projector sees before the patches of an image."""
    return int(has_cls(config) and config.vision_feature_select_strategy == "full")


def has_cls(config: Any) -> bool:
    return bool(config.vision_config.model_type == "clip_vision_model")


class Encoder:
    """The encoder of one model.

    ``layers``: those that vLLM loads of ``depth``; ``projector`` takes and gives tokens in rows, of
    ``patches`` patches each; ``qkv``: the name of the projection in a layer's attention.
    """

    patches = 1
    has_cls = False
    attention = "self_attn"
    qkv = "qkv_proj"

    layers: nn.ModuleList
    depth: int
    projector: nn.Module

    def __init__(self, model: Any) -> None: ...

    def heads(self, kept: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Queries and keys of this rank's heads."""
        raise NotImplementedError

    def scores(self, config: VMTCConfig, kept: dict[str, Any], cls: bool) -> Tensor:
        """f32 ``[R]``: the importance of each row, over the heads of all ranks."""
        raise NotImplementedError

    def keys(self, kept: dict[str, Any]) -> Tensor:
        """The keys of all heads, ``[R, D]``."""
        raise NotImplementedError

    def tokens_of(self, states: Tensor) -> Tensor:
        """A layer's output as ``[R, patches, D]``."""
        raise NotImplementedError

    def sequence(self, states: Tensor, tokens: Tensor) -> Tensor:
        """A layer's output with the tokens ``[M, D]`` for its own."""
        raise NotImplementedError


class Clip(Encoder):
    """CLIP and SigLIP, whose layers take ``[images, places, D]``."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.has_cls = has_cls(config)
        self.layers = model.vision_tower.vision_model.encoder.layers
        self.depth = config.vision_config.num_hidden_layers
        self.projector = model.multi_modal_projector
        # places before those that the projector sees
        self.first = int(self.has_cls and config.vision_feature_select_strategy == "default")

    def tokens_of(self, states: Tensor) -> Tensor:
        return states[:, self.first :].flatten(0, 1)[:, None]

    def heads(self, kept: dict[str, Any]) -> tuple[Tensor, Tensor]:
        heads = kept["attention"].num_heads_per_partition
        q, k, _ = kept["qkv"].chunk(3, dim=-1)
        return tuple(x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))  # type: ignore

    def scores(self, config: VMTCConfig, kept: dict[str, Any], cls: bool) -> Tensor:
        q, k = self.heads(kept)
        scores = over_ranks(config, config.importance(q, k, cls_index=0 if cls else None))
        return self.tokens_of(scores[..., None])[:, 0, 0]

    def keys(self, kept: dict[str, Any]) -> Tensor:
        keys = kept["qkv"].chunk(3, dim=-1)[1]
        return self.tokens_of(_of_all_ranks(keys)).flatten(1)

    def sequence(self, states: Tensor, tokens: Tensor) -> Tensor:
        tokens = tokens.reshape(len(states), -1, states.shape[2])
        return torch.cat([states[:, : self.first], tokens], dim=1)


class Qwen(Encoder):
    """Sequences of patches without padding, four of which are a token; in 2.5 they are in the order
    of windows."""

    attention = "attn"
    qkv = "qkv"

    def __init__(self, model: Any) -> None:
        visual = model.visual
        self.visual = visual
        self.patches = visual.spatial_merge_size**2
        self.layers = visual.blocks
        self.depth = len(visual.blocks)
        self.projector = visual.merger

    def images(self, grids: list[list[int]]) -> Images:
        """By their grids: frames, rows and columns of patches."""
        counts = [t * h * w // self.patches for t, h, w in grids]
        units, rows, size = [], [], 0
        for (t, h, w), count in zip(grids, counts, strict=True):
            order = torch.arange(count)
            if hasattr(self.visual, "get_window_index_thw"):
                order = self.visual.get_window_index_thw(t, h, w)[0]
            units.append(list(torch.arange(size, size + count).split(count // max(t, 1))))
            rows.append(order.argsort() + size)
            size += count
        return Images(units, torch.cat(rows), counts, size, torch.arange(0))

    def tokens_of(self, states: Tensor) -> Tensor:
        return states.flatten(0, -2).unflatten(0, (-1, self.patches))

    def heads(self, kept: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """``[S, H, d]``, after the rotary embedding."""
        attention, kwargs = kept["attention"], kept["kwargs"]
        heads = attention.num_attention_heads_per_partition
        q, k, _ = kept["qkv"].flatten(0, -2).unflatten(-1, (3, heads, -1)).unbind(1)
        both = attention.apply_rotary_emb(
            torch.stack([q, k]), kwargs["rotary_pos_emb_cos"], kwargs["rotary_pos_emb_sin"]
        )
        return both[0], both[1]

    def scores(self, config: VMTCConfig, kept: dict[str, Any], cls: bool) -> Tensor:
        q, k = self.heads(kept)
        ends = kept["kwargs"]["cu_seqlens"].tolist()
        spans = [torch.arange(a, b, device=q.device) for a, b in pairwise(ends)]
        scores = q.new_zeros(len(q), dtype=torch.float32)
        for span in by_size(spans):
            part = config.importance(
                q[span].transpose(1, 2), k[span].transpose(1, 2), cls_index=None
            )
            # times the length, so that a token of a small window does not gain from it
            scores[span] = part * span.shape[1]
        return self.tokens_of(over_ranks(config, scores)[:, None]).mean((1, 2))

    def keys(self, kept: dict[str, Any]) -> Tensor:
        return self.tokens_of(_of_all_ranks(self.heads(kept)[1].flatten(1))).flatten(1)


def over_ranks(config: VMTCConfig, scores: Tensor) -> Tensor:
    """The mean or the maximum over heads, of what each rank has of its own heads."""
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        return scores
    if config.head_reduction == "mean":
        return tensor_model_parallel_all_reduce(scores.contiguous()) / ranks
    each = tensor_model_parallel_all_gather(scores[None].contiguous(), dim=0)
    return each.amax(0)


def _of_all_ranks(x: Tensor) -> Tensor:
    if get_tensor_model_parallel_world_size() == 1:
        return x
    return tensor_model_parallel_all_gather(x.contiguous(), dim=-1)
