"""K-means of gathered tokens by other packages, each called at its best."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import alone, packages
from .case import CLUSTERS, Provider, Verdict
from .clustering import Task, seed_ranks
from .packages import load

ON_A_CPU = "it works on a CPU"
EUCLIDEAN = "it knows euclidean distances alone"


def rivals(task: Task) -> list[Provider]:
    return [
        _faiss(task),
        _sklearn(task),
        _fast_pytorch_kmeans(task),
        *(_package(task, package) for package in packages.packages()),
        _flash_kernels(task),
        _flash_kmeans(task),
    ]


def _elsewhere(task: Task) -> str | None:
    if task.machine.gpu:
        return ON_A_CPU
    return None if task.metric == "euclidean" else EUCLIDEAN


def _on_a_gpu(task: Task) -> str | None:
    return "its kernels need a GPU" if task.machine.device == "cpu" else None


def _faiss(task: Task) -> Provider:
    _, missing = load("faiss", "faiss-cpu", _elsewhere(task))

    @cache
    def process() -> Any:
        """A process starts with its first call."""
        x = task.sets.first
        return alone.process(x.numpy(), task.seeds(x).numpy(), task.iterations)

    def run(_: Tensor) -> None:
        process().submit(alone.train).result()

    # training ends with centroids: their labels are the gate's business and not timed
    def verify(_: None) -> Verdict:
        labels = [torch.from_numpy(image) for image in process().submit(alone.labels).result()]
        return task.judge_rival(torch.stack(labels))

    return task.provider("faiss", run, verify=verify, missing=missing, traced=False)


def _sklearn(task: Task) -> Provider:
    cluster, missing = load("sklearn.cluster", "scikit-learn", _elsewhere(task))

    @cache
    def arrays() -> list[tuple[Any, Any]]:
        x = task.sets.first
        return list(zip(x.numpy(), task.seeds(x).numpy(), strict=True))

    def run(_: Tensor) -> list[Any]:
        return [
            cluster.KMeans(task.clusters, init=init, n_init=1, max_iter=task.iterations, tol=0).fit(
                x
            )
            for x, init in arrays()
        ]

    def verify(models: list[Any]) -> Verdict:
        labels = torch.stack([torch.from_numpy(model.labels_) for model in models])
        return task.judge_rival(labels)

    return task.provider("scikit-learn", run, verify=verify, missing=missing, traced=False)


def _package(task: Task, package: packages.Package) -> Provider:
    @cache
    def prepared() -> packages.Labels:
        x = task.sets.first
        return package.prepare(x, seed_ranks(x, task.clusters), task.iterations)

    return task.provider(
        package.name,
        lambda _: prepared()(),
        scope=f"{CLUSTERS}, {package.note}",
        missing=_elsewhere(task) or package.missing,
        # numpy has memory of its own
        traced=False,
    )


def _fast_pytorch_kmeans(task: Task) -> Provider:
    missing = None if task.metric == "euclidean" else "its cosine means are of another objective"
    if task.dtype == torch.bfloat16:
        missing = "it takes no bfloat16"
    module, missing = load("fast_pytorch_kmeans", "fast-pytorch-kmeans", missing)

    def run(x: Tensor) -> Any:
        model = module.MultiKMeans(task.clusters, max_iter=task.iterations, tol=-1)
        model.fit_predict(x, centroids=task.seeds(x))
        return model

    # the labels that it returns are older than its centroids
    def verify(model: Any) -> Verdict:
        return task.judge_rival(model.predict(task.sets.first))

    return task.provider("fast-pytorch-kmeans", run, verify=verify, missing=missing, launch="eager")


def _flash_kernels(task: Task) -> Provider:
    """flash-kmeans' own kernels without its loop, which asks the host in every round."""
    missing = _on_a_gpu(task)
    if task.metric != "euclidean":
        missing = "only its euclidean kernels are called by themselves"
    assign, missing = load("flash_kmeans.assign_euclid_triton", "flash-kmeans", missing)
    update, missing = load("flash_kmeans.centroid_update_triton", "flash-kmeans", missing)

    def labels(x: Tensor) -> Tensor:
        # its own loop keeps the norms in the dtype of x, and loses near duplicates
        norms = x.float().square().sum(-1)
        centroids = task.seeds(x)
        for _ in range(task.iterations):
            found = assign.euclid_assign_triton(x, centroids, norms)
            centroids = update.triton_centroid_update_sorted_euclid(x, found, centroids)
        return assign.euclid_assign_triton(x, centroids, norms)

    return task.provider("flash-kmeans' kernels, graph", labels, missing=missing)


def _flash_kmeans(task: Task) -> Provider:
    missing = _on_a_gpu(task)
    # from the package itself one may get plain torch instead, without a word
    module, missing = load("flash_kmeans.kmeans_triton_impl", "flash-kmeans", missing)
    kernels, missing = load("flash_kmeans.assign_euclid_triton", "flash-kmeans", missing)
    cosine = task.metric == "cosine"

    def run(x: Tensor) -> Tensor:
        function = module.batch_kmeans_Cosine if cosine else module.batch_kmeans_Euclid
        _, centroids, _ = function(
            x, task.clusters, max_iters=task.iterations, tol=-1.0, init_centroids=task.seeds(x)
        )
        return centroids

    # the labels that it returns are older than its centroids
    def verify(centroids: Tensor) -> Verdict:
        x = task.sets.first
        if cosine:
            f = torch.nn.functional.normalize(x, dim=-1)
            labels = kernels.cosine_assign_triton(f, centroids)
        else:
            labels = kernels.euclid_assign_triton(x, centroids, x.float().square().sum(-1))
        return task.judge_rival(labels)

    return task.provider(
        "flash-kmeans, eager",
        run,
        verify=verify,
        missing=missing,
        launch="eager",
        slow="its cosine kernel tries 162 tiles" if cosine and task.shape[2] > 512 else None,
    )
