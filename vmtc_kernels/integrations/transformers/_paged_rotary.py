"""Rotary positions in three dimensions under continuous batching, which knows only one."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ._attached import Attached
from ._families import Family
from ._paged import Marks, Pages, key_ends
from ._requests import Requests, Table, replayed


class Skipped(NamedTuple):
    """Beside a paged cache: i64 ``[slots]``, by how much the position of the token after this one
    exceeds its number in the request."""

    after: Tensor
    marks: Marks


class PagedRotary(Attached):
    """Positions of compressed images in requests, for models that compute them from grids.

    Continuous batching numbers the tokens of a request. A virtual id's ``places`` in the table are
    how its position in each dimension exceeds the number of the image's first token plus its own
    number in the image, and what the image skips for those that follow, on its last token.
    Features that later layers add are handed to them too.
    """

    def __init__(self, family: Family, requests: Requests) -> None:
        self.family, self.requests = family, requests
        self.last = family.text.config.num_hidden_layers - 1
        self.caches: MutableMapping[Any, Skipped] = WeakKeyDictionary()
        self.ids: Tensor | None = None
        self.hooks = [
            family.core.register_forward_pre_hook(self._see, with_kwargs=True),
            family.text.register_forward_pre_hook(self._begin, with_kwargs=True),
            family.text.register_forward_hook(self._end, with_kwargs=True),
        ]

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.ids = kwargs.get("input_ids")

    def _begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if "write_index" not in kwargs:
            return None
        table, ids = self.requests.table, self.ids
        assert table is not None and ids is not None
        if replayed(ids) or kwargs.get("block_table") is not None:
            raise NotImplementedError(
                f"continuous batching of {self.family.model_type} needs its positions put right at"
                " each step, which CUDA graphs, torch.compile and decoding by block tables do"
                " not allow: pass ContinuousBatchingConfig(use_cuda_graph=False,"
                " max_blocks_per_request=0) without settings to compile"
            )
        positions = self._positions(table, ids[0], kwargs)
        kwargs = {**kwargs, "position_ids": positions[:, None]}
        virtual = ids >= table.first
        if table.features.shape[1] > 1 and virtual.any():
            added = table.features[table.rows(ids[virtual])].unbind(1)[1:]
            kwargs.update(visual_pos_masks=virtual, deepstack_visual_embeds=list(added))
        return args, kwargs

    def _positions(self, table: Table, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """i64 ``[3, T]``."""
        cache = kwargs["cache"]
        pages = Pages(cache)
        if cache not in self.caches:
            with torch.inference_mode(False):
                after = torch.zeros(pages.slots, dtype=torch.int64, device=ids.device)
            self.caches[cache] = Skipped(after, Marks(pages, ids.device, self.last))
        skipped = self.caches[cache]
        ends, starts = key_ends(kwargs), kwargs["cu_seq_lens_q"].long()
        read, write = kwargs["read_index"][0], kwargs["write_index"][0][: starts[-1]]

        # what was skipped before this step, by request, then before each token
        before = torch.zeros_like(starts[:-1])
        past = ends.diff() - starts.diff()
        if len(read):
            previous = read[(ends[:-1] + past - 1)[past > 0].long()]
            skipped.marks.check(pages, previous)
            before[past > 0] = skipped.after[pages.slot(previous)]
        rows, virtual = table.rows(ids), ids >= table.first
        places = torch.where(virtual[:, None], table.places[rows], 0)
        here = places[:, 3].cumsum(0) - places[:, 3]
        request = torch.searchsorted(
            starts[1:], torch.arange(len(ids), device=ids.device), right=True
        )
        request = request.clamp(max=len(before) - 1)  # padding, in its place
        base = before - here[starts[:-1].clamp(max=len(ids) - 1)]
        here = here + base[request]
        skipped.after[pages.slot(write)] = (here + places[:, 3])[: len(write)]
        return kwargs["position_ids"][0].long() + here + places[:, :3].T

    def _end(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if "write_index" in kwargs:
            write = kwargs["write_index"][0][: kwargs["cu_seq_lens_q"][-1]]
            self.caches[kwargs["cache"]].marks.note(Pages(kwargs["cache"]), write)
