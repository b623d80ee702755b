"""Which rows of a projector are merged together, and which placeholder shows which row."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Reduction(Protocol):
    """How many tokens a unit keeps: `VMTCConfig`, or what takes its place."""

    def counts(self, num_tokens: int, *, clip: bool = False) -> tuple[int, int]: ...


class Layout(NamedTuple):
    """How the visual tokens of some images pass from the projector into the prompt.

    A unit is what `VMTCConfig` calls an image: an image, a tile of one, or a frame of a video.
    ``groups``: i64 ``[units, tokens]`` each, the projector's rows of units of the same size;
    ``rows``: i64 ``[R]``, the row that each placeholder shows, -1 where it shows none (a newline);
    ``splits``: placeholders that follow one another; ``size``: rows of the projector; ``fixed``:
    i64, rows of no unit that stay as they are ([CLS]); ``whole``: tokens of a unit from which
    nothing was cut away, None where that is not done.
    """

    groups: list[Tensor]
    rows: Tensor
    splits: list[int]
    size: int
    fixed: Tensor
    whole: int | None = None

    def counts(self, config: Reduction, tokens: int) -> tuple[int, int]:
        """``(P, K)`` of a unit; one that was cut keeps no more than it has."""
        cut = self.whole is not None and tokens < self.whole
        return config.counts(tokens, clip=cut)

    def placeholders(self, config: Reduction) -> Tensor:
        """bool ``[R]``: as many placeholders as stay, the first ones of each unit."""
        stays = torch.zeros(self.size, dtype=torch.bool)
        for group in self.groups:
            stays[group[:, : sum(self.counts(config, group.shape[1]))]] = True
        stays[self.fixed] = True
        return self.shown(stays)

    def shown(self, stays: Tensor) -> Tensor:
        """bool ``[R]``: the placeholders that stay where rows do, those of ``stays``, bool."""
        return stays[self.rows.clamp(min=0)] | (self.rows < 0)

    def to(self, device: torch.device) -> Layout:
        return self._replace(
            groups=[group.to(device) for group in self.groups],
            rows=self.rows.to(device),
            fixed=self.fixed.to(device),
        )


def uniform(units: int, tokens: int, first: int = 0) -> Layout:
    """Units of the same size; the ``first`` rows of each, [CLS] for example, are fixed."""
    size = first + tokens
    rows = torch.arange(units * size)
    grid = rows.view(units, size)
    return Layout([grid[:, first:]], rows, [size] * units, units * size, grid[:, :first].flatten())


def by_size(units: list[Tensor]) -> list[Tensor]:
    """Units put together with those of their size, the empty ones left out."""
    groups: dict[int, list[Tensor]] = {}
    for unit in units:
        groups.setdefault(len(unit), []).append(unit)
    return [torch.stack(group) for tokens, group in groups.items() if tokens]
