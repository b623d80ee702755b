"""The picture of `vmtc demo`: one photograph rebuilt from its merged tokens and from baselines.

Every token carries the pixels of its patch, so a set of tokens can be looked at: each position of
the photograph is painted with the token that stands for it. Needs the extra ``demo``; nothing of
the core imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from skimage import color
from torch import Tensor

from .config import VMTCConfig
from .merge_tokens import MergedTokens
from .patches import InputError, Tokens, join, psnr, resized, split, weighted_psnr
from .select_random import select_random
from .select_strided import select_strided
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
_WIDTH, _HEIGHT, _DPI = 2000, 1570, 200
_MARGIN, _GAP, _PANEL = 56, 32, 448
_ROWS = (232, 896)
_TIMES = "\N{MULTIPLICATION SIGN}"
_INK, _GREY, _ACCENT = "#1b1f24", "#5f6b7a", "#0a7a55"


def draw(demo: Demo, out: Path) -> None:
    """Write the picture as a PNG of 2000 x 1570 pixels."""
    try:
        sheet(demo).savefig(out, format="png")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error


def sheet(demo: Demo) -> Figure:
    """The picture: what VMTC does in the upper row, every baseline in the lower."""
    figure = Figure(figsize=(_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI, facecolor="white")
    tokens, redundant = demo.grid**2, demo.grid**2 - demo.num_primary
    title = f"{tokens} visual tokens become {demo.num_primary + demo.num_merged}"
    _text(figure, _MARGIN, 88, title, 52, weight="bold")
    _text(figure, _MARGIN, 138, _summary(demo), 29, color=_GREY)
    patches = f"{_by(demo.grid)} patches of {_by(demo.patch)} pixels"
    _photo_panel(demo, _panel(figure, 0, 0, "Photograph", f"{tokens} tokens", patches))
    kept = "the most important, kept bit for bit"
    _primary_panel(demo, _panel(figure, 0, 1, "Primary", f"{demo.num_primary} tokens", kept))
    merged = f"{redundant} → {demo.num_merged} tokens"
    colours = "one colour for each merged token"
    _cluster_panel(demo, _panel(figure, 0, 2, "Clusters", merged, colours))
    _text(figure, _MARGIN, _ROWS[1] - 72, "The same budget spent otherwise", 38, weight="bold")
    for place, rebuilt in zip(((0, 3), (1, 0), (1, 1), (1, 2), (1, 3)), demo.rebuilt, strict=True):
        _rebuilt_panel(demo, rebuilt, figure, *place)
    for line, text in enumerate(_caption(demo)):
        _text(figure, _MARGIN, _HEIGHT - 124 + 38 * line, text, 25, color=_GREY)
    return figure


def _by(side: int) -> str:
    return f"{side} {_TIMES} {side}"


def _summary(demo: Demo) -> str:
    redundant = demo.grid**2 - demo.num_primary
    kept = f"{demo.num_primary} primary tokens stay as they are; the other {redundant}"
    if demo.num_merged == 0:
        return f"{kept} are dropped, and shown as their nearest primary token."
    clustered = kept if demo.num_primary else f"All {redundant} tokens"
    return f"{clustered} are clustered by {demo.metric} distance and merged into {demo.num_merged}."


def _caption(demo: Demo) -> list[str]:
    factor, side = downsampling(demo.grid, demo.num_primary + demo.num_merged)
    smaller = _by(side * demo.patch)
    return [
        "Every position shows the pixels of the token that stands for it. Average pooling takes"
        f" {_by(factor)} tokens; smaller photo is resized to {smaller} pixels first.",
        "PSNR over all pixels, and weighted by the importance that VMTC selects by; the best is"
        " green. Pixel error does not tell how well a model answers.",
        f"Features and importance: {demo.source}. {demo.credit}",
    ]


def _text(figure: Figure, x: float, y: float, text: str, size: float, **style: Any) -> None:
    """Text whose baseline starts at pixel (x, y) from the upper left corner."""
    style.setdefault("color", _INK)
    figure.text(x / _WIDTH, 1 - y / _HEIGHT, text, fontsize=size * 72 / _DPI, **style)


def _panel(figure: Figure, row: int, column: int, title: str, count: str, below: str = "") -> Axes:
    """Axes with a title, a token count to the right of it, and a line below."""
    left, top = _MARGIN + column * (_PANEL + _GAP), _ROWS[row]
    emphasis = _ACCENT if title == "VMTC" else _INK
    _text(figure, left, top - 14, title, 31, weight="bold", color=emphasis)
    _text(figure, left + _PANEL, top - 14, count, 27, color=_GREY, ha="right")
    _text(figure, left, top + _PANEL + 36, below, 25, color=_GREY)
    bottom = 1 - (top + _PANEL) / _HEIGHT
    axes = figure.add_axes((left / _WIDTH, bottom, _PANEL / _WIDTH, _PANEL / _HEIGHT))
    axes.set_axis_off()
    return axes


def _rebuilt_panel(demo: Demo, rebuilt: Rebuilt, figure: Figure, row: int, column: int) -> None:
    axes = _panel(figure, row, column, rebuilt.name, f"{rebuilt.tokens} tokens")
    _show(axes, rebuilt.photo, demo.grid)
    left, y = _MARGIN + column * (_PANEL + _GAP), _ROWS[row] + _PANEL + 36
    for measure, x, align in (("psnr", left, "left"), ("weighted", left + _PANEL, "right")):
        value = getattr(rebuilt, measure)
        best = value == max(getattr(each, measure) for each in demo.rebuilt)
        # bold letters are wider: a size smaller, the two still fit side by side
        size, style = (23, {"weight": "bold", "color": _ACCENT}) if best else (25, {"color": _GREY})
        label = "PSNR" if measure == "psnr" else "weighted"
        _text(figure, x, y, f"{label} {decibels(value)}", size, ha=align, **style)


def _show(axes: Axes, image: np.ndarray, grid: int) -> None:
    axes.imshow(image, extent=(0, grid, grid, 0), interpolation="bicubic")


def _photo_panel(demo: Demo, axes: Axes) -> None:
    _show(axes, demo.photo, demo.grid)
    lines = range(1, demo.grid)
    axes.vlines(lines, 0, demo.grid, color="white", alpha=0.35, linewidth=0.35)
    axes.hlines(lines, 0, demo.grid, color="white", alpha=0.35, linewidth=0.35)


def _primary_panel(demo: Demo, axes: Axes) -> None:
    kept = _primary(demo)
    faded = 255 - (255 - color.rgb2gray(demo.photo)[..., None] * 255) * 0.22
    _show(axes, _where(demo, kept, demo.photo, faded), demo.grid)
    _borders(axes, kept, _INK, 0.7)


def _cluster_panel(demo: Demo, axes: Axes) -> None:
    kept = _primary(demo)
    slot = demo.owner.numpy().reshape(demo.grid, demo.grid)
    colours = np.vstack([palette(demo.num_merged), np.full((1, 3), 255)])  # the last for pruned
    cluster = np.where(kept | (slot < 0), demo.num_merged, slot - demo.num_primary)
    painted = np.kron(colours[cluster], np.ones((demo.patch, demo.patch, 1)))
    _show(axes, _where(demo, kept, demo.photo, painted), demo.grid)
    _borders(axes, np.where(kept, -2, slot), "white", 0.5)


def _primary(demo: Demo) -> np.ndarray:
    owner = demo.owner.numpy().reshape(demo.grid, demo.grid)
    return (owner >= 0) & (owner < demo.num_primary)


def _where(demo: Demo, kept: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Pixels of ``inside`` in the patches where ``kept``, of ``outside`` elsewhere."""
    mask = np.kron(kept, np.ones((demo.patch, demo.patch))).astype(bool)
    return np.where(mask[..., None], inside, outside).astype(np.uint8)


def _borders(axes: Axes, labels: np.ndarray, colour: str, width: float) -> None:
    """A line between every two neighbouring patches of different label."""
    rows, columns = np.nonzero(labels[1:] != labels[:-1])
    lines = [((c, r + 1), (c + 1, r + 1)) for r, c in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(labels[:, 1:] != labels[:, :-1])
    lines += [((c + 1, r), (c + 1, r + 1)) for r, c in zip(rows, columns, strict=True)]
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width))


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
