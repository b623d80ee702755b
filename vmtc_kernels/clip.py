"""A CLIP vision tower as the source of tokens and importance; needs the extra ``transformers``."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoints import transformers_package
from .config import VMTCConfig
from .patches import InputError, Tokens

_CLIP_TYPES = ("clip", "clip_vision_model")


class ClipTower:
    """A CLIP vision tower for one photograph at a time.

    source: a folder or a model id, as `from_pretrained` of transformers takes it (which looks into
        its cache and, unless ``HF_HUB_OFFLINE`` is set, on the hub).

    ``size`` and ``patch`` are the sides in pixels of the square photograph and of its patches.
    """

    def __init__(self, source: str) -> None:
        self.model = _load(source)
        self.name = source.rstrip("/").rsplit("/", 1)[-1]
        vision = self.model.config
        self.size, self.patch = vision.image_size, vision.patch_size
        if self.size % self.patch:
            raise InputError(
                f"{source}: patches of {self.patch} pixels do not fill an image of {self.size}"
            )

    def tokens(self, photo: np.ndarray, config: VMTCConfig) -> Tokens:
        """Tokens and [CLS] attention of encoder layer ``config.score_layer``, without [CLS].

        Features are what that layer puts out, importance is its own attention. For layer -2 these
        are the features that LLaVA reads, ``hidden_states[-2]``: that tuple starts with the
        embeddings, so its entry -2 is the output of the second last layer. The queries and keys
        come from hooks, so the encoder keeps its fast attention kernel.
        """
        layer = self._layer(config.score_layer)
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
                seen[name] = output

            return hook

        attention = layer.self_attn
        modules = {"q": attention.q_proj, "k": attention.k_proj, "hidden": layer}
        hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
        try:
            with torch.inference_mode():
                self.model(pixel_values=_normalised(photo))
                q, k = (
                    seen[name].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                    for name in ("q", "k")
                )  # [1, H, 1 + N, d]
                scores = config.importance(q, k)[:, 1:]
        finally:
            for hook in hooks:
                hook.remove()
        source = f"layer {config.score_layer} of {self.name}, attention of [CLS]"
        return Tokens(seen["hidden"][:, 1:], scores, source)

    def _layer(self, index: int) -> Any:
        layers = self.model.encoder.layers
        if not -len(layers) <= index < len(layers):
            raise InputError(f"{self.name} has {len(layers)} encoder layers, none is layer {index}")
        return layers[index]


def _load(source: str) -> Any:
    transformers = transformers_package()
    try:
        kind = transformers.AutoConfig.from_pretrained(source).model_type
        if kind in _CLIP_TYPES:
            model, info = transformers.CLIPVisionModel.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {source}: {str(error).splitlines()[0]}") from error
    if kind not in _CLIP_TYPES:
        raise InputError(f"--model must be a CLIP model, {source} is of type {kind!r}")
    if info["missing_keys"]:
        raise InputError(f"{source} lacks weights of the vision tower: {min(info['missing_keys'])}")
    return model.eval()


def _normalised(photo: np.ndarray) -> Tensor:
    """Pixels as CLIP takes them: f32 ``[1, 3, S, S]``."""
    constants: Any = importlib.import_module("transformers.image_utils")
    mean, std = map(torch.tensor, (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD))
    return ((torch.tensor(photo) / 255 - mean) / std).permute(2, 0, 1)[None]
