"""Prompts with as many placeholders as tokens that compression leaves."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ...config import VMTCConfig
from ._families import Family


def shrink(
    inputs: MutableMapping[str, Any],
    family: Family,
    config: VMTCConfig | None,
    padding: Mapping[str, int],
    left: bool,
) -> None:
    """Take placeholders out of a processor's output, in place; rows are padded anew.

    padding: what fills each input up, 0 unless named; left: on which side.
    """
    ids = inputs["input_ids"]
    stays = torch.ones(ids.shape, dtype=torch.bool)
    for modality, token in family.tokens.items():
        found = ids.cpu() == token
        stays[found] = _shown(inputs, modality, family, config, int(found.sum()))
    if stays.all():
        return
    real = inputs.get("attention_mask")
    if real is not None:
        stays &= real.cpu().bool()
    per_token = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == ids.shape
    }
    per_token.setdefault("attention_mask", torch.ones_like(ids))
    for name, value in per_token.items():
        rows = [row[keep] for row, keep in zip(value, stays.to(value.device), strict=True)]
        inputs[name] = torch.nn.utils.rnn.pad_sequence(
            rows,
            batch_first=True,
            padding_value=padding.get(name, 0),
            padding_side="left" if left else "right",
        )


def _shown(
    inputs: Mapping[str, Any],
    modality: str,
    family: Family,
    config: VMTCConfig | None,
    placeholders: int,
) -> Tensor:
    """bool ``[R]``: the placeholders of one modality that stay."""
    key = {"image": "pixel_values", "video": "pixel_values_videos"}[modality]
    given = inputs.get(key) is not None
    if not given:
        if placeholders:
            raise ValueError(
                f"prepare: the text has {placeholders} {modality} placeholders, but no {modality}"
                f" was given: pass {modality}s="
            )
        return torch.ones(0, dtype=torch.bool)
    layout = family.layout(modality, inputs)
    if len(layout.rows) != placeholders:
        raise ValueError(
            f"prepare: the {modality}s need {len(layout.rows)} placeholders"
            f" ({', '.join(map(str, layout.splits))}), the text has {placeholders}: write one"
            f" placeholder for each {modality}, and use the processor that belongs to the model"
        )
    if config is None:
        return torch.ones(placeholders, dtype=torch.bool)
    try:
        return layout.placeholders(config)
    except ValueError as error:
        raise ValueError(
            f"prepare: {error}; shares, num_primary=0.25 for example, fit images of every size"
        ) from None
