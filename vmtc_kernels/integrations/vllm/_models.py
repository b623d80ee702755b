"""The models that the plugin puts in the place of those of vLLM: the same, with fewer tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava, llava_next, qwen2_5_vl
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...config import VMTCConfig
from ._encoders import Clip, Encoder, Images, Qwen, llava_images, llava_next_images
from ._processing import KEY, LlavaNextProcessing, LlavaProcessing, QwenInfo, QwenProcessing, decode
from ._settings import settings_of
from ._vision import Run, Vision


class Compressing:
    """Before a model of vLLM in the order of a class's bases."""

    vision: Vision | None = None

    def compress(self, vllm_config: Any, encoder: type[Encoder], tower: Any) -> None:
        """Called where the model is made."""
        config = settings_of(vllm_config.model_config).vmtc
        # with --limit-mm-per-prompt image=0 there is no encoder
        if config is not None and not isinstance(tower, StageMissingLayer):
            self.vision = Vision(encoder(self), config)

    def images(self, kwargs: dict[str, Any]) -> Images:
        raise NotImplementedError

    def finish(self, run: Run, whole: Any) -> Any:
        """The embeddings of each image that the engine gets, of those of all its rows."""
        return tuple(image[stays] for image, stays in zip(whole, run.shown(), strict=True))

    def embed_multimodal(self, **kwargs: Any) -> Any:
        encoded = kwargs.pop(KEY, None)
        if self.vision is None or encoded is None:  # features of the user's own
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        configs: list[VMTCConfig] = [decode(self.vision.config, each) for each in encoded]
        with self.vision.encoding(self.images(kwargs), configs) as run:
            return self.finish(run, super().embed_multimodal(**kwargs))  # type: ignore[misc]


def llava_info(ctx: Any) -> Any:
    return llava.LlavaProcessingInfo(ctx)


class LlavaProcessor(LlavaProcessing, llava.LlavaMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaProcessor, info=llava_info, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class VMTCLlava(Compressing, llava.LlavaForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.compress(vllm_config, Clip, self.vision_tower)

    def images(self, kwargs: dict[str, Any]) -> Images:
        return llava_images(self.config, len(kwargs["pixel_values"]))


class LlavaNextProcessor(LlavaNextProcessing, llava_next.LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor,
    info=llava_next.LlavaNextProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class VMTCLlavaNext(Compressing, llava_next.LlavaNextForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.compress(vllm_config, Clip, self.vision_tower)

    def images(self, kwargs: dict[str, Any]) -> Images:
        tiles = [len(image) for image in kwargs["pixel_values"]]
        return llava_next_images(self.config, kwargs["image_sizes"].tolist(), tiles)


class Qwen25VLInfo(QwenInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    pass


class Qwen25VLProcessor(QwenProcessing, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor, info=Qwen25VLInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class VMTCQwen25VL(Compressing, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Its images have places in a grid, which go beside their embeddings in columns of their own
    until the positions of a step are known."""

    # of the step: which of its tokens are of images, and how far from where these begin, [2, M]
    moves: tuple[Tensor, Tensor] | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.compress(vllm_config, Qwen, self.visual)

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
        shown = run.shown() if run else [torch.ones(len(image)) for image in whole]
        widths = [w // self.visual.spatial_merge_size for _, _, w in image_input["image_grid_thw"]]
        parts = []
        for image, stays, width in zip(whole, shown, widths, strict=True):
            left = stays.nonzero()[:, 0].to(image.device)
            parts.append(torch.cat([image[left], beside(left, int(width), image)], dim=1))
        return tuple(parts)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> Tensor:
        self.moves = None
        if self.vision is not None and multimodal_embeddings:
            width = self.language_model.config.hidden_size
            at = is_multimodal.nonzero()[:, 0].split([len(x) for x in multimodal_embeddings])
            # those of videos are not compressed and have no columns
            moved = [i for i, x in enumerate(multimodal_embeddings) if x.shape[1] > width]
            if moved:
                offsets = [offsets_of(multimodal_embeddings[i][:, width:]) for i in moved]
                self.moves = torch.cat([at[i] for i in moved]), torch.cat(offsets, dim=1)
            multimodal_embeddings = [x[:, :width] for x in multimodal_embeddings]
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.moves is not None:
            at, offsets = (x.to(positions.device) for x in self.moves)
            self.moves = None
            # in place, as graphs read them where they are; the engine writes them at each step
            positions[1:, at] = positions[:1, at] + offsets
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Any
    ) -> tuple[Tensor, int]:
        """As if all tokens were there, but an image's are where it begins until it is encoded."""
        if self.vision is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore
        parts, begin, place = [], 0, 0
        features = {feature.mm_position.offset: feature for feature in mm_features}
        for offset, frames, rows, columns, pace in self.iter_mm_grid_thw(mm_features):
            length = features[offset].mm_position.length
            parts.append(torch.arange(place, place + offset - begin).expand(3, -1))
            place += offset - begin
            axes = [torch.arange(n) for n in (frames, rows, columns)]
            axes[0] = (axes[0] * pace).long()
            if features[offset].modality == "image":
                parts.append(torch.full((3, length), place))
            else:
                parts.append(torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + place)
            place += 1 + max(int(axis[-1]) for axis in axes)
            begin = offset + length
        parts.append(torch.arange(place, place + len(input_tokens) - begin).expand(3, -1))
        return torch.cat(parts, dim=1), place - begin


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
