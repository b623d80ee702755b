"""A photograph as visual tokens without weights: crop, patches, descriptors, saliency; its PSNR.

Needs the extra ``demo``; nothing of the core imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from skimage import color, data, feature, filters, measure, metrics
from torch import Tensor

# what CLIP ViT-L/14-336 sees: 24 x 24 patches of 14 x 14 pixels
CLIP_SIZE, CLIP_PATCH = 336, 14

# length of the coordinate that all descriptors share, beside colours of mean square 1
_COMMON = 2.0
_TEXTURE_WEIGHT = 0.2
_ORIENTATIONS = 8
# width of the centre prior in half sides of the photograph
_CENTRE = 1.2


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line for the terminal."""


class Tokens(NamedTuple):
    """features: f32 [1, N, D], to be clustered; scores: f32 [1, N]; source: what made them."""

    features: Tensor
    scores: Tensor
    source: str


def load_photo(path: Path | None, size: int = CLIP_SIZE) -> np.ndarray:
    """The central square of a photograph, resized as CLIP does: uint8 ``[size, size, 3]``.

    path: any file that Pillow reads, turned as its EXIF says, transparency over white; None for
    scikit-image's ``rocket`` (SpaceX, public domain), which ships inside that package. Its plain
    sky merges well: busy photographs rebuild worse.
    """
    image = Image.fromarray(data.rocket()) if path is None else _open(path)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # cropping first keeps a very long picture from growing before it shrinks
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _open(path: Path) -> Image.Image:
    if not path.exists():
        raise InputError(f"no such image: {path}")
    try:
        with Image.open(path) as file:
            return _to_rgb(ImageOps.exif_transpose(file))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path} as an image: {str(error).splitlines()[0]}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # 16-bit and float greyscale, which Pillow would cut off at 255: stretched to full contrast
        values = np.asarray(image, dtype=np.float64)
        span = max(float(np.ptp(values)), 1e-12)
        image = Image.fromarray(np.uint8(np.rint((values - values.min()) / span * 255)))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def split(photo: np.ndarray, patch: int) -> Tensor:
    """Patches in row-major order, pixels as numbers 0 to 255: f32 ``[1, N, patch*patch*3]``."""
    rows, columns = (side // patch for side in photo.shape[:2])
    tiles = torch.tensor(photo).view(rows, patch, columns, patch, 3).transpose(1, 2)
    return tiles.reshape(1, rows * columns, -1).float()


def join(patches: Tensor, grid: int, patch: int) -> np.ndarray:
    """The photograph of patches ``[N, patch*patch*3]``, inverse of `split`: uint8."""
    tiles = patches.view(grid, grid, patch, patch, 3).transpose(1, 2)
    return tiles.reshape(grid * patch, grid * patch, 3).round().clamp(0, 255).byte().numpy()


def resized(photo: np.ndarray, side: int) -> np.ndarray:
    """The photograph through ``side`` x ``side`` pixels and back, bicubic both ways."""
    image = Image.fromarray(photo)
    for size in (side, photo.shape[0]):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def psnr(photo: np.ndarray, image: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels; inf where they are equal."""
    with np.errstate(divide="ignore"):
        return float(metrics.peak_signal_noise_ratio(photo, image))


def weighted_psnr(photo: np.ndarray, image: np.ndarray, weights: np.ndarray, patch: int) -> float:
    """PSNR in dB of the mean of the patches' squared errors, weighted by ``weights`` [N]."""
    pairs = zip(split(photo, patch)[0].numpy(), split(image, patch)[0].numpy(), strict=True)
    errors = [metrics.mean_squared_error(*pair) for pair in pairs]
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(255**2 / np.average(errors, weights=weights)))


def photo_tokens(photo: np.ndarray, patch: int = CLIP_PATCH) -> Tokens:
    """Features and importance of each patch from pixels alone; see `describe`, `saliency`."""
    features, scores = (
        torch.tensor(values, dtype=torch.float32)[None]
        for values in (describe(photo, patch), saliency(photo, patch))
    )
    return Tokens(features, scores, "patch descriptors and saliency (no weights)")


def describe(photo: np.ndarray, patch: int = CLIP_PATCH) -> np.ndarray:
    """A descriptor of each patch that stands in for its encoder token: ``[N, 21]``.

    The Lab colours of its four quarters and a histogram of gradient orientations (HOG), each group
    centred over the photograph, and one coordinate that all patches share: as the tokens of a
    trained encoder point roughly the same way, cosine distance then sees how far two patches are
    apart and not only in which direction they differ from the mean.
    """
    lab = color.rgb2lab(photo)
    rows, columns = (side // patch for side in photo.shape[:2])
    quarters = measure.block_reduce(lab, (patch // 2, patch // 2, 1), np.mean)
    quarters = quarters.reshape(rows, 2, columns, 2, 3).swapaxes(1, 2)
    texture = feature.hog(
        photo,
        orientations=_ORIENTATIONS,
        pixels_per_cell=(patch, patch),
        cells_per_block=(1, 1),
        block_norm="L2",
        feature_vector=False,
        channel_axis=-1,
    )
    tokens = rows * columns
    groups = [
        np.full((tokens, 1), _COMMON),
        _centred(quarters.reshape(tokens, -1)),
        _TEXTURE_WEIGHT * _centred(texture.reshape(tokens, -1)),
    ]
    return np.concatenate(groups, axis=1)


def _centred(group: np.ndarray) -> np.ndarray:
    """Zero mean over the patches, and squared norm 1 on average."""
    group = group - group.mean(axis=0)
    return group / max(np.sqrt(np.square(group).sum(axis=1).mean()), 1e-6)


def saliency(photo: np.ndarray, patch: int = CLIP_PATCH) -> np.ndarray:
    """How much each patch stands out, in place of the [CLS] attention of an encoder: ``[N]``.

    Colour contrast between centre and surround at three scales (differences of Gaussians in Lab)
    plus edge energy (Scharr), in equal parts, under a mild prior for the centre; sums to 1. It
    knows colours and edges, not objects: a model looks elsewhere, for example at faces.
    """
    lab = color.rgb2lab(photo)
    contrast = sum(
        np.linalg.norm(_blur(lab, scale * patch) - _blur(lab, 4 * scale * patch), axis=-1)
        for scale in (0.3, 0.6, 1.2)
    )
    edges = np.linalg.norm([filters.scharr(lab[..., channel]) for channel in range(3)], axis=0)
    edges = filters.gaussian(edges, patch / 2)
    y, x = (np.linspace(-1, 1, side) for side in photo.shape[:2])
    centre = np.exp(-(y[:, None] ** 2 + x**2) / (2 * _CENTRE**2))
    parts = [part / part.mean() for part in (contrast, edges) if part.mean() > 1e-6]
    # a photograph without any contrast keeps the prior alone
    total = np.sum(parts, axis=0) if parts else np.ones_like(edges)
    score = measure.block_reduce(total * centre, (patch, patch), np.mean).ravel()
    return score / score.sum()


def _blur(lab: np.ndarray, sigma: float) -> np.ndarray:
    return filters.gaussian(lab, sigma, channel_axis=-1)
