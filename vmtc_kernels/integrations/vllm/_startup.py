"""What is refused before an engine starts, each by its name and with the reason."""

from __future__ import annotations

import os
from typing import Any

import vllm

from ...config import PLACEMENTS, VMTCConfig
from ._plugin import ARCHITECTURES, TESTED
from ._settings import Settings

ANY_VERSION = "VMTC_VLLM_ANY_VERSION"
TOWERS = ("clip_vision_model", "siglip_vision_model")  # of LLaVA


def check(vllm_config: Any, settings: Settings) -> None:
    """Raises ValueError or NotImplementedError."""
    model_config = vllm_config.model_config
    tested = vllm.__version__.startswith(tuple(f"{each}." for each in TESTED))
    if not tested and os.environ.get(ANY_VERSION) != "1":
        raise NotImplementedError(
            f"vmtc_kernels was tested with vLLM {', '.join(TESTED)}.*, this is {vllm.__version__}:"
            f" {ANY_VERSION}=1 in the environment tries it all the same"
        )
    if model_config.architecture not in ARCHITECTURES:
        raise ValueError(
            f"vmtc_kernels does not support {model_config.architecture} in vLLM, only"
            f" {', '.join(ARCHITECTURES)}"
        )
    hf_config = model_config.hf_config
    tower = hf_config.vision_config.model_type
    if not _is_qwen(hf_config) and tower not in TOWERS:
        raise ValueError(
            f"vmtc_kernels does not support a vision tower of type {tower!r} in vLLM, only"
            f" {' and '.join(TOWERS)}"
        )
    if settings.vmtc is not None:
        _check_vmtc(vllm_config, settings.vmtc)
    if settings.cmai is not None:
        from . import _focus

        _focus.check(vllm_config, settings.cmai)


def _is_qwen(hf_config: Any) -> bool:
    return bool(hf_config.model_type.startswith("qwen"))


def _check_vmtc(vllm_config: Any, config: VMTCConfig) -> None:
    hf_config = vllm_config.model_config.hf_config
    multimodal, parallel = vllm_config.model_config.multimodal_config, vllm_config.parallel_config
    qwen = _is_qwen(hf_config)
    vision = hf_config.vision_config
    _refuse(
        {
            "cudagraph_mm_encoder": vllm_config.compilation_config.cudagraph_mm_encoder,
            "compile_mm_encoder": vllm_config.compilation_config.compile_mm_encoder,
        },
        "runs the encoder without the hooks by which it is compressed",
    )
    _refuse(
        {
            "mm_encoder_tp_mode='data'": multimodal.mm_encoder_tp_mode == "data"
            and parallel.tensor_parallel_size > 1
        },
        "gives each rank other images, of which all must know the scores",
    )
    lora = vllm_config.lora_config
    _refuse(
        {"enable_tower_connector_lora": bool(lora and lora.enable_tower_connector_lora)},
        "replaces the encoder's projections",
    )
    drafts = vllm_config.speculative_config
    # not tried; and the engine configures a draft model as it does a model that was asked for
    _refuse(
        {"speculative_config": drafts is not None and drafts.method != "ngram"},
        "gives a draft model images that were compressed for another",
    )
    if qwen:
        graphs = vllm_config.compilation_config.cudagraph_mode
        flashinfer = "FLASHINFER" in str(multimodal.mm_encoder_attn_backend)
        _refuse({"mm_encoder_attn_backend='FLASHINFER'": flashinfer}, "hides the encoder's windows")
        _refuse(
            {"video_pruning_rate": bool(multimodal.video_pruning_rate)},
            "changes the positions of a prompt too",
        )
        _refuse(
            {
                "pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
                "speculative_config": drafts is not None,
                "cudagraph_mode='FULL'": getattr(graphs, "name", None) == "FULL",
            },
            "runs layers that do not see the positions of the tokens that stay",
        )
    _check_layers(hf_config, config, qwen)
    if not qwen:
        # the tokens of an image or tile; of Qwen's any number, which each request is asked for
        config.counts((vision.image_size // vision.patch_size) ** 2)


def _check_layers(hf_config: Any, config: VMTCConfig, qwen: bool) -> None:
    vision = hf_config.vision_config
    depth = vision.depth if qwen else vision.num_hidden_layers
    used = depth
    if not qwen:
        features = hf_config.vision_feature_layer
        if not isinstance(features, int):
            raise ValueError(
                "vmtc: features of several layers (vision_feature_layer) are not supported"
            )
        # hidden state i is the output of layer i - 1
        used = features % (depth + 1)
    cls = not qwen and vision.model_type == "clip_vision_model"
    if config.score_source == "cls" and not cls:
        raise ValueError(
            f"vmtc: score_source is 'cls', but the encoder of {hf_config.model_type} has no [CLS]:"
            " use 'received' or 'auto'"
        )
    # what stands for no layer
    others: dict[str, tuple[Any, ...]] = {
        "score_layer": (),
        "feature_layer": (None, "keys"),
        "placement": PLACEMENTS,
    }
    layers = {
        name: value for name in others if (value := getattr(config, name)) not in others[name]
    }
    for name, value in layers.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"vmtc: {name} must be the number of a layer, got {value!r}")
        if not -depth <= value < depth:
            raise ValueError(
                f"vmtc: {name} is {value}, the encoder has {depth} layers: -{depth} to {depth - 1}"
            )
        if value % depth >= used:
            raise ValueError(
                f"vmtc: {name} is layer {value % depth}, but vLLM loads {used} layers, counted"
                " from 0"
            )
    if "placement" not in layers:
        return
    placement = layers["placement"] % depth
    if hf_config.model_type != "llava":
        raise NotImplementedError(
            f"vmtc: {hf_config.model_type} cannot be shortened inside its encoder in vLLM: use"
            " placement 'before_projector' or 'after_projector'"
        )
    last = max(layers[name] % depth for name in layers if name != "placement")
    if not last <= placement < used - 1:
        raise ValueError(
            f"vmtc: placement is after layer {placement}, which must not come before layer {last},"
            " the last that scores or gives features, and must come before layer"
            f" {used - 1}, whose output the model takes"
        )


def _refuse(options: dict[str, bool], reason: str) -> None:
    for name, given in options.items():
        if given:
            raise NotImplementedError(f"vmtc: {name} {reason}: start the engine without it")
