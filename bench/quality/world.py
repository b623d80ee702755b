"""Scenes: a few objects and a sign on a photograph, sampled from a seed.

Everything is a toy's: six shapes, six colours, three patterns, two sizes, signs of three letters.
Training and test share the parts and not the combinations: some shapes of a colour and a pattern,
some words and some photographs are seen in the test alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "test"]

SIDE = 192  # pixels a side of a scene
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
PATTERNS = ("plain", "striped", "dotted")
SIZES = ("small", "large")
NUMBERS = ("zero", "one", "two", "three", "four")
CONSONANTS, VOWELS = "BDFGHKLMNPRSTVZ", "AEIOU"
LETTERS = tuple(sorted(CONSONANTS + VOWELS))

# shape, colour and pattern that no scene of the training has together: each shape and each colour
# lacks each pattern once
HELD_OUT = {
    (shape, colour, PATTERNS[(i // 2 + j // 2) % 3])
    for i, shape in enumerate(SHAPES)
    for j, colour in enumerate(COLOURS)
    if (i + j) % 2 == 0
}
WORDS = [a + b + c for a in CONSONANTS for b in VOWELS for c in CONSONANTS]
_TEST_WORDS = WORDS[4::9]
TRAIN_WORDS = sorted(set(WORDS) - set(_TEST_WORDS))

MAX_OBJECTS = len(NUMBERS) - 1
_COUNTS = (0.1, 0.3, 0.35, 0.25)  # of one to four objects
_SIGN = 0.65
_DIAMETERS = {"small": (27, 33), "large": (44, 53)}
_MARGIN = 3


@dataclass(frozen=True)
class Thing:
    """An object; x, y: its centre and diameter: its extent, in pixels; turn in degrees."""

    shape: str
    colour: str
    pattern: str
    size: str
    x: int
    y: int
    diameter: int
    turn: float
    # brightness of its outline, 0 or 255
    outline: int


@dataclass(frozen=True)
class Sign:
    """A word on a plate: x, y: its centre; height: that of its letters in pixels."""

    word: str
    x: int
    y: int
    height: int
    dark: bool

    @property
    def box(self) -> tuple[int, int]:
        """Width and height of the plate."""
        return self.step * len(self.word) + 8, self.height + 10

    @property
    def step(self) -> int:
        """Pixels from letter to letter."""
        return round(1.02 * self.height)


@dataclass(frozen=True)
class Scene:
    """``seed`` decides what is behind the things: photograph, crop, light."""

    things: tuple[Thing, ...]
    sign: Sign | None
    split: Split
    seed: tuple[int, ...]


def sample(split: Split, seed: tuple[int, ...]) -> Scene:
    """A scene of a split, the same for the same seed."""
    rng = np.random.default_rng((*seed, split == "test"))
    while True:
        scene = _try(rng, split, seed)
        if scene is not None:
            return scene


def _try(rng: np.random.Generator, split: Split, seed: tuple[int, ...]) -> Scene | None:
    boxes: list[tuple[int, int, int, int]] = []
    sign = None
    if rng.random() < _SIGN:
        words = _TEST_WORDS if split == "test" else TRAIN_WORDS
        word = words[rng.integers(len(words))]
        sign = Sign(word, 0, 0, int(rng.integers(17, 22)), bool(rng.random() < 0.5))
        place = _place(rng, *sign.box, boxes)
        if place is None:
            return None
        sign = Sign(word, *place, sign.height, sign.dark)
    things: list[Thing] = []
    count = 1 + int(rng.choice(len(_COUNTS), p=_COUNTS))
    for i in range(count):
        shape, colour, pattern = _kind(rng, split, must=i == 0)
        size = SIZES[rng.integers(2)]
        diameter = int(rng.integers(*_DIAMETERS[size]))
        place = _place(rng, diameter, diameter, boxes)
        if place is None:
            return None
        turn, outline = float(rng.uniform(-12, 12)), 255 * int(rng.integers(2))
        things.append(Thing(shape, colour, pattern, size, *place, diameter, turn, outline))
    order = rng.permutation(count)
    return Scene(tuple(things[i] for i in order), sign, split, seed)


def _kind(rng: np.random.Generator, split: Split, must: bool) -> tuple[str, str, str]:
    """Shape, colour, pattern; the first of a test's scene are some that the training lacks."""
    while True:
        kind = SHAPES[rng.integers(6)], COLOURS[rng.integers(6)], PATTERNS[rng.integers(3)]
        if kind not in HELD_OUT if split == "train" else not must or kind in HELD_OUT:
            return kind


def _place(
    rng: np.random.Generator, width: int, height: int, boxes: list[tuple[int, int, int, int]]
) -> tuple[int, int] | None:
    """A centre whose box is free of the others, which it joins."""
    for _ in range(40):
        x = int(rng.integers(width // 2 + 2, SIDE - width // 2 - 2))
        y = int(rng.integers(height // 2 + 2, SIDE - height // 2 - 2))
        if all(
            2 * abs(x - a) >= width + w + 2 * _MARGIN or 2 * abs(y - b) >= height + h + 2 * _MARGIN
            for a, b, w, h in boxes
        ):
            boxes.append((x, y, width, height))
            return x, y
    return None
