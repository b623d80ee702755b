"""The picture of `vmtc demo`: one photograph rebuilt from its merged tokens and from baselines.

Every token carries the pixels of its patch, so a set of tokens can be looked at: each position of
the photograph is painted with the token that stands for it. Needs the extra ``demo``; nothing of
the core imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from skimage import color
from torch import Tensor

from .config import VMTCConfig
from .merge_tokens import MergedTokens
from .patches import Tokens, join, psnr, resized, split, weighted_psnr
from .select_random import select_random
from .select_strided import select_strided
from .sheet import (
    ACCENT,
    GAP,
    GREY,
    INK,
    MARGIN,
    TEXT,
    WIDTH,
    axes_at,
    blank,
    borders,
    by,
    enlarged,
    fade,
    fitted,
    ruled,
    save,
    show,
    text_width,
    where,
    write,
)
from .spatial_downsample import spatial_downsample


@dataclass(frozen=True)
class Rebuilt:
    """A photograph rebuilt from ``tokens`` tokens, with its PSNR in dB (inf where exact).

    ``weighted``: PSNR of the squared error weighted by the importance of each patch.
    """

    name: str
    tokens: int
    photo: np.ndarray
    psnr: float
    weighted: float


@dataclass(frozen=True)
class Demo:
    """What the picture shows: ``rebuilt[0]`` is VMTC, the others are baselines."""

    photo: np.ndarray
    patch: int
    grid: int
    num_primary: int
    num_merged: int
    metric: str
    source: str
    credit: str
    owner: Tensor  # i32 [N]
    rebuilt: list[Rebuilt]


def make_demo(
    photo: np.ndarray, patch: int, tokens: Tokens, config: VMTCConfig, credit: str
) -> Demo:
    """Spend the same budget by VMTC and by every baseline.

    photo: uint8 ``[S, S, 3]``; tokens: features and importance of its ``(S / patch)^2`` patches.
    """
    x = split(photo, patch)
    grid = photo.shape[0] // patch
    primary, merged = config.counts(x.shape[1])
    budget = primary + merged
    result = config.merge(x, tokens.scores, features=tokens.features)
    weights = tokens.scores[0].double().numpy()

    def rebuilt(name: str, count: int, image: np.ndarray) -> Rebuilt:
        errors = psnr(photo, image), weighted_psnr(photo, image, weights, patch)
        return Rebuilt(name, count, image, *errors)

    def painted(name: str, kept: Tensor, owner: Tensor) -> Rebuilt:
        return rebuilt(name, len(kept), join(kept[owner], grid, patch))

    factor, side = downsampling(grid, budget)
    pooled = spatial_downsample(x, (grid, grid), factor)[0]
    random, strided = select_random(x, budget), select_strided(x, budget)
    return Demo(
        photo=photo,
        patch=patch,
        grid=grid,
        num_primary=primary,
        num_merged=merged,
        metric=config.metric,
        source=tokens.source,
        credit=credit,
        owner=result.owner[0],
        rebuilt=[
            painted("VMTC", result.tokens[0], merged_owner(result, grid)),
            painted("Average pooling", pooled, _cells(grid, factor)),
            painted("Random", random.tokens[0], nearest(random.positions[0], grid)),
            painted("Strided", strided.tokens[0], nearest(strided.positions[0], grid)),
            rebuilt("Smaller photo", side**2, resized(photo, side * patch)),
        ],
    )


def merged_owner(result: MergedTokens, grid: int) -> Tensor:
    """The slot that paints each position [N]; a pruned one takes its nearest kept token."""
    owner = result.owner[0].long()
    kept = (owner >= 0).nonzero()[:, 0]
    return owner[kept][nearest(kept, grid)]


def nearest(positions: Tensor, grid: int) -> Tensor:
    """For each position of the grid, the index of the nearest of ``positions`` [M]."""
    place = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()
    # not through a matrix product, whose rounding would break ties at random
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(place, place[positions.long()], compute_mode=exact).argmin(-1)


def downsampling(grid: int, budget: int) -> tuple[int, int]:
    """The smallest factor that leaves at most ``budget`` tokens, and the side of what it leaves."""
    sides = ((factor, -(-grid // factor)) for factor in range(1, grid + 1))
    return next((factor, side) for factor, side in sides if side**2 <= budget)


def _cells(grid: int, factor: int) -> Tensor:
    """The pooled token of each position [N]."""
    cell = torch.arange(grid) // factor
    return (cell[:, None] * -(-grid // factor) + cell).flatten()


# the sheet, in pixels of the written PNG
_HEIGHT, _PANEL = 1570, 448
_ROWS = (232, 896)


def draw(demo: Demo, out: Path) -> None:
    """Write the picture as a PNG of 2000 x 1570 pixels."""
    save(sheet(demo), out)


def sheet(demo: Demo) -> Figure:
    """The picture: what VMTC does in the upper row, every baseline in the lower."""
    figure = blank(_HEIGHT)
    tokens, redundant = demo.grid**2, demo.grid**2 - demo.num_primary
    title = f"{tokens} visual tokens become {demo.num_primary + demo.num_merged}"
    write(figure, MARGIN, 88, title, 52, weight="bold")
    write(figure, MARGIN, 138, _summary(demo), 29, color=GREY)
    patches = f"{by(demo.grid)} patches of {by(demo.patch)} pixels"
    _photo_panel(demo, _panel(figure, 0, 0, "Photograph", f"{tokens} tokens", patches))
    kept = "the most important, kept bit for bit"
    axes = _panel(figure, 0, 1, "Primary", f"{demo.num_primary} tokens", kept)
    fade(axes, demo.photo, _primary(demo))
    merged = f"{redundant} → {demo.num_merged} tokens"
    colours = "one colour for each merged token"
    _cluster_panel(demo, _panel(figure, 0, 2, "Clusters", merged, colours))
    write(figure, MARGIN, _ROWS[1] - 72, "The same budget spent otherwise", 38, weight="bold")
    for place, rebuilt in zip(((0, 3), (1, 0), (1, 1), (1, 2), (1, 3)), demo.rebuilt, strict=True):
        _rebuilt_panel(demo, rebuilt, figure, *place)
    for line, text in enumerate(_caption(demo)):
        write(figure, MARGIN, _HEIGHT - 124 + 38 * line, text, 25, color=GREY)
    return figure


def _summary(demo: Demo) -> str:
    redundant = demo.grid**2 - demo.num_primary
    kept = f"{demo.num_primary} primary tokens stay as they are; the other {redundant}"
    if demo.num_merged == 0:
        return f"{kept} are dropped, and shown as their nearest primary token."
    clustered = kept if demo.num_primary else f"All {redundant} tokens"
    return f"{clustered} are clustered by {demo.metric} distance and merged into {demo.num_merged}."


def _caption(demo: Demo) -> list[str]:
    factor, side = downsampling(demo.grid, demo.num_primary + demo.num_merged)
    smaller = by(side * demo.patch)
    what = "Features and importance: "
    room = WIDTH - 2 * MARGIN - text_width(f"{what}. {demo.credit}", TEXT)
    return [
        "Every position shows the pixels of the token that stands for it. Average pooling takes"
        f" {by(factor)} tokens; smaller photo is resized to {smaller} pixels first.",
        "PSNR over all pixels, and weighted by the importance that VMTC selects by; the best is"
        " green. Pixel error does not tell how well a model answers.",
        f"{what}{fitted(demo.source, room)}. {demo.credit}",
    ]


def _panel(figure: Figure, row: int, column: int, title: str, count: str, below: str = "") -> Axes:
    """Axes with a title, a token count to the right of it, and a line below."""
    left, top = MARGIN + column * (_PANEL + GAP), _ROWS[row]
    emphasis = ACCENT if title == "VMTC" else INK
    write(figure, left, top - 14, title, 31, weight="bold", color=emphasis)
    write(figure, left + _PANEL, top - 14, count, 27, color=GREY, ha="right")
    write(figure, left, top + _PANEL + 36, below, 25, color=GREY)
    return axes_at(figure, left, top, _PANEL, _PANEL)


def _rebuilt_panel(demo: Demo, rebuilt: Rebuilt, figure: Figure, row: int, column: int) -> None:
    axes = _panel(figure, row, column, rebuilt.name, f"{rebuilt.tokens} tokens")
    show(axes, rebuilt.photo, demo.grid)
    left, y = MARGIN + column * (_PANEL + GAP), _ROWS[row] + _PANEL + 36
    for measure, x, align in (("psnr", left, "left"), ("weighted", left + _PANEL, "right")):
        value = getattr(rebuilt, measure)
        best = value == max(getattr(each, measure) for each in demo.rebuilt)
        # bold letters are wider: a size smaller, the two still fit side by side
        size, style = (23, {"weight": "bold", "color": ACCENT}) if best else (25, {"color": GREY})
        label = "PSNR" if measure == "psnr" else "weighted"
        write(figure, x, y, f"{label} {decibels(value)}", size, ha=align, **style)


def _photo_panel(demo: Demo, axes: Axes) -> None:
    show(axes, demo.photo, demo.grid)
    ruled(axes, demo.grid)


def _cluster_panel(demo: Demo, axes: Axes) -> None:
    kept = _primary(demo)
    slot = demo.owner.numpy().reshape(demo.grid, demo.grid)
    colours = np.vstack([palette(demo.num_merged), np.full((1, 3), 255)])  # the last for pruned
    cluster = np.where(kept | (slot < 0), demo.num_merged, slot - demo.num_primary)
    painted = enlarged(colours[cluster], len(demo.photo))
    show(axes, where(kept, demo.photo, painted), demo.grid)
    borders(axes, np.where(kept, -2, slot), "white", 0.5)


def _primary(demo: Demo) -> np.ndarray:
    owner = demo.owner.numpy().reshape(demo.grid, demo.grid)
    return (owner >= 0) & (owner < demo.num_primary)


def palette(count: int) -> np.ndarray:
    """Colours [count, 3] easy to tell apart: each the farthest in Lab from those before."""
    levels = np.linspace(0, 1, 11)
    candidates = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    lab = color.rgb2lab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    readable = (lab[:, 0] > 38) & (lab[:, 0] < 90) & (chroma > 12) & (chroma < 68)
    candidates, lab = candidates[readable], lab[readable]
    chosen = [int(chroma[readable].argmax())]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return candidates[chosen[:count]] * 255


def decibels(value: float) -> str:
    return "exact" if np.isinf(value) else f"{value:.1f} dB"
