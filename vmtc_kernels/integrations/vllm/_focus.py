"""CMAI as an attention backend of vLLM: keys, values and the method's state in the same pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from ...config import CMAIConfig
from ._focus_checks import BACKEND, Bounded, check, most_image_tokens
from ._focus_state import IMAGE, TEXT, Batch, Place, Step, Tokens, attend, begin
from ._settings import settings_of

__all__ = ["Bounded", "FocusBackend", "Seen", "check", "select_backend"]


class FocusBackend(AttentionBackend):
    """Attention that inhibits. Each layer of a model gets a subclass of its own `Place`."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    place: ClassVar[Place | None] = None

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FocusImpl]:
        return FocusImpl

    @staticmethod
    def get_builder_cls() -> type[FocusBuilder]:
        return FocusBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return current_platform.is_cpu() or head_size <= 256

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """A page has one row for each token, of all its heads and its state."""
        if spec.state_content_bytes is not None:
            return spec
        if cls.place is None:
            raise RuntimeError("CMAI's attention backend serves models of this plugin alone")
        numbers = spec.num_kv_heads * (spec.head_size + spec.head_size_v)
        content = cls.place.size(numbers, spec.dtype.itemsize)
        return replace(spec, num_head_slots=1, state_content_bytes=content)


@dataclass
class FocusMetadata:
    """What the layers of a step share; ``step`` is made by the first of them."""

    batch: Batch
    step: Step | None = None


class FocusBuilder(AttentionMetadataBuilder[FocusMetadata]):
    # groups are made anew in each step, which no graph of the whole model can replay
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FocusMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("CMAI knows causal attention alone")
        return FocusMetadata(
            Batch(
                common.query_start_loc_cpu[: common.num_reqs + 1].tolist(),
                common.slot_mapping,
                common.seq_lens[: common.num_reqs],
                common.block_table_tensor[: common.num_reqs],
                common.max_seq_len,
            )
        )


class FocusImpl(AttentionImpl[FocusMetadata]):
    """Attention of one layer; `Seen` connects it to the model's tokens once it has been built."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        without = {
            "ALiBi slopes": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "softcapping of logits": bool(logits_soft_cap),
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "keys and values shared between layers": kv_sharing_target_layer_name is not None,
            **{name: value is not None for name, value in others.items()},
        }
        if has := [name for name, there in without.items() if there]:
            raise NotImplementedError(
                f"CMAI's attention has no {', '.join(has)}, which a layer of this model has: run it"
                " without cmai"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.tokens: Tokens | None = None

    def connect(self, tokens: Tokens, config: CMAIConfig, place: Place, longest: int) -> None:
        """longest: tokens that a request may have."""
        self.tokens, self.config, self.place, self.longest = tokens, config, place, longest

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FocusMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output: ``[T, H, d]``; key, value: ``[T, G, d]``; T may be padded."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("CMAI's attention has no quantized output")
        if attn_metadata is None:  # the engine measures memory, where it has no cache for the rest
            if not output.is_cpu:
                output.new_empty(self.place.gathered(self.longest), dtype=torch.float32)
            return output.zero_()
        assert self.tokens is not None
        views = self.place.views(kv_cache, self.num_kv_heads, self.head_size)
        if attn_metadata.step is None:
            batch = attn_metadata.batch
            new = self.tokens.take(self.place.matrices > 0)
            if new is None and bool((batch.slots[: batch.starts[-1]] < 0).all()):
                return output.zero_()  # a run without requests, to keep step with other engines
            if new is None or len(new) != batch.starts[-1]:
                raise RuntimeError(
                    "CMAI was not told by the model which tokens are images: it got"
                    f" {0 if new is None else len(new)} of {batch.starts[-1]}"
                )
            attn_metadata.step = begin(batch, views, self.place, new)
        attend(attn_metadata.step, views, self.config, self.scale, query, key, value, output)
        return output


class Seen:
    """Mixin, before a multimodal model of vLLM: its language model's attention is told the modality
    of each token.

    `embed_input_ids` is the one method that the engine calls with it, before every pass.
    """

    tokens: Tokens | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = settings_of(vllm_config.model_config).cmai
        if config is None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
            return
        with _in_place():
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.tokens = Tokens()
        model = self.get_language_model()  # type: ignore[attr-defined]
        layers = [each for each in model.modules() if isinstance(each, Attention)]
        model_config = vllm_config.model_config
        processor = MULTIMODAL_REGISTRY.create_processor(model_config)
        num_image = most_image_tokens(model_config, processor)
        for index, layer in enumerate(layers):
            if not isinstance(layer.impl, FocusImpl):
                raise RuntimeError(f"layer {layer.layer_name} has not got CMAI's attention")
            matrices = 1 if config.head_mode == "mean" else layer.num_heads
            place = Place(matrices if config.applies(index, len(layers)) else 0, num_image)
            # a class as the engine asks the class, not the layer, what a page holds
            layer.attn_backend = type("FocusBackend", (FocusBackend,), {"place": place})
            layer.impl.connect(self.tokens, config, place, model_config.max_model_len)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        if self.tokens is not None:
            modality = torch.full((len(input_ids),), TEXT, dtype=torch.uint8)
            if is_multimodal is not None:
                modality.masked_fill_(is_multimodal.cpu(), IMAGE)
            self.tokens.put(modality)
        embeddings: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embeddings


def select_backend(vllm_config: VllmConfig) -> None:
    """Have an engine that is being configured use the backend, in all its processes."""
    _register(AttentionBackendEnum.CUSTOM)
    vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM


def _register(member: AttentionBackendEnum) -> None:
    register_backend(member, BACKEND)


@contextmanager
def _in_place() -> Iterator[None]:
    """The backend where the engine looks for it while a model's layers are made.

    The CPU platform answers CPU_ATTN whatever is selected: it is replaced for as long, and other
    models of this process have what they had. The engine remembers its answers by selection, which
    is CUSTOM for no other model.
    """
    _register(AttentionBackendEnum.CUSTOM)
    if not current_platform.is_cpu():
        yield
        return
    _register(AttentionBackendEnum.CPU_ATTN)
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
