"""Focus attention from its definition, in NumPy and float64, one sequence at a time.

Nothing here calls the package. Shapes: q [H, Lq, d], k [G, L, d], v [G, L, dv], modality [L],
position [Lq], state [M, L_max, I], bits [M, Lq, I].
"""

from __future__ import annotations

import math

import numpy as np

TEXT, IMAGE = 1, 2


def kind(modality: np.ndarray, p: int) -> int:
    return int(modality[p]) if 0 <= p < len(modality) and modality[p] in (TEXT, IMAGE) else 0


def images(modality: np.ndarray) -> list[int]:
    return [j for j in range(len(modality)) if modality[j] == IMAGE]


def visible(modality: np.ndarray, p: int) -> list[int]:
    """The keys that a query at position p sees."""
    return [j for j in range(p + 1) if kind(modality, j)] if kind(modality, p) else []


def weights(
    q: np.ndarray,
    k: np.ndarray,
    modality: np.ndarray,
    position: np.ndarray,
    scale: float | None,
    factor: np.ndarray | None = None,  # [H, Lq, L], of the unnormalised weights
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised weights [H, Lq, L] and the logarithm of their sum [H, Lq]."""
    H, Lq, d = q.shape
    scale = d**-0.5 if scale is None else scale
    out = np.zeros((H, Lq, len(modality)))
    lse = np.full((H, Lq), -np.inf)
    for h in range(H):
        keys = k[h // (H // len(k))]
        for i, p in enumerate(position):
            seen = visible(modality, p)
            if factor is not None:
                seen = [j for j in seen if factor[h, i, j] > 0]
            if not seen:
                continue
            logits = scale * keys[seen] @ q[h, i]
            if factor is not None:
                logits = logits + np.log(factor[h, i, seen])
            top = logits.max()
            each = np.exp(logits - top)
            out[h, i, seen] = each / each.sum()
            lse[h, i] = top + math.log(each.sum())
    return out, lse


def scores(
    q: np.ndarray,
    k: np.ndarray,
    modality: np.ndarray,
    num_image: int,
    position: np.ndarray,
    state: np.ndarray,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    scale: float | None = None,
) -> np.ndarray:
    """[M, Lq, I]; the rows of this call are written into state."""
    attention, _ = weights(q, k, modality, position, scale)
    if head_mode == "mean":
        attention = attention.mean(0, keepdims=True)
    places = images(modality)[:num_image]
    out = np.zeros((len(attention), len(position), num_image))
    text = [i for i, p in enumerate(position) if kind(modality, p) == TEXT]
    for a, rows in zip(attention, state, strict=True):
        for i in text:
            rows[position[i]] = 0
            rows[position[i], : len(places)] = a[i, places]
    for m, (a, rows) in enumerate(zip(attention, state, strict=True)):
        for i in text:
            seen = [j for j in visible(modality, position[i]) if modality[j] == TEXT]
            to_text = a[i, seen]
            if renormalize:
                to_text = to_text / (to_text.sum() or 1.0)
            out[m, i] = to_text @ rows[seen]
            if aggregate == "residual":
                out[m, i] += rows[position[i]]
    return out


def seen_images(modality: np.ndarray, p: int, num_image: int) -> int:
    """How many image tokens with a score a text query at p sees; none if it is no text."""
    if kind(modality, p) != TEXT:
        return 0
    return sum(j <= p for j in images(modality)[:num_image])


def inhibited(
    of: np.ndarray,  # [M, Lq, I]
    modality: np.ndarray,
    position: np.ndarray,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    min_keep: int = 1,
) -> np.ndarray:
    """bool [M, Lq, I]."""
    out = np.zeros(of.shape, bool)
    for m, i in np.ndindex(of.shape[:2]):
        count = seen_images(modality, position[i], of.shape[2])
        row = np.where(np.isnan(of[m, i, :count]), -np.inf, of[m, i, :count])
        order = sorted(range(count), key=lambda r: (-row[r], r))
        if keep_ratio is not None:
            out[m, i, order[max(min_keep, math.ceil(keep_ratio * count)) :]] = True
        elif count:
            with np.errstate(invalid="ignore"):
                limit = np.float32(threshold) * np.float32(row.max())
            below = [r for r in order[min_keep:] if np.float32(row[r]) < limit]
            out[m, i, below] = True
    return out


def at_the_cut(
    of: np.ndarray,
    modality: np.ndarray,
    position: np.ndarray,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    min_keep: int = 1,
    tolerance: float = 1e-5,
) -> np.ndarray:
    """bool [M, Lq, I]: pairs that rounding may put on either side of the cut."""
    out = np.zeros(of.shape, bool)
    for m, i in np.ndindex(of.shape[:2]):
        count = seen_images(modality, position[i], of.shape[2])
        row = of[m, i, :count]
        order = np.sort(row)[::-1]
        keep, cuts = min_keep, []
        if keep_ratio is not None:
            keep = max(min_keep, math.ceil(keep_ratio * count))
        elif count:
            cuts.append(threshold * order[0])
        # zeros tie exactly, whatever the precision
        ends = order[keep - 1 : keep + 1]
        if len(ends) == 2 and ends[0] > 0 and ends[0] - ends[1] <= tolerance * order[0]:
            cuts.append(ends[1])
        for cut in cuts:
            out[m, i, :count] |= np.abs(row - cut) <= tolerance * abs(order[0])
    return out


def factors(bits: np.ndarray, modality: np.ndarray, heads: int, suppression: float) -> np.ndarray:
    """[H, Lq, L]: what each weight is multiplied by."""
    out = np.ones((heads, bits.shape[1], len(modality)))
    for r, j in enumerate(images(modality)[: bits.shape[2]]):
        each = np.where(bits[:, :, r], suppression, 1.0)
        out[:, :, j] = each if len(bits) == heads else each[0]
    return out


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    modality: np.ndarray,
    bits: np.ndarray,
    position: np.ndarray,
    suppression: float = 0.0,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """out [H, Lq, dv] and lse [H, Lq]."""
    factor = factors(bits, modality, len(q), suppression)
    each, lse = weights(q, k, modality, position, scale, factor)
    seen = sorted({j for p in position for j in visible(modality, p)})
    share = len(q) // len(v)
    out = [a[:, seen] @ v[h // share][seen] for h, a in enumerate(each)]
    return np.stack(out), lse
