"""Prompts with as many placeholders as image tokens stay: vLLM's own processors, and then fewer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...config import VMTCConfig
from ._encoders import Images, grid_images, llava_images, llava_next_images
from ._settings import settings_of

# of a request's mm_processor_kwargs, and of what the model gets with each image
KEY = "vmtc"
# a request may choose these; the others are built into the running model
CHOICE = ("num_primary", "num_merged")

# what comes next in the order of bases is a class of vLLM
if TYPE_CHECKING:
    Base: Any = object
else:
    Base = object


def stock(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != KEY}


def encode(config: VMTCConfig) -> torch.Tensor:
    """f64 ``[4]``: of each count in `CHOICE` whether it is a share, and its value."""
    values = [getattr(config, name) for name in CHOICE]
    flat = [float(x) for value in values for x in (isinstance(value, float), value)]
    return torch.tensor(flat, dtype=torch.float64)


def decode(config: VMTCConfig, encoded: torch.Tensor) -> VMTCConfig:
    flat = encoded.flatten().tolist()
    pairs = zip(flat[::2], flat[1::2], strict=True)
    values: list[Any] = [value if share else int(value) for share, value in pairs]
    return dataclasses.replace(config, **dict(zip(CHOICE, values, strict=True)))


class Processing(Base):
    """Before a processor of vLLM in the order of a class's bases."""

    info: Any

    def config(self, kwargs: Mapping[str, Any]) -> VMTCConfig | None:
        """The settings of a request with these ``mm_processor_kwargs``."""
        config = settings_of(self.info.ctx.model_config).vmtc
        given = kwargs.get(KEY)
        if given is None:
            return config
        if config is None:
            raise ValueError(f"mm_processor_kwargs: {KEY} needs an engine that was started with it")
        if not isinstance(given, Mapping) or not set(given) <= set(CHOICE):
            raise ValueError(
                f"mm_processor_kwargs: {KEY} must be an object of {' and '.join(CHOICE)}, got"
                f" {given!r}"
            )
        return dataclasses.replace(config, **given)

    def images(self, items: Any, index: int, fields: Any) -> Images:
        """Of one image by itself: its size is in the items, or what it became in the fields."""
        raise NotImplementedError

    def count(self, processed: Any) -> int:
        """Images with pixels among what the processor gave."""
        return len(processed.get("pixel_values", ()))

    # what differs from vLLM's processors

    def _get_mm_hashes(self, inputs: Any) -> Any:
        if config := self.config(inputs.hf_processor_mm_kwargs):
            # in the hash even where a request names its images itself
            known = {**stock(inputs.hf_processor_mm_kwargs), KEY: dataclasses.asdict(config)}
            inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=known)
        return super()._get_mm_hashes(inputs)

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Any:
        given = inputs.hf_processor_mm_kwargs
        kwargs = super()._get_cache_missing_processor_kwargs(
            dataclasses.replace(inputs, hf_processor_mm_kwargs=stock(given)), mm_is_cached
        )
        return {**kwargs, KEY: given[KEY]} if KEY in given else kwargs

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        processed = super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=stock(hf_kwargs))
        if (config := self.config(hf_kwargs)) and (count := self.count(processed)):
            processed[KEY] = encode(config).expand(count, -1)
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Any:
        from vllm.multimodal.inputs import MultiModalFieldConfig

        fields = super()._get_mm_fields_config(hf_inputs, stock(hf_processor_mm_kwargs))
        return {**fields, KEY: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(
            mm_items, stock(hf_processor_mm_kwargs), out_mm_kwargs
        )
        if (config := self.config(hf_processor_mm_kwargs)) is None:
            return updates
        return [
            self._fewer(update, config, mm_items, out_mm_kwargs)
            if update.modality == "image"
            else update
            for update in updates
        ]

    def _fewer(self, update: Any, config: VMTCConfig, items: Any, fields: Any) -> Any:
        engine = settings_of(self.info.ctx.model_config).vmtc
        assert engine is not None
        whole = update.replacement

        def replacement(index: int) -> list[int]:
            tokens: list[int] = whole(index)
            if KEY not in fields["image"][index]:  # features of the user's own
                return tokens
            images = self.images(items, index, fields["image"][index])
            if len(tokens) != len(images.rows):
                raise RuntimeError(
                    f"vmtc: {len(images.rows)} tokens were expected of an image of which vLLM"
                    f" makes {len(tokens)}: this version of it is not supported"
                )
            (kept,) = images.shown([config])
            if config != engine and kept > (most := images.shown([engine])[0]):
                raise ValueError(
                    f"mm_processor_kwargs: {KEY} asks for {kept} tokens of an image, for which the"
                    f" engine was started with {most}: a request may only ask for fewer"
                )
            return tokens[:kept]

        return dataclasses.replace(update, replacement=replacement)


class LlavaProcessing(Processing):
    def images(self, items: Any, index: int, fields: Any) -> Images:
        return llava_images(self.info.get_hf_config(), 1)


class LlavaNextProcessing(Processing):
    def images(self, items: Any, index: int, fields: Any) -> Images:
        size = items["image"].get_image_size(index)
        return llava_next_images(self.info.get_hf_config(), [[size.height, size.width]])


class QwenProcessing(Processing):
    def images(self, items: Any, index: int, fields: Any) -> Images:
        grid = fields["image_grid_thw"].data
        patches = self.info.get_hf_config().vision_config.spatial_merge_size ** 2
        return grid_images([int(grid.prod()) // patches])

    def count(self, processed: Any) -> int:
        return len(processed["image_grid_thw"]) if "pixel_values" in processed else 0


class QwenInfo(Base):
    """Before a processing info of vLLM in the order of a class's bases."""

    ctx: Any

    def _merge_and_resolve_mm_processor_kwargs(self, mm_kwargs: Mapping[str, Any]) -> Any:
        return super()._merge_and_resolve_mm_processor_kwargs(stock(mm_kwargs))

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Any:
        most = super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        config = settings_of(self.ctx.model_config).vmtc
        if config is None:
            return most
        return {**most, "image": grid_images([most["image"]]).shown([config])[0]}
