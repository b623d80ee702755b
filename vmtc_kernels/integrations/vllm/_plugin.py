"""The entry point: models of ours under names of their own, and a look at each configuration."""

from __future__ import annotations

import functools
from typing import Any

from ._settings import ATTRIBUTE, asked, parse

# architectures that vLLM knows, and the classes of ours that take their place where that is asked
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "_models:VMTCLlava",
    "LlavaNextForConditionalGeneration": "_models:VMTCLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "_qwen:VMTCQwen25VL",
    "Qwen3VLForConditionalGeneration": "_qwen:VMTCQwen3VL",
}
TESTED = ("0.32",)


def register() -> None:
    """Called by vLLM in each of its processes, any number of times.

    Nothing is imported, registered for use or printed until an engine is configured with the
    settings. There is no interface by which a plugin sees an engine's configuration, so the method
    by which it completes itself is wrapped.
    """
    from vllm import ModelRegistry
    from vllm.config import VllmConfig

    for path in ARCHITECTURES.values():
        ModelRegistry.register_model(path.split(":")[1], f"{__package__}.{path}")
    complete = VllmConfig.try_verify_and_update_config
    if hasattr(complete, "__wrapped__"):
        return

    @functools.wraps(complete)
    def completed(self: Any) -> None:
        complete(self)
        configure(self)

    VllmConfig.try_verify_and_update_config = completed


def configure(vllm_config: Any) -> None:
    """Put the settings, if there are any, into the configuration of an engine.

    Raises ValueError and NotImplementedError for what cannot be done, before the engine starts.
    """
    model_config = vllm_config.model_config
    given = asked(vllm_config.additional_config)
    if not given or model_config is None or hasattr(model_config.hf_config, ATTRIBUTE):
        return
    settings = parse(given)
    from ._startup import check

    check(vllm_config, settings)
    if settings.cmai is not None:
        from ._focus import select_backend

        select_backend(vllm_config)
    setattr(model_config.hf_config, ATTRIBUTE, given)
    # what the engine loads by; its own idea of what the model can do stays as it is
    model_config.hf_config.architectures = [ARCHITECTURES[model_config.architecture].split(":")[1]]
