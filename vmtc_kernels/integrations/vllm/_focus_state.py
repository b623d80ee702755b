"""CMAI's state in the pages of the engine's cache, and the attention of one step over them."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import CMAIConfig

TEXT, IMAGE = 1, 2  # modality, see `focus_attention`
ALIGNMENT = 16  # bytes, what kernels that load several numbers at once ask of a row
# f32 of state that are gathered at a time; more requests than fit run one after the other
GATHERED = 32 * 2**20


class Place(NamedTuple):
    """What lies in a page of a layer for each token: keys and values of all kv heads, then f32: the
    token's modality, and its row of text-to-image attention ``[M, I]``.

    A layer that does not inhibit has keys and values alone (``matrices`` 0).
    """

    matrices: int
    num_image: int

    def size(self, numbers: int, itemsize: int) -> int:
        """Bytes of a token that has so many numbers of keys and values."""
        state = 4 * (1 + self.matrices * self.num_image) if self.matrices else 0
        start = -(-numbers * itemsize // ALIGNMENT) * ALIGNMENT
        return -(-(start + state) // ALIGNMENT) * ALIGNMENT

    def gathered(self, longest: int) -> int:
        """The most f32 that a layer gathers at a time, of requests of so many tokens."""
        most = self.matrices * self.num_image * longest
        return max(GATHERED, most) if most else 0

    def views(self, cache: Tensor, groups: int, head_size: int) -> Views:
        """cache: ``[blocks, 1, block_size, numbers]`` of one layer, any strides between tokens."""
        page = cache[:, 0]
        width = groups * head_size
        k, v = (page[..., i * width : (i + 1) * width].unflatten(-1, (groups, -1)) for i in (0, 1))
        if not self.matrices:
            return Views(k, v, None, None)
        numbers = ALIGNMENT // page.element_size()
        state = page[..., -(-2 * width // numbers) * numbers :].view(torch.float32)
        row = state[..., 1 : 1 + self.matrices * self.num_image]
        return Views(k, v, state[..., 0], row.unflatten(-1, (self.matrices, self.num_image)))


class Views(NamedTuple):
    """A layer's cache: k, v ``[blocks, block_size, G, d]``, and, where it inhibits, modality f32
    ``[blocks, block_size]`` and text_image f32 ``[blocks, block_size, M, I]``."""

    k: Tensor
    v: Tensor
    modality: Tensor | None
    text_image: Tensor | None


class Tokens:
    """The modality of a step's tokens, on its way from the model to its attention layers."""

    def __init__(self) -> None:
        self.waiting: dict[bool, Tensor] = {}

    def put(self, modality: Tensor) -> None:
        """u8 ``[T]``: for the layers that inhibit, and for those that do not."""
        self.waiting = dict.fromkeys((True, False), modality)

    def take(self, inhibits: bool) -> Tensor | None:
        return self.waiting.pop(inhibits, None)


class Batch(NamedTuple):
    """What the engine says of a step: where each request's tokens are among all, on the host;
    slots i64 ``[T]``, lengths i32 ``[R]``, table i32 ``[R, max_blocks]``, and the length of the
    longest, or more."""

    starts: list[int]
    slots: Tensor
    lengths: Tensor
    table: Tensor
    longest: int


class Group(NamedTuple):
    """Requests of a step that run together, with ``Lq`` tokens each: query i64 ``[B, Lq]``, which
    of the step's; lengths i32 ``[B]``; table i32 ``[B, blocks]``; modality u8 ``[B, L]``;
    num_image: of the one with the most."""

    query: Tensor
    lengths: Tensor
    table: Tensor
    modality: Tensor
    num_image: int


class Step(NamedTuple):
    """block, offset: i64 ``[T]``, where each token's keys, values and state go."""

    block: Tensor
    offset: Tensor
    groups: list[Group]


def begin(batch: Batch, views: Views, place: Place, new: Tensor) -> Step:
    """Plan a step before its first layer: note who the new tokens are (u8 ``[T]``), and look up who
    came before them.

    Reads lengths and numbers of images back to the host, once for all layers.
    """
    size, device = views.k.shape[1], views.k.device
    block, offset = (x[: len(new)] for x in (batch.slots // size, batch.slots % size))
    # entries beyond a request's blocks may be anything
    table = batch.table[:, : -(-batch.longest // size)].clamp(0, len(views.k) - 1)
    keys = torch.arange(table.shape[1] * size, device=device)
    if views.modality is None:
        modality = torch.full((len(table), len(keys)), TEXT, dtype=torch.uint8, device=device)
    else:
        views.modality[block, offset] = new.to(device=device, dtype=torch.float32)
        modality = views.modality[table].flatten(1).to(torch.uint8)
    modality = modality.masked_fill(keys >= batch.lengths[:, None], 0)
    counts = (modality == IMAGE).sum(1)
    lengths, images = torch.stack([batch.lengths.long(), counts]).tolist()
    if place.matrices and max(images, default=0) > place.num_image:
        raise RuntimeError(
            f"a prompt has {max(images)} image tokens, more than the {place.num_image} that CMAI"
            " was told at start-up to expect: images may be larger than the model's processor said"
        )
    together: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for i, (start, end) in enumerate(pairwise(batch.starts)):
        if end > start:
            together[end - start, images[i] > 0].append(i)
    groups = []
    for (queries, _), members in together.items():
        # long ones with long ones, so that little is gathered for nothing
        members.sort(key=lengths.__getitem__)
        while members:
            longest, most = lengths[members[-1]], max(images[i] for i in members)
            each = max(1, longest * most * place.matrices)
            some = members[-max(1, GATHERED // each) :]
            del members[-len(some) :]
            index = torch.tensor(some, device=device)
            first = torch.tensor([batch.starts[i] for i in some], device=device)
            groups.append(
                Group(
                    first[:, None] + torch.arange(queries, device=device),
                    batch.lengths[index],
                    table[index, : -(-longest // size)].contiguous(),
                    modality[index, :longest].contiguous(),
                    max(images[i] for i in some),
                )
            )
    return Step(block, offset, groups)


def attend(
    step: Step,
    views: Views,
    config: CMAIConfig,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
) -> None:
    """One layer: q, out ``[T, H, d]`` and k, v ``[T, G, d]`` of the new tokens, or more rows than
    there are tokens."""
    place = step.block, step.offset
    views.k[place] = k[: len(step.block)]
    views.v[place] = v[: len(step.block)]
    if views.text_image is not None:
        # not what was there of another request; nor will an image that comes later have been seen
        views.text_image[place] = 0
    for group in step.groups:
        num_image = group.num_image if views.text_image is not None else 0
        arguments: dict[str, Any] = {"scale": scale}
        if num_image:
            arguments["text_image"] = _gathered(views.text_image, group)
        else:
            sizes = len(group.query), q.shape[1], group.modality.shape[1], 0
            arguments["text_image"] = config.text_image(*sizes, q.device)
        part = config.paged_attention(
            q[group.query].transpose(1, 2),
            views.k,
            views.v,
            group.table,
            group.lengths,
            group.modality,
            num_image,
            **arguments,
        )
        out[group.query] = part.transpose(1, 2)
        if num_image:
            _keep(views.text_image, step, group, arguments["text_image"])


def _gathered(state: Tensor | None, group: Group) -> Tensor:
    """The rows of a group's requests in order, f32 ``[B, M, blocks * block_size, I]``."""
    assert state is not None
    rows = state[..., : group.num_image].index_select(0, group.table.flatten())
    blocks = group.table.shape[1]
    return rows.unflatten(0, (-1, blocks)).flatten(1, 2).transpose(1, 2).contiguous()


def _keep(state: Tensor | None, step: Step, group: Group, text_image: Tensor) -> None:
    """Write the rows of the new tokens back to their pages."""
    assert state is not None
    queries = group.query.shape[1]
    at = group.lengths.long()[:, None] + torch.arange(-queries, 0, device=state.device)
    each = torch.arange(len(at), device=state.device)[:, None]
    block, offset = step.block[group.query], step.offset[group.query]
    state[..., : group.num_image][block, offset] = text_image.transpose(1, 2)[each, at]
