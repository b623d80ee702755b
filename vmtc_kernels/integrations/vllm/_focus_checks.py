"""What CMAI in vLLM needs of an engine's configuration, looked at before the engine starts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from ...config import CMAIConfig
from ._settings import settings_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKEND = __package__ + "._focus.FocusBackend"


def check(vllm_config: VllmConfig, config: CMAIConfig) -> None:
    """Raises NotImplementedError, and ValueError for settings that contradict each other, with the
    reason."""
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    drafts = vllm_config.speculative_config
    layers = model.hf_text_config.num_hidden_layers
    config.applies(0, layers)  # raises for layers that there are not
    _check_backend(vllm_config)
    dtype = vllm_config.cache_config.cache_dtype
    if dtype != "auto" and getattr(torch, dtype, None) != model.dtype:
        _refuse(f"a cache of {dtype}", f"keys and values are read in {model.dtype}, as computed")
    if model.get_head_size() > 256 and not current_platform.is_cpu():
        _refuse(
            f"heads of {model.get_head_size()} features",
            "its kernels for GPUs take up to 256; `vmtc_kernels.explain` says so of any call",
        )
    if config.prefill != config.decode:
        _refuse(
            "inhibition in prefill or decode alone",
            "tokens that were generated in one step are part of a prompt in another, after"
            " preemption and in a prefix that is shared, and would have been computed otherwise",
        )
    if config.head_mode == "mean" and parallel.tensor_parallel_size > 1:
        _refuse(
            'head_mode="mean" with tensor parallelism',
            "scores are the mean over all heads, which are on several devices, inside of one"
            ' operator; head_mode="per_head" needs no other device\'s',
        )
    # modality comes with the embedding of a step's tokens
    here = "the engine tells the modality of tokens to the first of them alone"
    for what, asked, why in (
        ("pipeline parallelism", parallel.pipeline_parallel_size > 1, here),
        (
            "decode context parallelism",
            parallel.decode_context_parallel_size > 1,
            "each token's scores need the keys of all tokens before it, which are on several"
            " devices",
        ),
        (
            "prefill context parallelism",
            parallel.prefill_context_parallel_size > 1,
            "each token's scores need the keys of all tokens before it, which are on several"
            " devices",
        ),
        (
            "micro-batches (DBO)",
            parallel.use_ubatching,
            "the engine tells the modality of a step's tokens as a whole, not of its parts",
        ),
        (
            "speculative decoding other than ngram",
            drafts is not None and drafts.method != "ngram",
            "a draft model's layers would get the same backend, and no modality of their tokens",
        ),
        (
            "a KV connector",
            vllm_config.kv_transfer_config is not None,
            "its state lies in pages beside keys and values, and that connectors move pages as"
            " they are has not been tried",
        ),
        (
            "prompt embeddings",
            model.enable_prompt_embeds,
            "nobody says which of them stand for an image",
        ),
        (
            "bidirectional attention between image tokens",
            model.is_mm_prefix_lm,
            "it knows causal attention alone",
        ),
        ("latent attention (MLA)", model.use_mla, "its scores need the keys of each head"),
        (
            "a model that is not generative",
            model.runner_type != "generate",
            "it has been tried with text that is generated alone",
        ),
    ):
        if asked:
            _refuse(what, why)


def most_image_tokens(model_config: Any, processor: Any) -> int:
    """How many image tokens a prompt can have, by the engine's limits: a page has room for them."""
    from vllm.multimodal.encoder_budget import get_mm_max_toks_per_item

    longest: int = model_config.max_model_len
    if model_config.multimodal_config.enable_mm_embeds:
        return longest  # features of the user's own, as many as they like
    limits = {kind: limit for kind, limit in processor.info.allowed_mm_limits.items() if limit}
    if not limits:
        raise ValueError("cmai: this engine takes no images (limit_mm_per_prompt): run it without")
    each = get_mm_max_toks_per_item(processor, mm_counts=dict.fromkeys(limits, 1), cache=None)
    return min(longest, sum(limit * each[kind] for kind, limit in limits.items()))


class Bounded:
    """Mixin, before a processor of vLLM: refuses prompts with more image tokens than were expected.

    Limits of size can be lifted by a request's ``mm_processor_kwargs``, those of count cannot.
    """

    info: Any
    most: int | None = None

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        prompt = super().apply(*args, **kwargs)  # type: ignore[misc]
        model_config = self.info.ctx.model_config
        if settings_of(model_config).cmai is None:
            return prompt
        if self.most is None:
            self.most = sys.maxsize  # for the prompt that is made up to find out
            self.most = most_image_tokens(model_config, self)
        placeholders = prompt["mm_placeholders"].values()
        count = sum(each.get_num_embeds() for one in placeholders for each in one)
        if count > self.most:
            raise ValueError(
                f"the prompt has {count} image tokens, and CMAI has room for {self.most}, as many"
                " as the engine's limits promise: raise limit_mm_per_prompt or the sizes in the"
                " engine's mm_processor_kwargs"
            )
        return prompt


def _check_backend(vllm_config: VllmConfig) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        _refuse(f"the platform {current_platform.device_name}", "it has been tried on no other")
    asked = vllm_config.attention_config
    custom, own = AttentionBackendEnum.CUSTOM, [AttentionBackendEnum.CUSTOM]
    if current_platform.is_cpu():
        own.append(AttentionBackendEnum.CPU_ATTN)  # all that there is
    other = [*asked.backend_per_kind.values(), asked.backend or custom]
    if names := [each.name for each in other if each not in own]:
        _refuse(f"--attention-backend {', '.join(names)}", "it is one itself; leave the option out")
    if custom.is_overridden() and custom.get_path() != BACKEND:
        _refuse(f"{custom.get_path()} as the attention backend CUSTOM", "its own has that name")


def _refuse(what: str, why: str) -> None:
    raise NotImplementedError(f"cmai cannot be used with {what}: {why}")
