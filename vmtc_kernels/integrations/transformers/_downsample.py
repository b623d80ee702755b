"""Spatial downsampling in the vision part of a model, to compare with what VMTC chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ...spatial_downsample import spatial_downsample
from .._merging import Merged
from ._families import Family
from ._vision import Run, Vision


@dataclass(frozen=True)
class Downsampling:
    """Stands where `VMTCConfig` does: a unit is a square grid of which each ``factor x factor``
    cell becomes one token. They are averaged where VMTC merges unless it is told otherwise."""

    factor: int
    placement: str = "before_projector"

    def counts(self, num_tokens: int, *, clip: bool = False) -> tuple[int, int]:
        side = math.isqrt(num_tokens)
        return (-(-side // self.factor)) ** 2, 0


class Downsampled(Vision):
    """Average pooling of a model's images, from `attach` until `detach`."""

    def __init__(self, family: Family, config: Downsampling, encoded: Any) -> None:
        if not family.square_units:
            raise ValueError(
                f"attach: downsample needs images that are square grids of tokens, which those of"
                f" {family.model_type} need not be: use vmtc, or another model"
            )
        assert family.unit_tokens is not None
        _checks.count("attach", "downsample", config.factor, 2)
        side = math.isqrt(family.unit_tokens)
        if config.factor > side:
            raise ValueError(
                f"attach: downsample must be 2 to {side} for grids of {side} x {side} tokens, got"
                f" {config.factor}"
            )
        super().__init__(family, config, encoded)

    def _watch_encoder(self) -> None:
        """There are no scores: the encoder runs as it is, and may be compiled by itself."""

    def _merge(self, run: Run, x: Tensor) -> Tensor:
        run.layout = layout = run.layout.to(x.device)
        tokens, rows = [x[layout.fixed]], [layout.fixed]
        for group in layout.groups:
            side = math.isqrt(group.shape[1])
            tokens.append(
                spatial_downsample(x[group], (side, side), self.config.factor).flatten(0, 1)
            )
            cell = torch.arange(side, device=x.device) // self.config.factor
            owner = (cell[:, None] * (int(cell[-1]) + 1) + cell).flatten().expand_as(group)
            sizes = torch.zeros_like(group).scatter_add(1, owner, torch.ones_like(group))
            cells = sum(self.config.counts(group.shape[1]))
            # a cell takes the place of its first token
            index = torch.arange(group.shape[1], device=x.device).expand_as(group)
            place = torch.full_like(group, group.shape[1])
            place = place.scatter_reduce(1, owner, index, "amin")[:, :cells]
            scores = torch.ones_like(group, dtype=torch.float32)
            run.merged.append(Merged(group, owner, scores, place, sizes[:, :cells]))
            rows.append(group.gather(1, place).flatten())
        run.rows, order = torch.cat(rows).sort()
        return torch.cat(tokens)[order]
