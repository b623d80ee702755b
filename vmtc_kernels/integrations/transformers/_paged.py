"""CMAI under continuous batching: its state lies beside the paged cache, slot by slot."""

from __future__ import annotations

from collections.abc import MutableMapping
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface

from ...config import CMAIConfig
from ._families import Family
from ._requests import replayed

TEXT, IMAGE = 1, 2  # modality, see `focus_attention`
FACTOR = 0x9E3779B97F4A7C1  # odd and arbitrary


class Pages:
    """Where a paged cache keeps keys and values, in the versions of transformers since 5.17.

    An index into the cache is ``page * size + offset``, and a block has every ``stride``-th page;
    a slot is an index as if there were no other pages. ``slots``: how many there are.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        if hasattr(cache, "layer_to_allocator"):
            allocator = cache.layer_to_allocator[0]
            self.size: int = allocator.tokens_per_page
            self.stride: int = allocator.block_physical_stride // self.size
        else:
            self.size, self.stride = cache.block_size, 1
        pages = len(self.of(0)[0])
        self.slots = (pages // self.stride + 1) * self.size

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, ``[pages, size, G, d]``."""
        if hasattr(self.cache, "layer_to_allocator"):
            return self.cache.layer_to_allocator[layer].get_cache_for_block_table(layer)
        index = self.cache.layer_index_to_group_indices[layer][1]
        keys, values = self.cache.key_cache[index], self.cache.value_cache[index]
        shape = (-1, self.size, *keys.shape[1:])
        return keys.view(shape), values.view(shape)

    def slot(self, index: Tensor) -> Tensor:
        return index // (self.size * self.stride) * self.size + index % self.size


def key_ends(kwargs: dict[str, Any]) -> Tensor:
    """i32 ``[B + 1]``: where each request's keys end among those of all, after a zero."""
    ends = kwargs["cu_seq_lens_k"]  # in some versions by kind of layer, of which there is one
    return ends["full_attention"] if isinstance(ends, dict) else ends


class Marks:
    """Digests of keys in a paged cache, by slot, so that it is noticed where keys are that came
    there without what we keep beside them. The last layer's keys tell whole prefixes apart."""

    def __init__(self, pages: Pages, device: torch.device, last: int) -> None:
        # a cache may outlive the inference mode in which it was first used
        with torch.inference_mode(False):
            self.digests = torch.zeros(pages.slots, dtype=torch.int64, device=device)
        self.last = last

    def note(self, pages: Pages, index: Tensor) -> None:
        self.digests[pages.slot(index)] = self._digest(pages, index)

    def check(self, pages: Pages, index: Tensor) -> None:
        if (self.digests[pages.slot(index)] != self._digest(pages, index)).any():
            raise NotImplementedError(
                "the cache of continuous batching holds tokens that were not computed at their"
                " place since attach: neither cpu_offload_space nor num_return_sequences are"
                " supported; for several answers send a request several times, which reads the"
                " prompt that they share once"
            )

    def _digest(self, pages: Pages, index: Tensor) -> Tensor:
        keys = pages.of(self.last)[0][index // pages.size, index % pages.size, 0]
        bits = keys.view(torch.int16 if keys.element_size() == 2 else torch.int32)
        return (bits * (2 * torch.arange(bits.shape[1], device=bits.device) + 1) * FACTOR).sum(1)


class Slots:
    """What CMAI has to know of the tokens in a paged cache; a prefix that is shared shares it.

    ``modality``: u8 ``[slots]``; ``text_image``: of each layer that inhibits, f32
    ``[M, slots, I]``, once there is an image; ``marks``: see `Marks`.
    """

    def __init__(self, pages: Pages, device: torch.device, last: int) -> None:
        with torch.inference_mode(False):
            self.modality = torch.zeros(pages.slots, dtype=torch.uint8, device=device)
        self.marks = Marks(pages, device, last)
        self.text_image: dict[int, Tensor] = {}
        self.num_image = 0

    def reserve(self, num_image: int, layers: list[int], config: CMAIConfig, heads: int) -> None:
        if num_image <= self.num_image:
            return
        # not anew for each prompt that has a few tokens more
        more = num_image + num_image // 4 - self.num_image
        new = config.text_image
        slots, device = len(self.modality), self.modality.device
        with torch.inference_mode(False):
            for layer in layers:
                x = self.text_image.get(layer, new(1, heads, slots, 0, device)[0])
                self.text_image[layer] = torch.nn.functional.pad(x, (0, more))
        self.num_image += more


class Group(NamedTuple):
    """Requests of a step that run together, with ``Lq`` queries each.

    ``query``, ``key``: i64 ``[B, Lq]`` and ``[B, L]``, which of the step's; ``slot``: i64
    ``[B, L]``; ``modality``: u8 ``[B, L]``, 0 beyond a request's keys; ``num_image``: of the one
    with the most; ``lengths``, ``table``: i32, as `paged_focus_attention` takes them.
    """

    query: Tensor
    key: Tensor
    slot: Tensor
    modality: Tensor
    num_image: int
    lengths: Tensor
    table: Tensor


class Step(NamedTuple):
    """One pass of the model over a paged cache; ``write``, ``written``: i64, index and slot of the
    new keys."""

    focus: PagedFocus
    pages: Pages
    slots: Slots
    groups: list[Group]
    write: Tensor
    written: Tensor


class PagedFocus:
    """Inhibition in requests of continuous batching, from `attach` until `detach`.

    Requests that generate, one query each, go through `paged_focus_attention` together; prompts,
    and pieces of prompts, through `focus_attention` one by one.
    """

    def __init__(
        self, family: Family, config: CMAIConfig, layers: list[int], key: str, recording: bool
    ) -> None:
        self.family, self.config, self.layers = family, config, layers
        self.key, self.recording = key, recording
        self.first = family.core.get_input_embeddings().num_embeddings  # of ids that are images
        self.heads = family.text.config.num_attention_heads
        self.last = family.text.config.num_hidden_layers - 1
        self.stock = AttentionInterface()["sdpa"]
        self.caches: MutableMapping[Any, Slots] = WeakKeyDictionary()
        self.replaced = False

    def hold(self, implementation: str, paged: bool) -> None:
        """Put our attention back where continuous batching of transformers 5.17 replaced it, as it
        does before it starts and when it stops."""
        if implementation == "paged|sdpa" or (implementation == "sdpa" and self.replaced):
            self.family.model.set_attn_implementation({"text_config": self.key})
            self.replaced = implementation != "sdpa"
        elif paged and implementation != self.key:
            raise NotImplementedError(
                f"continuous batching switched the model to {implementation!r}, which CMAI cannot"
                " replace: pass ContinuousBatchingConfig(auto_switch_to_flash=False), or, where"
                " that is not known, call model.set_attn_implementation('paged|sdpa') before"
            )

    def begin(self, cache: Any, ids: Tensor, kwargs: dict[str, Any]) -> Step:
        """Note who the new tokens are, before the first layer runs."""
        if self.recording:
            raise NotImplementedError(
                "CMAI does not record under continuous batching: attach with record=False"
            )
        if self.config.prefill != self.config.decode:
            raise NotImplementedError(
                "continuous batching reads prompts in pieces, at times of one token, which CMAI"
                " cannot tell from those that are generated: give CMAIConfig the same for prefill"
                " and decode"
            )
        if replayed(ids):
            raise NotImplementedError(
                "CMAI decides anew at each step of continuous batching, which CUDA graphs and"
                " torch.compile cannot replay: pass ContinuousBatchingConfig(use_cuda_graph=False)"
                " without settings to compile"
            )
        ends = key_ends(kwargs)
        queries, keys = kwargs["cu_seq_lens_q"].tolist(), ends.tolist()
        pages = Pages(cache)
        if cache not in self.caches:
            self.caches[cache] = Slots(pages, ids.device, self.last)
        slots = self.caches[cache]
        write = kwargs["write_index"][0][: queries[-1]]
        read = kwargs["read_index"][0][: keys[-1]]
        if not len(read):  # nothing was there before
            read = write
        slots.marks.check(pages, read[~torch.isin(read, write)])
        written = pages.slot(write)
        slots.modality[written] = torch.where(
            ids[0, : queries[-1]] < self.first, TEXT, IMAGE
        ).byte()
        modality = slots.modality[pages.slot(read)]
        images = torch.nn.functional.pad((modality == IMAGE).cumsum(0), (1, 0))[ends.long()]
        counts = images.diff().tolist()
        slots.reserve(max(counts, default=0), self.layers, self.config, self.heads)

        together: dict[Any, list[int]] = {}
        spans = list(zip(pairwise(queries), pairwise(keys), strict=True))
        for i, ((start, end), _) in enumerate(spans):
            if end - start == 1:
                together.setdefault(("decode", counts[i] > 0), []).append(i)
            elif end > start:
                together[i] = [i]
        groups = [
            _group([spans[i] for i in members], max(counts[i] for i in members), pages, read, slots)
            for members in together.values()
        ]
        return Step(self, pages, slots, groups, write, written)

    def end(self, step: Step) -> None:
        step.slots.marks.note(step.pages, step.write)

    def attend(
        self, step: Step, module: Any, q: Tensor, k: Tensor, v: Tensor, kwargs: Any
    ) -> Tensor:
        """``[1, T, H, dv]`` of all requests, from q ``[1, H, T, d]`` and k, v of all their keys."""
        layer, scale = module.layer_idx, kwargs.get("scaling")
        if "cache" in kwargs:  # transformers 5.17 leaves this to the attention function
            indices = {name: kwargs[name] for name in ("read_index", "write_index")}
            k, v = (x.transpose(0, 1)[None] for x in kwargs["cache"].update(k, v, layer, **indices))
        state = step.slots.text_image.get(layer)
        if state is not None:
            state[:, step.written] = 0  # of who was there before
        out = q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])
        for group in step.groups:
            part = self._attend(step.pages, module, group, q[0], k[0], v[0], scale, state)
            out[0, group.query.flatten()] = part.transpose(1, 2).flatten(0, 1)
        return out

    def _attend(
        self,
        pages: Pages,
        module: Any,
        group: Group,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        state: Tensor | None,
    ) -> Tensor:
        """``[B, H, Lq, dv]`` of one group."""
        queries, inhibits = group.query.shape[1], state is not None and group.num_image > 0
        num_image = group.num_image if inhibits else 0
        q = q[:, group.query].transpose(0, 1)
        if queries > 1:
            k, v = (x[:, group.key].transpose(0, 1) for x in (k, v))
            if not inhibits:
                return self._plain(module, q, k, v, scale)
        B, L = group.slot.shape
        if inhibits:
            assert state is not None
            text_image = state[:, group.slot, :num_image].transpose(0, 1)
        else:
            text_image = self.config.text_image(B, self.heads, L, 0, q.device)
        if queries > 1:
            out = self.config.attention(
                q, k, v, group.modality, num_image, scale=scale, text_image=text_image
            )
        else:
            out = self.config.paged_attention(
                q,
                *pages.of(module.layer_idx),
                group.table,
                group.lengths,
                group.modality,
                num_image,
                scale=scale,
                text_image=text_image,
            )
        if inhibits:
            assert state is not None
            place = group.lengths.long()[:, None] + torch.arange(-queries, 0, device=q.device)
            new = text_image.gather(
                2, place[:, None, :, None].expand(-1, len(state), -1, num_image)
            )
            state[:, group.slot.gather(1, place), :num_image] = new.transpose(0, 1)
        assert isinstance(out, Tensor)
        return out

    def _plain(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """The model's own attention of a prompt, or of its piece after others."""
        new, length = q.shape[2], k.shape[2]
        mask = None
        if new < length:
            mask = torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
            mask = mask[None, None]
        return self.stock(module, q, k, v, mask, scaling=scale)[0].transpose(1, 2)


def _group(
    spans: list[tuple[tuple[int, int], tuple[int, int]]],
    num_image: int,
    pages: Pages,
    read: Tensor,
    slots: Slots,
) -> Group:
    """Requests by where their queries and keys start and end, all with as many queries."""
    device = read.device
    query = torch.tensor([list(range(*queries)) for queries, _ in spans], device=device)
    start, end = torch.tensor([keys for _, keys in spans], device=device).unbind(1)
    place = torch.arange(int(max(b - a for _, (a, b) in spans)), device=device)
    inside = place < (end - start)[:, None]
    key = torch.minimum(start[:, None] + place, end[:, None] - 1)
    index = read[key]
    slot = pages.slot(index)
    return Group(
        query,
        key,
        slot,
        slots.modality[slot].masked_fill(~inside, 0),
        num_image,
        (end - start).int(),
        (index[:, :: pages.size] // pages.size).int(),
    )
