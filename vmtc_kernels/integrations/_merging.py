"""The tokens of some images merged as their layout says."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import VMTCConfig
from ._layout import Layout


class Merged(NamedTuple):
    """Units of the same size: rows i64 [units, tokens] of the projector; owner, the slot of each
    token, -1 of one that is dropped; scores; place i64 [units, slots], the token whose place a
    slot takes; sizes."""

    rows: Tensor
    owner: Tensor
    scores: Tensor
    place: Tensor
    sizes: Tensor


def merge_rows(
    layout: Layout, config: VMTCConfig, x: Tensor, scores: Tensor, features: Tensor
) -> tuple[Tensor, Tensor, list[Merged]]:
    """Of x ``[R, D]`` by the projector's rows, with scores ``[R]`` and features ``[R, Df]``: the
    tokens ``[M, D]`` that are left and their rows, i64 ``[M]``, ascending."""
    tokens, rows = [x[layout.fixed]], [layout.fixed]
    merged = []
    for group in layout.groups:
        slots = sum(layout.counts(config, group.shape[1]))
        if slots == group.shape[1]:
            owner = torch.arange(slots, device=x.device).expand_as(group)
            units = Merged(group, owner, scores[group], owner, torch.ones_like(group))
            tokens.append(x[group].flatten(0, 1))
        else:
            few = config.merge(x[group], scores[group], features=features[group])
            owner = few.owner.long()
            place = _heaviest(owner, scores[group], slots)
            units = Merged(group, owner, scores[group], place, few.sizes)
            tokens.append(few.tokens.flatten(0, 1))
        merged.append(units)
        rows.append(group.gather(1, units.place).flatten())
    left, order = torch.cat(rows).sort()
    return torch.cat(tokens)[order], left, merged


def merge_alike(merged: list[Merged], config: VMTCConfig, x: Tensor) -> Tensor:
    """What the same owners make of other features x: ``[R, D]``, merged at the rows left."""
    out = x.clone()
    for rows, owner, scores, place, _ in merged:
        weight = scores.nan_to_num(0.0).clamp(min=0)
        if config.weighting == "uniform":
            weight = torch.ones_like(weight)
        units, slots = place.shape
        owner = _slot(owner, slots)
        none = weight.new_zeros(units, slots + 1)
        total = none.scatter_add(1, owner, weight)
        weight = torch.where(total.gather(1, owner) > 0, weight, 1.0)
        total = none.scatter_add(1, owner, weight)
        share = (weight / total.gather(1, owner))[..., None]
        tokens = weight.new_zeros(units, slots + 1, x.shape[1])
        index = owner[..., None].expand(-1, -1, x.shape[1])
        tokens = tokens.scatter_add(1, index, share * x[rows].float())[:, :slots]
        out = out.index_copy(0, rows.gather(1, place).flatten(), tokens.flatten(0, 1).to(x.dtype))
    return out


def _heaviest(owner: Tensor, scores: Tensor, slots: int) -> Tensor:
    """i64 ``[units, slots]``: in each slot the token of the highest score, the first of equals."""
    tokens, owner = owner.shape[1], _slot(owner, slots)
    # no score is beside these, so that every slot has a token that reaches its maximum
    scores = scores.detach().float().nan_to_num(nan=-torch.inf)
    best = scores.new_full((len(owner), slots + 1), -torch.inf)
    best = best.scatter_reduce(1, owner, scores, "amax")
    index = torch.arange(tokens, device=owner.device)
    index = torch.where(scores == best.gather(1, owner), index, tokens)
    first = torch.full_like(best, tokens, dtype=torch.int64)
    return first.scatter_reduce(1, owner, index, "amin")[:, :slots]


def _slot(owner: Tensor, slots: int) -> Tensor:
    """The owners, where tokens that are dropped have one more slot behind the others."""
    return torch.where(owner < 0, slots, owner)
