"""Qwen's models in vLLM: their images have places in a grid, which go with their tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import PlaceholderRange

from .._merging import merge_alike
from ._encoders import Images, Qwen
from ._focus import Bounded, Seen
from ._models import Compressing
from ._processing import QwenInfo, QwenProcessing
from ._vision import Run

# 16-bit embeddings have integers up to 256 exactly
DIGIT = 128


def beside(left: Tensor, width: int, like: Tensor) -> Tensor:
    """``[M, 4]``: row and column, two digits each, of the places ``left`` in a grid."""
    digits = [x for n in (left // width, left % width) for x in (n // DIGIT, n % DIGIT)]
    return torch.stack(digits, 1).to(like.dtype)


def offsets_of(columns: Tensor) -> Tensor:
    """i64 ``[2, M]``, what `beside` wrote."""
    digits = columns.long().unflatten(1, (2, 2))
    return (digits[..., 0] * DIGIT + digits[..., 1]).T


class Moving(Compressing):
    """Rotary positions of tokens that stay where they were in the grid.

    vLLM makes the positions of a prompt before its images are encoded: then all tokens of an image
    are where it begins. The encoder writes rows and columns beside the embeddings, and they are
    added when a step has both its embeddings and its positions.
    """

    # of the step: which of its tokens are of images, and how far from where these begin, [2, M]
    moves: tuple[Tensor, Tensor] | None = None
    visual: Any
    # columns of an embedding without what is beside it, and those that the projector makes
    width: int
    main: int

    def images(self, kwargs: dict[str, Any]) -> Images:
        assert self.vision is not None and isinstance(self.vision.encoder, Qwen)
        return self.vision.encoder.images(kwargs["image_grid_thw"].tolist())

    def finish(self, run: Run, whole: Any) -> Any:
        return whole  # done while the grids are known

    def _process_image_input(self, image_input: Any) -> Any:
        whole = super()._process_image_input(image_input)
        if self.vision is None:
            return whole
        run = self.vision.run
        shown = [torch.ones(len(image)) for image in whole]
        if run is not None:
            shown, whole = run.shown(), self._merge_aside(run, whole)
        widths = (image_input["image_grid_thw"][:, 2] // self.visual.spatial_merge_size).tolist()
        parts = []
        for image, stays, width in zip(whole, shown, widths, strict=True):
            left = stays.nonzero()[:, 0].to(image.device)
            parts.append(torch.cat([image[left], beside(left, width, image)], dim=1))
        return tuple(parts)

    def _merge_aside(self, run: Run, whole: Any) -> Any:
        """Merge what other projectors made of the same tokens, in further columns."""
        if self.width == self.main:
            return whole
        flat = torch.cat(list(whole))
        aside = flat[:, self.main :]
        for config, merged in run.merged:
            aside = merge_alike(merged, config, aside)
        flat = torch.cat([flat[:, : self.main], aside], dim=1)
        return flat.split([len(image) for image in whole])

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> Tensor:
        self.moves = None
        if self.vision is not None and multimodal_embeddings:
            at = is_multimodal.nonzero()[:, 0].split([len(x) for x in multimodal_embeddings])
            # those of videos are not compressed, and have nothing beside them
            moved = [i for i, x in enumerate(multimodal_embeddings) if x.shape[1] > self.width]
            if moved:
                offsets = [offsets_of(multimodal_embeddings[i][:, self.width :]) for i in moved]
                self.moves = torch.cat([at[i] for i in moved]), torch.cat(offsets, dim=1)
            multimodal_embeddings = [x[:, : self.width] for x in multimodal_embeddings]
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.moves is not None:
            at, offsets = (x.to(positions.device) for x in self.moves)
            self.moves = None
            # in place, as graphs read them where they are; the engine writes them at each step
            positions[1:, at] = positions[:1, at] + offsets
        return super().forward(input_ids, positions, *args, **kwargs)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Any
    ) -> tuple[Tensor, int]:
        """The model's own answer for the prompt with all tokens, then what is left of it."""
        stock = super().get_mrope_input_positions
        if self.vision is None:
            return stock(input_tokens, mm_features)
        tokens: list[int] = []
        features, spans, begin = [], [], 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            offset, length = feature.mm_position.offset, feature.mm_position.length
            whole = length
            if feature.modality == "image":
                grid = feature.data["image_grid_thw"].data
                whole = int(grid.prod()) // self.visual.spatial_merge_size**2
                spans.append((offset, length, whole))
            tokens += input_tokens[begin:offset]
            place = PlaceholderRange(offset=len(tokens), length=whole)
            features.append(dataclasses.replace(feature, mm_position=place))
            begin = offset + length
            tokens += input_tokens[offset:begin] + [input_tokens[offset]] * (whole - length)
        tokens += input_tokens[begin:]
        positions, delta = stock(tokens, features)
        left = torch.ones(len(tokens), dtype=torch.bool)
        more = 0
        for offset, length, whole in spans:
            start = offset + more
            positions[:, start : start + length] = positions[:1, start : start + 1]
            left[start + length : start + whole] = False
            more += whole - length
        return positions[:, left], delta + more


class Qwen25VLInfo(QwenInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    pass


class Qwen25VLProcessor(Bounded, QwenProcessing, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor, info=Qwen25VLInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class VMTCQwen25VL(Seen, Moving, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.compress(vllm_config, Qwen, self.visual)
        self.width = self.main = self.language_model.config.hidden_size


class Qwen3VLInfo(QwenInfo, qwen3_vl.Qwen3VLProcessingInfo):
    pass


class Qwen3VLProcessor(Bounded, QwenProcessing, qwen3_vl.Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3VLInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class VMTCQwen3VL(Seen, Moving, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Features of earlier layers (DeepStack) are merged as the tokens are."""

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.compress(vllm_config, Qwen, self.visual)
        self.main = self.width = self.visual_dim
        if self.use_deepstack:
            self.width += self.multiscale_dim
