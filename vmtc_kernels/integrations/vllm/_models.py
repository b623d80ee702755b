"""The models that the plugin puts in the place of those of vLLM: the same, with fewer tokens."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import llava, llava_next
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...config import VMTCConfig
from ._encoders import Clip, Encoder, Images, llava_images, llava_next_images
from ._focus import Bounded, Seen
from ._processing import KEY, Base, LlavaNextProcessing, LlavaProcessing, decode
from ._settings import settings_of
from ._vision import Run, Vision


class Compressing(Base):
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
            return super().embed_multimodal(**kwargs)
        configs: list[VMTCConfig] = [decode(self.vision.config, each) for each in encoded]
        with self.vision.encoding(self.images(kwargs), configs) as run:
            return self.finish(run, super().embed_multimodal(**kwargs))


class LlavaProcessor(Bounded, LlavaProcessing, llava.LlavaMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaProcessor, info=llava.LlavaProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class VMTCLlava(Seen, Compressing, llava.LlavaForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.compress(vllm_config, Clip, self.vision_tower)

    def images(self, kwargs: dict[str, Any]) -> Images:
        return llava_images(self.config, len(kwargs["pixel_values"]))


class LlavaNextProcessor(Bounded, LlavaNextProcessing, llava_next.LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor,
    info=llava_next.LlavaNextProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class VMTCLlavaNext(Seen, Compressing, llava_next.LlavaNextForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.compress(vllm_config, Clip, self.vision_tower)

    def images(self, kwargs: dict[str, Any]) -> Images:
        tiles = [len(image) for image in kwargs["pixel_values"]]
        return llava_next_images(self.config, kwargs["image_sizes"].tolist(), tiles)
