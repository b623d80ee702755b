"""Scenes and questions as tensors for training: many questions behind one image.

``<s>`` and the image are read once. Questions and answers follow in rows of several, of which none
sees another: each is at the place where it would follow the image alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from .draw import draw
from .model import EOS, GRID, PAD, PATCH
from .questions import FAMILIES, ask, describe, letters
from .world import COLOURS, LETTERS, PATTERNS, SHAPES, Scene, sample

IGNORED = -100


@dataclass(frozen=True)
class Mix:
    """What a step asks for.

    described, letters: shares of descriptions, and of options without a picture, among the
    requests. families: shares of these among the rest, as in `FAMILIES`. plain: share of the rest
    that gets no instruction, whatever else is drawn.
    """

    described: float = 0.0
    letters: float = 0.0
    families: tuple[float, ...] = (0.26, 0.26, 0.1, 0.13, 0.25)
    plain: float = 0.0


@dataclass
class Batch:
    """pixels: u8 ``[B, SIDE, SIDE, 3]``; prefix: f32 ``[B, 1 + N]``, its positions; ids, labels (of
    the next token), segments (a question's number, -1 for padding): i64 ``[B, R, T]``; positions:
    f32 ``[B, R, T]``; patches: i64 ``[B, N, 6]``, shape, colour, pattern and letter of each, 0 for
    none, its row and its column; tags: f32 ``[B, K]``, what is there at all."""

    pixels: Tensor
    prefix: Tensor
    ids: Tensor
    labels: Tensor
    segments: Tensor
    positions: Tensor
    patches: Tensor
    tags: Tensor

    def to(self, device: str) -> Batch:
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


PATCH_CLASSES = (*(1 + len(each) for each in (SHAPES, COLOURS, PATTERNS, LETTERS)), GRID, GRID)
NUM_TAGS = len(SHAPES) * len(COLOURS) + 3 * len(LETTERS)


class Batches(IterableDataset):
    """Batches without end from a seed, from batch ``first`` on: the same one at the same place.

    rows of length tokens for each of the images; tokens: those of an image.
    """

    def __init__(
        self,
        tokenizer: Any,
        images: int,
        rows: int,
        length: int,
        seed: int,
        first: int = 0,
        tokens: int = GRID**2,
        mix: Mix | None = None,
    ) -> None:
        self.tokenizer, self.images, self.rows = tokenizer, images, rows
        self.length, self.seed, self.first = length, seed, first
        self.tokens, self.mix = tokens, mix or Mix()

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        step, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        index = self.first + step
        while True:
            yield self.batch(index)
            index += stride

    def batch(self, index: int) -> Batch:
        each = [self._image(index, i) for i in range(self.images)]
        return Batch(*(torch.from_numpy(np.stack(part)) for part in zip(*each, strict=True)))

    def _image(self, index: int, image: int) -> tuple[np.ndarray, ...]:
        seed = (self.seed, index, image)
        scene, rng = sample("train", seed), np.random.default_rng((*seed, 1))
        prefix, start = _positions(rng, self.tokens)
        rows = [self._row(scene, start, rng) for _ in range(self.rows)]
        none = np.zeros((0, self.length), dtype=np.int64)
        texts = [np.stack(part) for part in zip(*rows, strict=True)] or [none] * 4
        return draw(scene), prefix, *texts, patches(scene), tags(scene)

    def _row(
        self, scene: Scene, start: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """ids, labels, segments and positions of as many questions as there is room for."""
        ids: list[int] = []
        labels: list[int] = []
        segments: list[int] = []
        positions: list[float] = []
        misses = 0
        # a long one may not have fitted where a short one would
        while misses < 2:
            for text, target in self._texts(scene, rng):
                prompt, answer = self.tokenizer([text + "\n", target])["input_ids"]
                whole = [*prompt, *answer, EOS]
                if len(ids) + len(whole) > self.length:
                    misses += 1
                    continue
                segments += [segments[-1] + 1 if segments else 0] * len(whole)
                ids += whole
                labels += [*[IGNORED] * (len(prompt) - 1), *answer, EOS, IGNORED]
                positions += [start + i for i in range(len(whole))]
        rest = self.length - len(ids)
        return (
            np.array(ids + [PAD] * rest),
            np.array(labels + [IGNORED] * rest),
            np.array(segments + [-1] * rest),
            np.array(positions + [0] * rest, dtype=np.float32),
        )

    def _texts(self, scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
        """A request and its answer; of a pair both, as one corrects the other."""
        mix = self.mix
        taught = mix.described + mix.letters
        if rng.random() < taught:
            return [letters(rng) if rng.random() < mix.letters / taught else describe(scene, rng)]
        family = FAMILIES[rng.choice(len(FAMILIES), p=mix.families)]
        asked = ask(scene, family, rng, plain=mix.plain)
        if len(asked) == 3:
            asked = [asked[rng.integers(3)]]
        return [(question.text, question.target) for question in asked]


def _positions(rng: np.random.Generator, count: int) -> tuple[np.ndarray, float]:
    """Positions of ``<s>`` and ``count`` visual tokens, and of what comes next.

    A language model that was trained on text knows sequences of any length. This one has never seen
    any; so that it does not take a patch's place from where the token is in the prompt, which
    merging changes, the image of every other row is stretched or shrunk to another length.
    """
    if rng.random() < 0.5:
        return np.arange(1 + count, dtype=np.float32), 1.0 + count
    span = float(np.exp(rng.uniform(np.log(8), np.log(300))))
    places = np.sort(rng.random(count)) if rng.random() < 0.5 else np.arange(count) / count
    return np.concatenate([[0], 1 + span * places]).astype(np.float32), 1 + span


def patches(scene: Scene) -> np.ndarray:
    """What covers each patch most, if it covers a fifth of it, and where it is: i64 ``[N, 6]``."""
    label, best = np.zeros((GRID, GRID, 4), dtype=np.int64), np.full((GRID, GRID), 0.2)

    def cover(x: float, y: float, width: float, height: float, value: tuple[int, ...]) -> None:
        edges = np.arange(GRID) * PATCH
        shares = [
            (np.minimum(edges + PATCH, c + w / 2) - np.maximum(edges, c - w / 2)).clip(0) / PATCH
            for c, w in ((x, width), (y, height))
        ]
        area = shares[1][:, None] * shares[0]
        label[area > best] = value
        np.maximum(best, area, out=best)

    for t in scene.things:
        kind = SHAPES.index(t.shape), COLOURS.index(t.colour), PATTERNS.index(t.pattern)
        cover(t.x, t.y, t.diameter, t.diameter, (*(1 + i for i in kind), 0))
    if scene.sign:
        sign = scene.sign
        left = sign.x - sign.box[0] // 2 + 4
        for i, letter in enumerate(sign.word):
            x = left + sign.step * (i + 0.5)
            cover(x, sign.y, sign.step, sign.height, (0, 0, 0, 1 + LETTERS.index(letter)))
    places = np.indices((GRID, GRID)).transpose(1, 2, 0)
    return np.concatenate([label, places], axis=2).reshape(-1, 6)


def tags(scene: Scene) -> np.ndarray:
    """1 for each pair of shape and colour, and each letter at its place, that the scene has."""
    tag = np.zeros(NUM_TAGS, dtype=np.float32)
    for t in scene.things:
        tag[SHAPES.index(t.shape) * len(COLOURS) + COLOURS.index(t.colour)] = 1
    if scene.sign:
        for i, letter in enumerate(scene.sign.word):
            tag[len(SHAPES) * len(COLOURS) + i * len(LETTERS) + LETTERS.index(letter)] = 1
    return tag
