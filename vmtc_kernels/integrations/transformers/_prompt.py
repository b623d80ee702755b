"""Prompts with as many placeholders as tokens that compression leaves."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._layout import Reduction
from ._families import Family


class Padding(NamedTuple):
    """How rows are filled up: ``values`` by input, 0 unless named; ``side``, if it is known; to at
    least ``length`` tokens and a multiple of ``multiple``."""

    values: Mapping[str, int]
    side: str | None = None
    length: int = 0
    multiple: int = 1


def shrink(
    inputs: MutableMapping[str, Any],
    family: Family,
    config: Reduction | None,
    padding: Padding,
    usual_side: str,
) -> None:
    """Take placeholders out of a processor's output, in place; rows are padded anew, on the side
    where they were, or on the usual one if they had no padding."""
    ids = inputs["input_ids"]
    stays = torch.ones(ids.shape, dtype=torch.bool)
    for modality, token in family.tokens.items():
        found = ids.cpu() == token
        stays[found] = _shown(inputs, modality, family, config, int(found.sum()))
    if stays.all():
        return
    side = padding.side
    if (mask := inputs.get("attention_mask")) is not None:
        real = mask.cpu().bool()
        if side is None and not real.all():
            side = "right" if real[:, 0].all() else "left"
        stays &= real
    per_token = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == ids.shape
    }
    per_token.setdefault("attention_mask", torch.ones_like(ids))
    length = max(int(stays.sum(1).max()), padding.length)
    length += -length % padding.multiple
    for name, value in per_token.items():
        rows = [row[keep] for row, keep in zip(value, stays.to(value.device), strict=True)]
        fill = padding.values.get(name, 0)
        inputs[name] = torch.stack([_fill(row, length, side or usual_side, fill) for row in rows])


def _fill(row: Tensor, length: int, side: str, value: int) -> Tensor:
    more = length - len(row)
    return pad(row, (more, 0) if side == "left" else (0, more), value=value)


def _shown(
    inputs: Mapping[str, Any],
    modality: str,
    family: Family,
    config: Reduction | None,
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
