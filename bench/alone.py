"""faiss in a process of its own.

faiss brings an OpenMP and an OpenBLAS; beside the worker threads of torch and scikit-learn it was
seen at half its speed. Its process holds the data, so that a call sends next to nothing.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_tasks: list[tuple[Any, Any]] = []
_models: list[Any] = []
_rounds = 0


def process(images: Any, seeds: Any, iterations: int) -> ProcessPoolExecutor:
    """A process that knows the tokens [B, R, D] and seeds [B, K, D] as NumPy arrays."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, _start, (images, seeds, iterations))


def _start(images: Any, seeds: Any, iterations: int) -> None:
    global _rounds
    _tasks.extend(zip(images, seeds, strict=True))
    _rounds = iterations


def train() -> None:
    import faiss

    _models.clear()
    for x, init in _tasks:
        model = faiss.Kmeans(
            x.shape[1],
            len(init),
            niter=_rounds,
            min_points_per_centroid=1,
            max_points_per_centroid=10**9,
        )
        model.train(x, init_centroids=init)
        _models.append(model)


def labels() -> list[Any]:
    """Labels [R] of each image under the centroids that train left."""
    return [model.assign(x)[1] for model, (x, _) in zip(_models, _tasks, strict=True)]
