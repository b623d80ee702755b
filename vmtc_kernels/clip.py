"""A CLIP vision tower as the source of tokens and importance; needs the extra ``transformers``."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checkpoints
from .config import VMTCConfig
from .patches import InputError, Tokens

_CLIP_TYPES = ("clip", "clip_vision_model")


class ClipTower:
    """A CLIP vision tower for one photograph at a time.

    model: of transformers; name: for the user; layers: those whose outputs are the tokens, one
        beside the other, by default the layer that scores.

    ``size`` and ``patch`` are the sides in pixels of the square photograph and of its patches.
    """

    def __init__(self, model: Any, name: str, layers: list[int] | None = None) -> None:
        self.model, self.name, self.layers = model, name, layers
        vision = model.config
        self.size, self.patch = vision.image_size, vision.patch_size
        if self.size % self.patch:
            raise InputError(
                f"{name}: patches of {self.patch} pixels do not fill an image of {self.size}"
            )

    @classmethod
    def load(cls, source: str) -> ClipTower:
        """source: a folder or a model id, as `from_pretrained` of transformers takes it (which
        looks into its cache and, unless ``HF_HUB_OFFLINE`` is set, on the hub)."""
        model = _load(source)
        return cls(model, checkpoints.name_of(source, model))

    @classmethod
    def of(cls, model: Any, name: str) -> ClipTower:
        """The tower of a LLaVA model, and the tokens that this one reads."""
        vision, used = model.model.vision_tower, model.config.vision_feature_layer
        kind = vision.config.model_type
        if kind not in _CLIP_TYPES:
            raise InputError(f"the vision tower of {name} must be a CLIP model, it is {kind!r}")
        states = [used] if isinstance(used, int) else list(used)
        # hidden state i is the output of layer i - 1
        return cls(vision, name, [i - 1 if i > 0 else i for i in states])

    def tokens(self, photo: np.ndarray, config: VMTCConfig) -> Tokens:
        """Tokens and [CLS] attention of encoder layer ``config.score_layer``, without [CLS].

        Features are what that layer puts out, or the tokens that a LLaVA model reads, unless
        ``config.feature_layer`` says otherwise; importance is its own attention. For layer -2
        these are the features that LLaVA reads, ``hidden_states[-2]``: that tuple starts with the
        embeddings, so its entry -2 is the output of the second last layer. The queries and keys
        come from hooks, so the encoder keeps its fast attention kernel.
        """
        encoder = self.model.encoder.layers
        attention = encoder[self._layer(config.score_layer)].self_attn
        layers = self.layers or [config.score_layer]
        if isinstance(config.feature_layer, int):
            layers = [config.feature_layer]
        layers = [self._layer(index) for index in layers]
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
                seen[name] = output

            return hook

        modules = {"q": attention.q_proj, "k": attention.k_proj}
        modules |= {str(index): encoder[index] for index in layers}
        hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
        received = config.score_source == "received"
        try:
            with torch.inference_mode():
                self.model(_normalised(photo).to(self.model.device, self.model.dtype))
                q, k = (
                    seen[name].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                    for name in ("q", "k")
                )  # [1, H, 1 + N, d]
                scores = config.importance(q, k, cls_index=None if received else 0)
        finally:
            for hook in hooks:
                hook.remove()
        features = torch.cat([seen[str(index)] for index in layers], dim=-1)
        if config.feature_layer == "keys":
            features = seen["k"]
        features, scores = (each[:, 1:].float().cpu() for each in (features, scores))
        how = "attention received" if received else "attention of [CLS]"
        return Tokens(features, scores, f"layer {config.score_layer} of {self.name}, {how}")

    def _layer(self, index: int) -> int:
        depth = len(self.model.encoder.layers)
        if not -depth <= index < depth:
            raise InputError(f"{self.name} has {depth} encoder layers, none is layer {index}")
        return index % depth


def _load(source: str) -> Any:
    transformers = checkpoints.transformers_package()
    try:
        kind = transformers.AutoConfig.from_pretrained(source).model_type
        if kind in _CLIP_TYPES:
            model, info = transformers.CLIPVisionModel.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {source}: {str(error).splitlines()[0]}") from error
    if kind not in _CLIP_TYPES:
        raise InputError(
            f"--model must be a CLIP model or a LLaVA model, {source} is of type {kind!r}"
        )
    if info["missing_keys"]:
        raise InputError(f"{source} lacks weights of the vision tower: {min(info['missing_keys'])}")
    return model.eval()


def _normalised(photo: np.ndarray) -> Tensor:
    """Pixels as CLIP takes them: f32 ``[1, 3, S, S]``."""
    constants: Any = importlib.import_module("transformers.image_utils")
    mean, std = map(torch.tensor, (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD))
    return ((torch.tensor(photo) / 255 - mean) / std).permute(2, 0, 1)[None]
