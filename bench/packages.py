"""K-means by packages that take no seeds or hide where they do: each from the same seeds.

A package that draws its seeds draws them from a known generator: the tokens are put in such an
order that it draws those wanted. Nothing of it is patched, and should another version draw
otherwise, the objective tells.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Labels = Callable[[], Tensor]


@dataclass(frozen=True)
class Package:
    """prepare: tokens [B, R, D] in float32 on a CPU, the ranks [K] of the seeds among them, and a
    number of rounds -> the call to time, which returns labels [B, R]; what it does itself, the
    order of the tokens among it, is not timed. ``note``: what else there is to know of a timing."""

    name: str
    prepare: Callable[[Tensor, Tensor, int], Labels]
    missing: str | None
    note: str = ""


def packages() -> list[Package]:
    """Euclidean, on a CPU."""
    return [
        Package(
            "fastkmeans",
            fastkmeans,
            load("fastkmeans", "fastkmeans")[1],
            "image by image, refills an empty cluster at random",
        ),
        Package(
            "flash-kmeans, torch",
            flash_kmeans_torch,
            load("flash_kmeans.torch_fallback", "flash-kmeans")[1],
            "its plain torch for machines without Triton or a GPU",
        ),
    ]


def fastkmeans(x: Tensor, seeds: Tensor, iterations: int) -> Labels:
    """It stops early when no centroid moves, and assigns once more, as ours does. It seeds torch's
    and numpy's global generators."""
    module, tokens, clusters = importlib.import_module("fastkmeans"), x.shape[1], len(seeds)
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    order = _order(seeds, drawn[:clusters], tokens)
    images = x[:, order].numpy()

    def run() -> Tensor:
        model = module.FastKMeans(x.shape[2], clusters, niter=iterations, gpu=False, seed=0)
        return _in_order([model.fit_predict(image) for image in images], order)

    return run


def flash_kmeans_torch(x: Tensor, seeds: Tensor, iterations: int) -> Labels:
    """What flash-kmeans 0.3.1 runs where it has no GPU: assigns in products over the batch, adds up
    image by image. It takes seeds, and stops early when no centroid moves. Its labels are older
    than its centroids: it assigns once more here, as ours does."""
    module = importlib.import_module("flash_kmeans.torch_fallback")
    first = x[:, seeds].contiguous()
    least = torch.finfo(torch.float32).tiny

    def run() -> Tensor:
        _, centroids, _ = module.batch_kmeans_Euclid_torch_native(
            x, len(seeds), max_iters=iterations, tol=least, init_centroids=first
        )
        norms = x.square().sum(-1)
        return module.euclid_assign_torch_native_chunked(x, centroids, norms).long()

    return run


def _order(seeds: Tensor, drawn: Tensor, tokens: int) -> Tensor:
    """[R], which token goes to each place: the seeds where they are drawn from, else as it was."""
    order, place = torch.empty(tokens, dtype=torch.long), torch.ones(tokens, dtype=torch.bool)
    token = place.clone()
    order[drawn] = seeds
    place[drawn], token[seeds] = False, False
    order[place] = token.nonzero()[:, 0]
    return order


def _in_order(labels: list[Any], order: Tensor) -> Tensor:
    """Labels [B, R] of the tokens as they were."""
    found = torch.stack([torch.from_numpy(image) for image in labels])
    return torch.empty_like(found).index_copy_(1, order, found)


def load(module: str, package: str, missing: str | None = None) -> tuple[Any, str | None]:
    """The module, or None and why it is missing, ``missing`` before all."""
    if missing:
        return None, missing
    try:
        return importlib.import_module(module), None
    # whatever a broken package raises ends no run
    except Exception as error:
        return None, f"{package} does not import: {error}"
