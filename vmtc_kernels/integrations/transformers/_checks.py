"""What a model's vision part refuses of `VMTCConfig`, and of the way it is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...config import VMTCConfig
from ._families import Family


def check_rerun(family: Family, config: VMTCConfig) -> None:
    """Where checkpointing is of a layer's ``__call__``, as in 5.17, hooks would merge again."""
    layer: Any = family.layers[0]
    kinds = [kind for kind in type(layer).__mro__ if kind.__name__ == "GradientCheckpointingLayer"]
    again = layer.training and getattr(layer, "gradient_checkpointing", False)
    if again and isinstance(config.placement, int) and any("__call__" in vars(k) for k in kinds):
        raise NotImplementedError(
            "gradient checkpointing of the vision encoder and VMTCConfig.placement inside it"
            " need a newer transformers: use placement='before_projector'"
        )


def check_gradients(kept: Mapping[str, Any], x: Tensor) -> None:
    """A layer that is checkpointed the old way runs without gradients at first."""
    weights = [p for name in kept for p in _parameters(kept["attention"], name)]
    known = any(isinstance(y, Tensor) and y.requires_grad for y in kept.values())
    if x.requires_grad and any(p.requires_grad for p in weights) and not known:
        raise RuntimeError(
            "gradients through the scores would be lost: use gradient checkpointing with"
            " use_reentrant=False, which is the default"
        )


def _parameters(attention: Any, name: str) -> list[Tensor]:
    projection = getattr(attention, name, None)
    return list(projection.parameters()) if isinstance(projection, torch.nn.Module) else []


def layer_of(name: str, index: int, depth: int) -> int:
    if not -depth <= index < depth:
        raise ValueError(
            f"attach: VMTCConfig.{name} is {index}, the encoder has {depth} layers: -{depth} to"
            f" {depth - 1}"
        )
    return index % depth


def scores_by_cls(family: Family, config: VMTCConfig) -> bool:
    if config.score_source == "cls" and not family.has_cls:
        raise ValueError(
            f"attach: VMTCConfig.score_source is 'cls', but the encoder of {family.model_type} has"
            " no [CLS]: use 'received' or 'auto'"
        )
    return family.has_cls and config.score_source != "received"


def check_placement(family: Family, layer: int, last: int) -> None:
    if layer < last:
        raise ValueError(
            f"attach: VMTCConfig.placement is after layer {layer}, but scores or features are those"
            f" of layer {last}: set score_layer and feature_layer to at most {layer}"
        )
    if layer >= family.last_layer:
        raise ValueError(
            f"attach: VMTCConfig.placement is after layer {layer}, but {family.model_type} takes"
            f" features from the output of layer {family.last_layer}: use 'before_projector' or a"
            " layer before that"
        )
    if not family.shortens:
        raise ValueError(
            f"attach: {family.model_type} cuts its tiles after the encoder, which must therefore"
            " see all tokens: use VMTCConfig.placement 'before_projector' or 'after_projector'"
        )
