"""Ask a model the test's questions and score what it says: understanding, and compliance.

Both are measured on the same responses and independently: a wrong answer in the form that was asked
for complies, a right one in another form is understood.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .draw import draw
from .model import BOS, IMAGE
from .questions import FAMILIES, Question, ask
from .world import Split, sample

_NEW_TOKENS = 40  # the longest right response takes fewer
_RESAMPLES = 2000
# what is measured of each image: sums of it and what they are divided by
MEASURES = (*FAMILIES, "strict", "loose", "each", "each_loosely")


@dataclass(frozen=True)
class Exam:
    """pixels: u8 ``[I, S, S, 3]``; questions with the index of their image."""

    pixels: np.ndarray
    questions: tuple[tuple[int, Question], ...]


def questions(seed: int, images: int, split: Split = "test") -> Exam:
    """One question of each family on each image, or its pair or its rotations."""
    pixels, asked = [], []
    for image in range(images):
        scene = sample(split, (1000 + seed, image))
        rng = np.random.default_rng((1000 + seed, image, 2))
        pixels.append(draw(scene))
        for family in FAMILIES:
            asked += [(image, q) for q in ask(scene, family, rng, group=len(asked))]
    return Exam(np.stack(pixels), tuple(asked))


@torch.inference_mode()
def responses(
    model: Any,
    processor: Any,
    exam: Exam,
    tokens: int,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """What the model says, greedily, to each question; tokens: placeholders of an image.

    Prompts of one length go together, so that none is padded.
    """
    pixels = processor.image_processor(list(exam.pixels), return_tensors="pt")["pixel_values"]
    prompts = processor.tokenizer([q.text + "\n" for _, q in exam.questions])["input_ids"]
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    said = [""] * len(prompts)
    for length, members in sorted(by_length.items()):
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            ids = torch.tensor([[BOS] + [IMAGE] * tokens + prompts[i] for i in chosen])
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                pixel_values=pixels[[exam.questions[i][0] for i in chosen]].to(model.device),
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
            )
            new = out[:, 1 + tokens + length :]
            texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                said[i] = text
            if progress:
                progress(len(chosen))
    return said


def counts(exam: Exam, said: Sequence[str]) -> np.ndarray:
    """f64 ``[I, measures, 2]``: of each image what was reached and what there was to reach.

    Families: a question is worth 1; the yes/no pair 1 as in MME, half for its questions and half
    for both being right; three rotations 1 if all are right, as in MMBench. ``strict`` and
    ``loose``: responses that follow all of their instructions; ``each``: instructions followed.
    """
    out = np.zeros((len(exam.pixels), len(MEASURES), 2))
    groups: dict[int, list[tuple[int, Question, bool]]] = defaultdict(list)
    for (image, question), response in zip(exam.questions, said, strict=True):
        groups[question.group].append((image, question, question.understood(response)))
        if question.instructions:
            strictly = question.followed(response)
            loosely = question.followed(response, loosely=True)
            for name, got, there in (
                ("strict", all(strictly), 1),
                ("loose", all(loosely), 1),
                ("each", sum(strictly), len(strictly)),
                ("each_loosely", sum(loosely), len(loosely)),
            ):
                out[image, MEASURES.index(name)] += got, there
    for members in groups.values():
        image, question, _ = members[0]
        right = [r for *_, r in members]
        got = float(all(right))
        if question.family == "yes_no":
            got = (got + sum(right) / len(right)) / 2
        out[image, FAMILIES.index(question.family)] += got, 1
    return out


def summary(
    counted: np.ndarray, baseline: np.ndarray | None = None, seed: int = 0
) -> dict[str, Any]:
    """Shares with 95% intervals (bootstrap over images) of `counts`; understanding is the mean over
    families. With the counts of a baseline on the same images, also the differences from it."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(counted), size=(_RESAMPLES, len(counted)))
    resamples = np.stack([np.bincount(d, minlength=len(counted)) for d in drawn])  # [R, I]
    whole = np.ones((1, len(counted)))
    result: dict[str, Any] = {}
    point, spread = (_shares(counted, weights) for weights in (whole, resamples))
    for name in point:
        low, high = np.nanpercentile(spread[name], [2.5, 97.5])
        result[name] = {
            "share": round(float(point[name][0]), 4),
            "low": round(float(low), 4),
            "high": round(float(high), 4),
        }
    if baseline is not None:
        other, others = (_shares(baseline, weights) for weights in (whole, resamples))
        for name in ("understanding", "strict"):
            low, high = np.nanpercentile(spread[name] - others[name], [2.5, 97.5])
            result[name]["change"] = [
                round(float(v), 4) for v in (point[name][0] - other[name][0], low, high)
            ]
    return result


def _shares(counted: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Of each measure, and understanding: ``[R]`` for weights ``[R, I]`` of the images."""
    sums = np.einsum("ri,imc->rmc", weights, counted)
    with np.errstate(invalid="ignore"):
        shares = sums[..., 0] / sums[..., 1]
    named = {name: shares[:, i] for i, name in enumerate(MEASURES)}
    return {"understanding": shares[:, : len(FAMILIES)].mean(1), **named}
