"""The operators once more, written from their definition in NumPy and float64, one image at a time.

Nothing here calls the package. The clustering also keeps account of near ties: places where two
distances are so close that float32 may order them either way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

EPSILON = float(np.finfo(np.float32).eps)


def near_tie(a: np.ndarray, b: np.ndarray, length: float, metric: str) -> np.ndarray:
    """Whether float32 may order distances a and b either way.

    They differ by less than a millionth of their sum, or by less than what moves them when a
    centroid of about ``length`` moves by two roundings; a cosine distance is 1 less a product of
    unit vectors and carries an absolute error instead.
    """
    with np.errstate(invalid="ignore"):
        moved = 2 * EPSILON * length * (np.sqrt(np.abs(a)) + np.sqrt(np.abs(b)))
        absolute = moved if metric == "euclidean" else 16 * EPSILON
        # two infinite distances tie exactly, whatever the precision
        return np.isfinite(a + b) & (np.abs(a - b) <= 1e-6 * np.abs(a + b) + absolute)


@dataclass
class Clustering:
    """kmeans of one image: labels [N], -1 where not valid; centroids [K, D]; sizes [K].

    used [K, D]: the centroids that the last assignment compared. clear: no near tie was met.
    """

    labels: np.ndarray
    centroids: np.ndarray
    sizes: np.ndarray
    features: np.ndarray
    finite: np.ndarray
    used: np.ndarray
    metric: str
    clear: bool

    @property
    def length(self) -> float:
        return float(np.sqrt((self.features**2).sum(-1).max(initial=0)))

    @property
    def rounding(self) -> float:
        """What float32 may add to the objective where the distances are nothing but rounding."""
        unit = self.length * EPSILON
        return len(self.labels) * (16 * EPSILON if self.metric == "cosine" else 16 * unit**2)

    def objective(self, labels: np.ndarray) -> float:
        """The sum of the distances of the finite tokens to the means of their clusters."""
        keep = self.finite & (labels >= 0)
        f, labels = self.features[keep], labels[keep]
        centroids = _means(f, np.ones(len(f), bool), labels, len(self.sizes))
        each = _distances(f, centroids, self.metric)
        return float(each[np.arange(len(f)), labels].sum())

    def near_ties(self, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Whether these tokens were at a near tie between these labels and the oracle's."""
        each = _distances(self.features[tokens], self.used, self.metric)
        row = np.arange(len(tokens))
        a, b = each[row, labels], each[row, self.labels[tokens]]
        return near_tie(a, b, self.length, self.metric)


def kmeans(
    x: np.ndarray,  # [N, D]
    num_clusters: int,
    iterations: int = 10,
    metric: str = "cosine",
    valid: np.ndarray | None = None,  # bool [N]
    exact_start: bool = False,
) -> Clustering:
    """exact_start: the distances to the seeds are exact in float32, ties among them are no matter
    of rounding."""
    position = np.arange(len(x)) if valid is None else np.flatnonzero(valid)
    with np.errstate(invalid="ignore", over="ignore"):
        finite = np.isfinite((x.astype(np.float32) ** 2).sum(-1))
    features = np.where(finite[:, None], np.nan_to_num(x), 0.0)
    if metric == "cosine":
        for row in features:
            norm = math.sqrt(math.fsum(row * row))
            row /= norm or 1.0

    f, good, R, K = features[position], finite[position], len(position), num_clusters
    centroids = np.zeros((K, x.shape[1]))
    labels, clear, used = np.zeros(R, int), True, centroids
    if R:
        used = np.stack([f[(2 * k + 1) * R // (2 * K)] for k in range(K)])
        labels, clear = _assign(f, good, used, metric)
        clear = clear or exact_start
        for _ in range(iterations):
            used, former = _means(f, good, labels, K), labels
            labels, unambiguous = _assign(f, good, used, metric)
            clear = clear and unambiguous
            if (labels == former).all():
                break
        centroids = _means(f, good, labels, K)
    everyone = np.full(len(x), -1)
    everyone[position] = labels
    sizes = np.array([(labels == k).sum() for k in range(K)])
    return Clustering(everyone, centroids, sizes, features, finite, used, metric, clear)


def _distances(f: np.ndarray, centroids: np.ndarray, metric: str) -> np.ndarray:
    if metric == "euclidean":
        return np.stack([((f - c) ** 2).sum(-1) for c in centroids], -1)
    out = np.ones((len(f), len(centroids)))
    for k, c in enumerate(centroids):
        if c.any():
            out[:, k] = 1 - (f * c).sum(-1) / math.sqrt((c * c).sum())
    return out


def _means(f: np.ndarray, good: np.ndarray, labels: np.ndarray, K: int) -> np.ndarray:
    rows = [f[good & (labels == k)] for k in range(K)]
    return np.stack([row.mean(0) if len(row) else np.zeros(f.shape[1]) for row in rows])


def _assign(
    f: np.ndarray, good: np.ndarray, centroids: np.ndarray, metric: str
) -> tuple[np.ndarray, bool]:
    """Labels after repair, and whether no choice was at a near tie."""
    length = float(np.sqrt((f**2).sum(-1).max()))
    each = _distances(f, centroids, metric)
    each[~good] = np.inf
    labels = each.argmin(-1)
    own = each.min(-1)
    others = each.copy()
    others[np.arange(len(f)), labels] = np.inf
    clear = not near_tie(own, others.min(-1), length, metric).any()
    for k in range(len(centroids)):
        sizes = np.bincount(labels, minlength=len(centroids))
        movable = np.flatnonzero(sizes[labels] >= 2)
        if sizes[k] == 0 and len(movable):
            chosen = movable[np.argmax(own[movable])]
            rivals = movable[movable != chosen]
            clear = clear and not near_tie(own[chosen], own[rivals], length, metric).any()
            labels[chosen] = k
    return labels, clear


def primary_positions(scores: np.ndarray, count: int, valid: np.ndarray | None) -> list[int]:
    """The positions of the ``count`` highest scores, ascending."""
    position = range(len(scores)) if valid is None else np.flatnonzero(valid).tolist()
    value = np.where(np.isnan(scores), -np.inf, scores)
    return sorted(sorted(position, key=lambda i: (-value[i], i))[:count])


def merged(
    x: np.ndarray,
    scores: np.ndarray,
    owner: np.ndarray,
    num_primary: int,
    slots: int,
    weighting: str,
) -> np.ndarray:
    """Tokens [slots, D] of one image, given which slot owns each token."""
    out = np.zeros((slots, x.shape[1]))
    for slot in range(slots):
        members = np.flatnonzero(owner == slot)
        if len(members) == 0:
            continue
        weight = np.ones(len(members))
        if slot >= num_primary and weighting == "score":
            positive = np.where(scores[members] > 0, scores[members], 0.0)
            weight = positive if positive.sum() > 0 else weight
        with np.errstate(invalid="ignore"):
            out[slot] = (weight[:, None] * x[members]).sum(0) / weight.sum()
    return out


def token_importance(
    q: np.ndarray, k: np.ndarray, cls_index: int | None, scale: float | None
) -> np.ndarray:
    """[N] of one image, q and k [H, N, d]."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    received = []
    for queries, keys in zip(q, k, strict=True):
        logits = scale * np.einsum("id,jd->ij", queries, keys)
        attention = np.exp(logits - logits.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        received.append(attention.mean(0) if cls_index is None else attention[cls_index])
    return np.mean(received, 0)


def spatial_downsample(x: np.ndarray, grid: tuple[int, int], factor: int) -> np.ndarray:
    """[cells, D] of one image [gh*gw, D]."""
    image = x.reshape(*grid, x.shape[-1])
    cells = [
        image[r : r + factor, c : c + factor].mean((0, 1))
        for r in range(0, grid[0], factor)
        for c in range(0, grid[1], factor)
    ]
    return np.stack(cells)
