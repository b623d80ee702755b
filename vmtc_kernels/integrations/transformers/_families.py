"""What differs between vision-language models: where their parts are, how they lay out tokens.

To add a model: a subclass of `Family` in this file with its ``model_type``, and a test in
tests/test_transformers_families.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...config import VMTCConfig
from .._layout import Layout, by_size, uniform


class Family:
    """A model of one family, as the rest of the integration sees it.

    ``core`` encodes images and holds the language model ``text``; ``layers`` are those of the
    encoder, of whose outputs none after ``last_layer`` is used; ``projector`` takes and gives
    tokens in rows, a token being ``patches`` patches. ``tokens``: the placeholder's id of each
    modality; ``methods``: the method of ``core`` that encodes it. ``unit_tokens``: those of a unit
    of which nothing is cut away, None where they depend on the image.
    """

    model_type: str
    methods: Mapping[str, str] = {"image": "get_image_features"}
    has_cls = False
    patches = 1
    # a layer's attention, and its projections of queries and keys
    attention = "self_attn"
    projections: tuple[str, ...] = ("q_proj", "k_proj")
    # whether the layers after some layer can run on fewer tokens
    shortens = True
    # whether every unit is a square grid of tokens, line by line in the projector's rows
    square_units = False
    unit_tokens: int | None = None
    # a module between encoder and projector that needs the whole grid
    regrouped: nn.Module | None = None
    # what projects the outputs of earlier layers
    side_projectors: tuple[nn.Module, ...] = ()

    layers: nn.ModuleList
    last_layer: int
    text: Any
    projector: nn.Module

    def __init__(self, model: Any) -> None:
        self.model, self.core = model, model.model
        self.tokens = {"image": model.config.image_token_id}

    def layout(self, modality: str, inputs: Mapping[str, Any]) -> Layout:
        """Of the images in ``inputs``, which are a processor's or a method's arguments."""
        raise NotImplementedError

    def tokens_of(self, states: Tensor) -> Tensor:
        """A layer's output as ``[R, patches, D]``, in the order of the projector's rows."""
        raise NotImplementedError

    def scores(self, config: VMTCConfig, kept: dict[str, Any], cls: bool) -> Tensor:
        """f32 ``[R]``: the importance of each row, from what a layer's attention ``kept``."""
        raise NotImplementedError

    def keys(self, kept: dict[str, Any]) -> Tensor:
        """The keys of a layer as ``[R, D]``."""
        raise NotImplementedError

    def sequence(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The layer's output ``states`` with the tokens ``[M, patches * D]`` for its own."""
        raise NotImplementedError

    def shortened(self, rows: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """Arguments of a layer after the merge, of which the rows ``rows``, i64 [M], are left."""
        return None

    def grid_of(self, tokens: Tensor) -> Tensor:
        """What ``regrouped`` takes, of tokens ``[R, patches * D]``."""
        raise NotImplementedError

    def merged_aside(self, index: int, config: VMTCConfig) -> bool:
        """Whether the layer of side projector ``index`` comes after the merge."""
        raise NotImplementedError


class _Siglip(Family):
    """Encoders whose layers take ``[images, places, D]``: CLIP, SigLIP and their kin."""

    cls_tokens = 0

    def _heads(self, projected: Tensor, attention: Any) -> Tensor:
        return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    def scores(self, config: VMTCConfig, kept: dict[str, Any], cls: bool) -> Tensor:
        q, k = (self._heads(kept[name], kept["attention"]) for name in self.projections)
        scores = config.importance(q, k, cls_index=0 if cls else None)
        return self.tokens_of(scores[..., None]).mean((1, 2))

    def keys(self, kept: dict[str, Any]) -> Tensor:
        return self.tokens_of(kept["k_proj"]).flatten(1)

    def tokens_of(self, states: Tensor) -> Tensor:
        return states[:, self.cls_tokens :].flatten(0, 1)[:, None]

    def sequence(self, states: Tensor, tokens: Tensor) -> Tensor:
        tokens = tokens.reshape(len(states), -1, states.shape[2])
        return torch.cat([states[:, : self.cls_tokens], tokens], dim=1)


class Llava(_Siglip):
    model_type = "llava"
    towers = ("clip_vision_model", "siglip_vision_model")
    square_units = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config, vision = model.config, model.config.vision_config
        if vision.model_type not in self.towers:
            raise ValueError(
                f"attach: a {self.model_type} model with a vision tower of type"
                f" {vision.model_type!r} is not supported: only {' and '.join(self.towers)} are"
            )
        self.has_cls = vision.model_type == "clip_vision_model"
        self.whole = config.vision_feature_select_strategy == "full"
        if not self.whole and not self.has_cls:
            raise ValueError(
                "attach: vision_feature_select_strategy='default' takes a patch for [CLS], which"
                f" {vision.model_type} does not have: set it to 'full' in model and processor"
            )
        # rows that the projector sees before the patches of an image
        self.cls_rows = int(self.has_cls and self.whole)
        self.cls_tokens = 0 if self.whole else 1
        self.grid = self.unit_tokens = (vision.image_size // vision.patch_size) ** 2
        self.layers = encoder_layers(self.core.vision_tower, vision.num_hidden_layers)
        self.text = self.core.language_model
        self.projector = self.core.multi_modal_projector
        used = config.vision_feature_layer
        # hidden state i is the output of layer i - 1
        used = [i % (len(self.layers) + 1) for i in ([used] if isinstance(used, int) else used)]
        self.last_layer = min(used) - 1

    def layout(self, modality: str, inputs: Mapping[str, Any]) -> Layout:
        return uniform(inputs["pixel_values"].shape[0], self.grid, self.cls_rows)


class LlavaNext(Llava):
    """Tiles, each a unit; a row of patches ends in a newline, padding is cut away."""

    model_type = "llava_next"
    shortens = False
    square_units = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self.cls_rows:
            raise ValueError(
                "attach: llava_next with vision_feature_select_strategy='full' is not supported,"
                " as its tiles have no place for [CLS]: set it to 'default' in model and processor"
            )

    def layout(self, modality: str, inputs: Mapping[str, Any]) -> Layout:
        config, sizes = self.model.config, inputs["image_sizes"].tolist()
        # the functions of the model say how it cuts, pads and packs: places go the way of features
        tiles_of = sys.modules[type(self.core).__module__].image_size_to_num_patches
        side = config.vision_config.image_size
        tiles = [tiles_of(size, config.image_grid_pinpoints, side) for size in sizes]
        places = torch.arange(sum(tiles) * self.grid, dtype=torch.float64)
        packed, _ = self.core.pack_image_features(
            places.view(-1, self.grid, 1).split(tiles),
            torch.tensor(sizes),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=torch.tensor([-1.0], dtype=torch.float64),
        )
        rows = torch.cat([image[:, 0] for image in packed]).long()
        seen = torch.zeros(len(places), dtype=torch.bool)
        seen[rows[rows >= 0]] = True
        units = [unit[seen[unit]] for unit in torch.arange(len(places)).split(self.grid)]
        return Layout(
            by_size(units),
            rows,
            [len(image) for image in packed],
            len(places),
            fixed=rows[:0],
            whole=self.grid,
        )


class Idefics3(_Siglip):
    """Tiles, each a unit, whose patches are put together ``scale_factor`` squared at a time."""

    model_type = "idefics3"
    square_units = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        vision = model.config.vision_config
        self.factor = model.config.scale_factor
        self.patches = self.factor**2
        self.side = vision.image_size // vision.patch_size
        self.unit_tokens = self.side**2 // self.patches
        self.layers = encoder_layers(self.core.vision_model, vision.num_hidden_layers)
        self.text = self.core.text_model
        self.last_layer = len(self.layers)
        self.regrouped = self.core.connector
        self.projector = self.core.connector.modality_projection

    def layout(self, modality: str, inputs: Mapping[str, Any]) -> Layout:
        # images of zeros alone fill up the batch
        real = (inputs["pixel_values"] != 0).flatten(2).any(2)
        return uniform(int(real.sum()), self.side**2 // self.patches)

    def tokens_of(self, states: Tensor) -> Tensor:
        side, factor = self.side // self.factor, self.factor
        grid = states.unflatten(1, (side, factor, side, factor))
        return grid.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def grid_of(self, tokens: Tensor) -> Tensor:
        side, factor = self.side // self.factor, self.factor
        grid = tokens.reshape(-1, side, side, factor, factor, tokens.shape[1] // self.patches)
        return grid.transpose(2, 3).flatten(1, 4)

    def shortened(self, rows: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        states, mask = args[0], args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise NotImplementedError(
                f"VMTCConfig.placement inside the encoder cannot shorten a {type(mask).__name__}:"
                " load the vision encoder with attn_implementation='sdpa'"
            )
        # [images, 1, queries, keys], of which the places of the patches left remain
        places = self.tokens_of(torch.arange(self.side**2, device=rows.device)[None, :, None])
        per_image = len(places)
        left = places[(rows % per_image).view(len(states), -1), :, 0].flatten(1)
        mask = mask.gather(3, left[:, None, None].expand(*mask.shape[:3], -1))
        if mask.shape[2] > 1:
            mask = mask.gather(
                2, left[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            )
        return (states, mask, *args[2:]), {k: v for k, v in kwargs.items() if k != "attention_mask"}


class SmolVLM(Idefics3):
    model_type = "smolvlm"


class Qwen25VL(Family):
    """Sequences of patches without padding, in windows; frames of a video are units."""

    model_type = "qwen2_5_vl"
    methods: Mapping[str, str] = {"image": "get_image_features", "video": "get_video_features"}
    attention = "attn"
    projections = ("qkv",)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.tokens = {
            "image": model.config.image_token_id,
            "video": model.config.video_token_id,
        }
        visual = self.core.visual
        self.patches = visual.spatial_merge_size**2
        self.layers, self.text = visual.blocks, self.core.language_model
        self.last_layer = len(self.layers)
        self.projector = visual.merger

    def layout(self, modality: str, inputs: Mapping[str, Any]) -> Layout:
        grid = inputs[f"{modality}_grid_thw"].cpu()
        order = self._order(grid)
        frames = self._frames(grid)
        return Layout(
            by_size(list(torch.arange(len(order)).split(frames))),
            order.argsort(),
            self._runs(grid),
            len(order),
            fixed=order[:0],
        )

    def _frames(self, grid: Tensor) -> list[int]:
        return [h * w // self.patches for t, h, w in grid.tolist() for _ in range(t)]

    def _runs(self, grid: Tensor) -> list[int]:
        """Placeholders that follow one another."""
        return (grid.prod(1) // self.patches).tolist()

    def _order(self, grid: Tensor) -> Tensor:
        """i64 ``[R]``: the place in its image, read by lines, of each of the encoder's tokens."""
        visual = self.core.visual
        windows = sys.modules[type(visual).__module__].get_vision_window_index
        return windows(
            grid,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )[0]

    def tokens_of(self, states: Tensor) -> Tensor:
        return states.unflatten(0, (-1, self.patches))

    def sequence(self, states: Tensor, tokens: Tensor) -> Tensor:
        return tokens.reshape(-1, states.shape[1])

    def shortened(self, rows: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        ends, embeddings = kwargs["cu_seqlens"].long(), kwargs["position_embeddings"]
        patch = rows[:, None] * self.patches + torch.arange(self.patches, device=rows.device)
        left = torch.zeros(len(embeddings[0]) + 1, dtype=torch.int32, device=rows.device)
        left[patch.flatten() + 1] = 1
        # windows of which nothing is left are none
        ends = left.cumsum(0, dtype=torch.int32)[ends.to(rows.device)].unique_consecutive()
        kwargs = {
            **kwargs,
            "cu_seqlens": ends,
            "position_embeddings": tuple(x[patch.flatten()] for x in embeddings),
        }
        if kwargs.get("max_seqlen") is not None:
            kwargs["max_seqlen"] = int(ends.diff().max())
        return args, kwargs

    def _queries_keys(self, kept: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """``[T, H, d]``, after the rotary embedding."""
        attention, kwargs = kept["attention"], kept["kwargs"]
        q, k, _ = kept["qkv"].unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        return rotate(q, k, *kwargs["position_embeddings"])

    def keys(self, kept: dict[str, Any]) -> Tensor:
        return self.tokens_of(self._queries_keys(kept)[1].flatten(1)).flatten(1)

    def scores(self, config: VMTCConfig, kept: dict[str, Any], cls: bool) -> Tensor:
        q, k = self._queries_keys(kept)
        ends = kept["kwargs"]["cu_seqlens"].tolist()
        spans = [torch.arange(a, b, device=q.device) for a, b in pairwise(ends)]
        scores = q.new_zeros(len(q), dtype=torch.promote_types(q.dtype, torch.float32))
        for span in by_size(spans):
            # times the length, so that a token of a small window does not gain from it
            part = config.importance(
                q[span].transpose(1, 2), k[span].transpose(1, 2), cls_index=None
            )
            scores = scores.index_put((span,), part * span.shape[1])
        return self.tokens_of(scores).mean(1)


class Qwen3VL(Qwen25VL):
    """No windows; features of earlier layers are added inside the language model."""

    model_type = "qwen3_vl"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.side_projectors = tuple(self.core.visual.deepstack_merger_list)

    def merged_aside(self, index: int, config: VMTCConfig) -> bool:
        if not isinstance(config.placement, int):
            return False
        merge = config.placement % len(self.layers)
        return self.core.visual.deepstack_visual_indexes[index] >= merge

    def _runs(self, grid: Tensor) -> list[int]:
        return self._frames(grid)  # between which there are times

    def _order(self, grid: Tensor) -> Tensor:
        return torch.arange(int(grid.prod(1).sum()) // self.patches)


FAMILIES = {
    family.model_type: family for family in (Llava, LlavaNext, Idefics3, SmolVLM, Qwen25VL, Qwen3VL)
}


def family_of(model: Any) -> Family:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise ValueError(
            f"attach: models of type {kind!r} are not supported, only {', '.join(FAMILIES)}: to"
            f" add one, write a subclass of {Family.__module__}.Family for it"
        )
    if not hasattr(getattr(model, "model", None), "get_image_features"):
        raise ValueError(
            f"attach: {type(model).__name__} does not generate text: load the model with"
            " AutoModelForImageTextToText"
        )
    return FAMILIES[kind](model)


def encoder_layers(tower: nn.Module, depth: int) -> nn.ModuleList:
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"attach: {type(tower).__name__} has no list of {depth} layers")
