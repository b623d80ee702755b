"""Multimodal rotary positions: a token that is left keeps its place in the original grid."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ._families import Family
from ._layout import Layout

IMAGE, VIDEO = 1, 2  # in mm_token_type_ids


class RotaryPositions:
    """Positions of compressed prompts, for models that compute them from grids.

    The model asks for positions when it sees the prompt, before it is known which tokens are left:
    until then they are those of the first ones, and put right before the language model runs.
    """

    def __init__(self, family: Family) -> None:
        self.family, self.core = family, family.core
        # of each run of placeholders in the last prompt: the positions of all its tokens, i64
        # [3, R], and where it is, (row, columns)
        self.images: dict[str, list[Tensor]] = {}
        self.places: dict[str, list[tuple[int, Tensor]]] = {}
        self.shape = torch.Size()
        self.shown: dict[str, list[Tensor]] = {}  # bool [R] of each run
        self.original = self.core.get_rope_index
        self.core.get_rope_index = self._wrapped()
        self.hooks = [family.text.register_forward_pre_hook(self._correct, with_kwargs=True)]

    def detach(self) -> None:
        del self.core.get_rope_index
        for hook in self.hooks:
            hook.remove()

    def encoded(self, modality: str, layout: Layout, rows: Tensor) -> None:
        """The images of the prompt were encoded, and the projector's rows ``rows`` are left."""
        stays = torch.zeros(layout.size, dtype=torch.bool, device=rows.device)
        stays[rows] = True
        self.shown[modality] = list(layout.shown(stays).cpu().split(layout.splits))

    def _wrapped(self) -> Any:
        @functools.wraps(self.original)
        def get_rope_index(
            input_ids: Tensor, mm_token_type_ids: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            return self._positions(input_ids, mm_token_type_ids, *args, **kwargs)

        return get_rope_index

    def _positions(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The model's own answer for the prompt with all placeholders, then what is left of it."""
        grids = {
            IMAGE: self._runs("image", image_grid_thw),
            VIDEO: self._runs("video", video_grid_thw),
        }
        rows: list[list[tuple[int, Tensor, int]]] = []
        for types, ids in zip(mm_token_type_ids, input_ids, strict=True):
            real = torch.ones_like(ids) if attention_mask is None else attention_mask[len(rows)]
            columns = real.nonzero()[:, 0]
            rows.append(
                [
                    (kind, run, len(run) if kind == 0 else next(grids[kind]))
                    for kind, run in _spans(types[columns], columns)
                ]
            )
        length = max(sum(whole for _, _, whole in row) for row in rows)
        full_types = mm_token_type_ids.new_zeros(len(rows), length)
        mask = torch.zeros(len(rows), length, dtype=torch.int64, device=input_ids.device)
        for b, row in enumerate(rows):
            kinds = [types for kind, _, whole in row for types in [kind] * whole]
            full_types[b, : len(kinds)] = torch.tensor(kinds, dtype=full_types.dtype)
            mask[b, : len(kinds)] = 1
        ids = torch.zeros_like(mask)
        full, deltas = self.original(
            ids,
            full_types,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=mask,
            **kwargs,
        )
        positions = full.new_zeros(3, *input_ids.shape)
        self.images, self.places = {"image": [], "video": []}, {"image": [], "video": []}
        self.shape = input_ids.shape
        deltas = deltas.clone()
        for b, row in enumerate(rows):
            start = 0
            for kind, columns, whole in row:
                run = full[:, b, start : start + whole]
                positions[:, b, columns] = run[:, : len(columns)]
                start += whole
                deltas[b] += whole - len(columns)
                if kind:
                    modality = "image" if kind == IMAGE else "video"
                    self.images[modality].append(run)
                    self.places[modality].append((b, columns))
        return positions, deltas

    def _runs(self, modality: str, grid: Tensor | None) -> Iterator[int]:
        """Tokens of each run of placeholders, before compression."""
        if grid is None:
            return iter(())
        return iter(self.family.layout(modality, {f"{modality}_grid_thw": grid}).splits)

    def _correct(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        positions = kwargs.get("position_ids")
        if not self.shown or positions is None or positions.dim() != 3 or positions.shape[2] == 1:
            return None
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        past = 0 if cache is None else int(cache.get_seq_length())
        length, beams = positions.shape[2], positions.shape[1] // max(self.shape[0], 1)
        # text positions, which some models put first, stay
        corrected = positions.clone()
        for modality, shown in self.shown.items():
            images, places = self.images.get(modality, []), self.places.get(modality, [])
            if len(images) != len(shown):
                return None
            for whole, (row, columns), stays in zip(images, places, shown, strict=True):
                here = (columns >= past) & (columns < past + length)
                place = columns[here] - past
                rows = slice(row * beams, (row + 1) * beams)
                # another prompt, or positions of somebody's own
                given, first = positions[-3:, rows, place], whole[:, : len(columns)][:, None, here]
                if not torch.equal(given, first.expand_as(given)):
                    return None
                left = whole[:, stays.to(whole.device)]
                corrected[-3:, rows, place] = left[:, None, here]
        return args, {**kwargs, "position_ids": corrected}


def _spans(types: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for kind, run in groupby(types.tolist()):
        end = start + len(list(run))
        yield kind, columns[start:end]
        start = end
