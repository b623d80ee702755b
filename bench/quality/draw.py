"""A scene as pixels. The photographs are those that ship inside scikit-image and scikit-learn."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .world import SIDE, Scene, Sign, Split, Thing

_RGB = {
    "red": (214, 38, 40),
    "green": (44, 158, 62),
    "blue": (38, 88, 222),
    "yellow": (247, 220, 48),
    "purple": (142, 54, 176),
    "orange": (247, 134, 24),
}
PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        *("astronaut", "rocket", "camera", "brick", "grass", "coins", "hubble_deep_field"),
        *("stereo_motorcycle", "moon", "flower"),
    ),
    "test": ("coffee", "cat", "gravel", "china"),
}
_FINE = 4  # objects are drawn so much larger, then reduced
_DARK, _LIGHT = (24, 26, 32), (244, 244, 238)


def draw(scene: Scene) -> np.ndarray:
    """The scene: uint8 ``[SIDE, SIDE, 3]``."""
    image = _background(scene)
    for thing in scene.things:
        _thing(image, thing)
    if scene.sign:
        _sign(image, scene.sign)
    return np.asarray(image)


@cache
def _photograph(name: str) -> Image.Image:
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{name}.jpg")
    else:
        from skimage import data

        pixels = getattr(data, name)()
        if name == "stereo_motorcycle":
            pixels = pixels[0]
    image = Image.fromarray(pixels).convert("RGB")
    scale = max(1.0, min(image.size) / (2 * SIDE))
    return image.resize((round(image.width / scale), round(image.height / scale)))


def _background(scene: Scene) -> Image.Image:
    rng = np.random.default_rng((*scene.seed, 7))
    names = PHOTOGRAPHS[scene.split]
    photo = _photograph(names[rng.integers(len(names))])
    side = rng.uniform(0.45, 1.0) * min(photo.size)
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    box = (left, top, left + side, top + side)
    image = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    light, contrast = rng.uniform(-24, 24), rng.uniform(0.6, 1.0)
    tint = contrast * rng.uniform(0.88, 1.12, 3)
    pixels = (np.asarray(image, dtype=np.float32) - 128) * tint + 128 + light
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners in the unit square around 0."""
    if shape == "square":
        return [(-0.42, -0.42), (0.42, -0.42), (0.42, 0.42), (-0.42, 0.42)]
    if shape == "triangle":
        return [(0, -0.48), (0.48, 0.4), (-0.48, 0.4)]
    if shape == "star":
        points = []
        for i in range(10):
            angle, radius = math.pi * (i / 5 - 0.5), (0.5, 0.2)[i % 2]
            points.append((radius * math.cos(angle), radius * math.sin(angle)))
        return points
    arm, end = 0.16, 0.48
    return [
        *((-arm, -end), (arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm)),
        *((arm, end), (-arm, end), (-arm, arm), (-end, arm), (-end, -arm), (-arm, -arm)),
    ]


def _mask(thing: Thing, grow: float) -> Image.Image:
    """Where the object is, 0 to 255, in a tile two pixels larger on every side."""
    side = (thing.diameter + 4) * _FINE
    tile = Image.new("L", (side, side))
    pen, middle = ImageDraw.Draw(tile), side / 2
    scale = (thing.diameter * 0.94) * _FINE
    if thing.shape in ("circle", "ring"):
        radius = (0.5 if thing.shape == "ring" else 0.46) * scale + grow * _FINE
        pen.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], fill=255)
        if thing.shape == "ring":
            hole = 0.24 * scale - grow * _FINE
            pen.ellipse([middle - hole, middle - hole, middle + hole, middle + hole], fill=0)
    else:
        angle = math.radians(thing.turn)
        cos, sin = math.cos(angle), math.sin(angle)
        corners = [
            (middle + scale * (x * cos - y * sin), middle + scale * (x * sin + y * cos))
            for x, y in _outline(thing.shape)
        ]
        pen.polygon(corners, fill=255)
        if grow:
            pen.line([*corners, corners[0], corners[1]], fill=255, width=int(2 * grow * _FINE))
    return tile.reduce(_FINE)


def _thing(image: Image.Image, thing: Thing) -> None:
    half = thing.diameter // 2 + 2
    corner = (thing.x - half, thing.y - half)
    image.paste((thing.outline,) * 3, corner, _mask(thing, 1.3))
    mask = _mask(thing, 0.0)
    colour = np.array(_RGB[thing.colour], dtype=np.float32)
    y, x = np.mgrid[: mask.height, : mask.width].astype(np.float32)
    fill = np.broadcast_to(colour, (mask.height, mask.width, 3)).copy()
    period = 7.0 if thing.size == "small" else 9.0
    if thing.pattern == "striped":
        fill[((x + y) * 0.7071) % period < 0.42 * period] *= 0.3
    elif thing.pattern == "dotted":
        u, v = x % period - period / 2, y % period - period / 2
        fill[u * u + v * v < (0.3 * period) ** 2] = 250
    image.paste(Image.fromarray(fill.astype(np.uint8)), corner, mask)


@cache
def _font(height: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    # its capitals are 0.73 of the size high
    return ImageFont.truetype(str(path), round(height / 0.73))


def _sign(image: Image.Image, sign: Sign) -> None:
    plate, ink = (_DARK, _LIGHT) if sign.dark else (_LIGHT, _DARK)
    width, height = sign.box
    left, top = sign.x - width // 2, sign.y - height // 2
    pen = ImageDraw.Draw(image)
    pen.rectangle([left, top, left + width - 1, top + height - 1], fill=plate, outline=ink)
    for i, letter in enumerate(sign.word):
        x = left + 4 + sign.step * i + sign.step / 2
        pen.text((x, sign.y), letter, fill=ink, font=_font(sign.height), anchor="mm")
