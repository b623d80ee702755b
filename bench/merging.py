"""Token reduction of others, written plainly from their papers, and each again token by token.

x ``[B, N, D]`` are an image's tokens, keys ``[B, N, d]`` those of the encoder's attention, the mean
over heads, and scores ``[B, N]`` what [CLS] attends to, which sums to one at most. All of a batch
at once, in the dtypes given, and the host waits for nothing: a CUDA graph can hold each. The loops
take one image and count in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .llava_rivals import visionzip, visionzip_loop

# PruMerge's authors merge so many into each token that stays, ...
NEIGHBOURS = 32
# ... and with '+' take three by their place for each that they take by its score
BY_PLACE = 0.75

Reduce = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Reduction:
    """reduce, of x, scores and keys to ``count`` tokens ``[B, count, D]``; loop, of one image."""

    name: str
    scope: str
    reduce: Reduce
    loop: Reduce


def tome(x: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """ToMe (arXiv 2210.09461): ``count`` tokens and how many each is the mean of ``[B, count]``.

    Every other token has an edge to that of the rest whose key is most like its own by cosine; the
    tokens of the best edges are merged into those at their ends, weighted with their sizes. As a
    step removes half at most there may be several, and where ToMe would have the next layer's keys
    there are merged ones. Its attention weighted by size is no part of this.
    """
    sizes = torch.ones_like(x[..., :1], dtype=torch.float32)
    while x.shape[1] > count:
        merge = _matching(keys, min(x.shape[1] - count, x.shape[1] // 2))
        merged = merge(sizes)
        x = merge(x * sizes.to(x.dtype)) / merged.to(x.dtype)
        # cosines take a sum for a mean; not rounded, or the next matching would hang on it
        keys, sizes = merge(_wide(keys)), merged
    return x, sizes[..., 0]


def _matching(keys: Tensor, remove: int) -> Callable[[Tensor], Tensor]:
    """What adds the ``remove`` best matched of the even tokens to the odd ones: the even ones that
    are left, then the odd ones, each in their order."""
    even, odd = keys[:, ::2], keys[:, 1::2]
    best, target = (_products(even, odd.mT) * _inverse_norm(odd)[:, None]).max(-1)
    order = (best * _inverse_norm(even)).argsort(dim=1, descending=True, stable=True)
    source, left = order[:, :remove], order[:, remove:].sort(dim=1).values
    target = target.gather(1, source)

    def merge(t: Tensor) -> Tensor:
        even, odd = t[:, ::2], t[:, 1::2]
        index = target[..., None].expand(-1, -1, t.shape[2])
        return torch.cat([_pick(even, left), odd.scatter_add(1, index, _pick(even, source))], dim=1)

    return merge


def tome_loop(x: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What `tome` gives for one image, one token after another."""
    tokens = [(row, key, 1) for row, key in zip(x.double(), keys.double(), strict=True)]
    while len(tokens) > count:
        even, odd = tokens[::2], tokens[1::2]
        ends, edges = torch.stack([key for _, key, _ in odd]), []
        for i, (_, key, _) in enumerate(even):
            like = _cosines(key, ends)
            edges.append((-max(like), i, like.index(max(like))))
        groups = [[token] for token in odd]
        for _, i, j in sorted(edges)[: min(len(tokens) - count, len(odd))]:
            groups[j].append(even[i])
        taken = {id(token) for group in groups for token in group}
        tokens = [token for token in even if id(token) not in taken] + [_mean(g) for g in groups]
    return torch.stack([x for x, _, _ in tokens]), torch.tensor([size for *_, size in tokens])


def _mean(group: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, int]:
    xs, keys, sizes = zip(*group, strict=True)
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    return weights @ torch.stack(xs), weights @ torch.stack(keys), sum(sizes)


def prumerge(
    x: Tensor,
    scores: Tensor,
    keys: Tensor,
    count: int,
    by_place: float = 0.0,
    neighbours: int = NEIGHBOURS,
) -> Tensor:
    """LLaVA-PruMerge (arXiv 2403.15388): ``count`` tokens, the last of which stands for all that
    do not stay.

    Its authors keep as many tokens as there are outliers among the scores, by quartiles; here, to
    compare at a budget, those of highest score. With '+' a share ``by_place`` of them is taken
    evenly out of the rest, where theirs are even over the image and as many as it happens. To each
    that stays its ``neighbours`` nearest by cosine of keys are added, staying or not, times their
    scores and not divided by their sum, as the authors' program has it; and so all that do not stay
    make up the last.
    """
    kept = _kept(scores, count - 1, by_place)
    like = _products(_pick(keys, kept), keys.mT) * _inverse_norm(keys)[:, None]
    like = like.scatter(2, kept[..., None], -torch.inf)
    near = like.topk(min(neighbours, x.shape[1] - 1)).indices
    given = scores[:, None].expand_as(like).gather(2, near)
    weights = torch.zeros_like(like, dtype=scores.dtype).scatter(2, near, given)
    weights = weights.scatter(2, kept[..., None], 1.0)
    last = scores.scatter(1, kept, 0.0)[:, None]
    return torch.cat([weights, last], dim=1).to(x.dtype) @ x


def _kept(scores: Tensor, keep: int, by_place: float) -> Tensor:
    """[B, keep], the places: by score from the highest on, then by place."""
    even = round(by_place * keep)
    order = scores.argsort(dim=1, descending=True, stable=True)
    first, rest = order[:, : keep - even], order[:, keep - even :].sort(dim=1).values
    steps = torch.arange(even, device=scores.device)
    return torch.cat([first, rest[:, (2 * steps + 1) * rest.shape[1] // max(1, 2 * even)]], dim=1)


def prumerge_loop(
    x: Tensor,
    scores: Tensor,
    keys: Tensor,
    count: int,
    by_place: float = 0.0,
    neighbours: int = NEIGHBOURS,
) -> Tensor:
    """What `prumerge` gives for one image, one token after another."""
    x, keys, score = x.double(), keys.double(), scores.tolist()
    order = sorted(range(len(x)), key=lambda i: -score[i])
    even = round(by_place * (count - 1))
    kept, rest = order[: count - 1 - even], sorted(order[count - 1 - even :])
    # the middles of as many equal stretches
    kept += [rest[int((step + 0.5) * len(rest) / even)] for step in range(even)]
    out = []
    for i in kept:
        like = _cosines(keys[i], keys)
        others = sorted((j for j in range(len(x)) if j != i), key=lambda j: -like[j])
        out.append(x[i] + sum(score[j] * x[j] for j in others[:neighbours]))
    out.append(sum(score[j] * x[j] for j in range(len(x)) if j not in kept))
    return torch.stack(out)


def _visionzip(x: Tensor, scores: Tensor, keys: Tensor, count: int) -> Tensor:
    """VisionZip (arXiv 2412.04467) with its share of merged tokens, 10 of 64."""
    contextual = max(1, count * 10 // 64)
    # in float32, as rounded cosines would tie
    return visionzip(x, scores, keys.float(), count - contextual, contextual)


def _visionzip_loop(x: Tensor, scores: Tensor, keys: Tensor, count: int) -> Tensor:
    return visionzip_loop(x, scores, keys.float(), max(1, count * 10 // 64), count)


REDUCTIONS = [
    Reduction(
        "ToMe",
        "merges by pairs, no scores",
        lambda x, scores, keys, count: tome(x, keys, count)[0],
        lambda x, scores, keys, count: tome_loop(x, keys, count)[0],
    ),
    Reduction("VisionZip", "selects and merges once", _visionzip, _visionzip_loop),
    Reduction("PruMerge", "selects, adds the nearest", prumerge, prumerge_loop),
    Reduction(
        "PruMerge+",
        "selects, adds the nearest",
        partial(prumerge, by_place=BY_PLACE),
        partial(prumerge_loop, by_place=BY_PLACE),
    ),
]


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """``[B, K, D]`` of ``[B, N, D]``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a b of half types summed in float32, on a GPU by its matrix units: rounded cosines would tie,
    and one call would choose otherwise than another."""
    if a.is_cuda and a.itemsize < 4:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return _wide(a) @ _wide(b)


def _inverse_norm(keys: Tensor) -> Tensor:
    keys = _wide(keys)
    return keys.square().sum(-1).clamp(min=torch.finfo(keys.dtype).tiny).rsqrt()


def _wide(x: Tensor) -> Tensor:
    return x if x.itemsize >= 4 else x.float()


def _cosines(key: Tensor, others: Tensor) -> list[float]:
    return cosine_similarity(others, key[None]).tolist()
