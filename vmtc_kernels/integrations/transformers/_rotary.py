"""Multimodal rotary positions: a token that is left keeps its place in the original grid."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .._layout import Layout
from ._attached import Attached
from ._families import Family

IMAGE, VIDEO = 1, 2  # in mm_token_type_ids
KEY = "vmtc_shown"


class RotaryPositions(Attached):
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
        self.local = threading.local()
        self.original = self.core.get_rope_index
        self.core.get_rope_index = self._wrapped()
        self.hooks = [
            family.core.register_forward_pre_hook(self._see, with_kwargs=True),
            family.text.register_forward_pre_hook(self._correct, with_kwargs=True),
        ]

    @property
    def shown(self) -> dict[str, list[Tensor]]:
        """Of each modality encoded last, or handed to the model: bool ``[R]`` of each run."""
        if not hasattr(self.local, "shown"):
            self.local.shown = {}
        return self.local.shown

    def detach(self) -> None:
        del self.core.get_rope_index
        for hook in self.hooks:
            hook.remove()

    def encoded(self, modality: str, layout: Layout, rows: Tensor, output: Any) -> None:
        """The images of the prompt were encoded, and the projector's rows ``rows`` are left."""
        stays = torch.zeros(layout.size, dtype=torch.bool, device=rows.device)
        stays[rows] = True
        shown = list(layout.shown(stays).cpu().split(layout.splits))
        self.shown[modality] = shown
        # which is handed to the model later on, perhaps when others were encoded
        setattr(output, KEY, shown)

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

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand what the language model does not get to its hook."""
        for modality, output in (kwargs.get("mm_encoder_outputs") or {}).items():
            if (shown := getattr(output, KEY, None)) is not None:
                self.shown[modality] = shown
        return args, {**kwargs, KEY: kwargs.get("input_ids", args[0] if args else None)}

    def _correct(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        ids, positions = kwargs.pop(KEY, None), kwargs.get("position_ids")
        if ids is None or ids.shape[1] == 1 or positions is None or len(positions) < 3:
            return args, kwargs
        left = {m: int((ids == token).sum()) for m, token in self.family.tokens.items()}
        if not any(left.values()):
            return args, kwargs
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        past = 0 if cache is None else int(cache.get_seq_length())
        # text positions, which some models put first, stay
        corrected = positions.clone()
        found = [
            self._put_right(modality, positions, corrected, past)
            for modality in self.images
            if left.get(modality)
        ]
        if sum(found) * (ids.shape[0] // max(self.shape[0], 1)) != sum(left.values()):
            raise RuntimeError(
                "positions of a compressed prompt are known only where the model asked its"
                " get_rope_index for them last: pass no position_ids of your own, and prepare no"
                " other prompt in between"
            )
        return args, {**kwargs, "position_ids": corrected}

    def _put_right(self, modality: str, positions: Tensor, corrected: Tensor, past: int) -> int:
        """How many placeholders of a row's first beam were put right."""
        length, beams = positions.shape[2], positions.shape[1] // max(self.shape[0], 1)
        runs = list(zip(self.images[modality], self.places[modality], strict=True))
        shown = self.shown.get(modality, [])
        if len(shown) < len(runs):  # the cache holds the others
            runs = [run for run in runs if run[1][1][-1] >= past]
        if len(shown) != len(runs):
            return 0
        count = 0
        for (whole, (row, columns)), stays in zip(runs, shown, strict=True):
            here = (columns >= past) & (columns < past + length)
            place = columns[here] - past
            rows = slice(row * beams, (row + 1) * beams)
            given, first = positions[-3:, rows, place], whole[:, : len(columns)][:, None, here]
            kept = whole[:, stays.to(whole.device)]
            if kept.shape[1] != len(columns) or not torch.equal(given, first.expand_as(given)):
                return 0
            corrected[-3:, rows, place] = kept[:, None, here]
            count += len(place)
        return count


def _spans(types: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for kind, run in groupby(types.tolist()):
        end = start + len(list(run))
        yield kind, columns[start:end]
        start = end
