"""Train the laboratory's model from nothing: `make lab-train`.

LLaVA begins with a trained encoder, which stays as it is. Here it has to learn first: each patch
tells what covers it and where it is, and [CLS] what there is in the picture, as an encoder trained
on captions would know; its attention is what VMTC takes for importance. Then projector and language
model learn, as LLaVA's do from captions first: they teach to find a thing in the picture, which was
not learned from questions alone in two thousand steps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader

from . import model as models
from .batches import IGNORED, NUM_TAGS, PATCH_CLASSES, Batch, Batches, Mix
from .checkpoint import save

_KEY = "vmtc_lab_training"
_CACHE_NAME = next(
    name
    for name in ("cache", "past_key_values")
    if name in signature(transformers.LlamaModel.forward).parameters
)
ROWS, LENGTH = 3, 112
_TAG_WEIGHT = 10.0
_WARMUP = 50  # steps
# by the step after those of the encoder: to find a thing; to do as one is told, which is learned
# soon; to compare things and to find a letter, which takes long; all of it
MIXES = {
    0: Mix(0.6, 0.2),
    600: Mix(0.225, 0.075),
    2000: Mix(0.1, 0.2, (0.25, 0.28, 0.12, 0.2, 0.15), plain=0.85),
    4000: Mix(0.05, 0.1, (0.22, 0.24, 0.18, 0.16, 0.2), plain=0.4),
}
_DECAY = 0.4  # share of the steps, at the end, in which the rate falls to zero


class Lesson(nn.Module):
    """The model with what it is taught by: heads that the checkpoint has not."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        use_training_attention(model)
        self.model = model
        width = model.config.vision_config.hidden_size
        self.patches = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(PATCH_CLASSES)))
        self.tags = nn.Linear(width, NUM_TAGS)

    def see(self, batch: Batch) -> dict[str, Tensor]:
        """What the encoder is taught by."""
        seen = self.model.model.vision_tower(normalized(batch.pixels), output_hidden_states=True)
        patches = self.patches(seen.hidden_states[-2][:, 1:]).float().split(PATCH_CLASSES, dim=-1)
        losses = {
            "patches": sum(
                cross_entropy(each.flatten(0, 1), batch.patches[..., i].flatten())
                for i, each in enumerate(patches)
            ),
            "tags": binary_cross_entropy_with_logits(
                self.tags(seen.pooler_output).float(), batch.tags
            ),
        }
        return {**losses, "loss": losses["patches"] + _TAG_WEIGHT * losses["tags"]}

    def answer(self, batch: Batch) -> dict[str, Tensor]:
        """What projector and language model are taught by; the encoder stays as it is."""
        inner = self.model.model
        with torch.no_grad():
            seen = inner.vision_tower(normalized(batch.pixels), output_hidden_states=True)
        image = inner.multi_modal_projector(seen.hidden_states[-2][:, 1:])
        said, targets = answers(self.model, batch, image)
        right = (said.argmax(-1) == targets).float().mean()
        return {"loss": cross_entropy(said.float(), targets), "right": right}


def answers(model: Any, batch: Batch, image: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the answers' tokens behind the projected image ``[B, N, D]``, and those tokens."""
    language = model.model.language_model
    rows, length = batch.ids.shape[1:]
    start = torch.full_like(batch.ids[:, 0, :1], models.BOS)
    cache = transformers.DynamicCache(config=language.config)
    # transformers has renamed it
    named = {_CACHE_NAME: cache, "use_cache": True}
    prefix = 1 + image.shape[1]
    triangle = image.new_ones(prefix, prefix, dtype=torch.bool).tril()
    language(
        inputs_embeds=torch.cat([language.embed_tokens(start).to(image.dtype), image], dim=1),
        attention_mask=triangle[None, None],
        position_ids=batch.prefix,
        **named,
    )
    for layer in cache.layers:
        layer.keys = layer.keys.repeat_interleave(rows, dim=0)
        layer.values = layer.values.repeat_interleave(rows, dim=0)
    segments, labels = batch.segments.flatten(0, 1), batch.labels.flatten(0, 1)
    own = segments[:, :, None] == segments[:, None]
    own &= own.new_ones(length, length).tril()
    hidden = language(
        input_ids=batch.ids.flatten(0, 1),
        attention_mask=torch.cat([own.new_ones(*own.shape[:2], prefix), own], dim=2)[:, None],
        position_ids=batch.positions.flatten(0, 1),
        **named,
    ).last_hidden_state
    asked = labels != IGNORED
    return model.lm_head(hidden[asked]), labels[asked]


def normalized(pixels: Tensor) -> Tensor:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = (
        pixels.new_tensor(v, dtype=torch.float32) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def use_training_attention(model: Any) -> None:
    """Attention by its definition in the dtype of the values: on CPUs the backward pass of fused
    attention takes twice as long at these sizes. For masks that are given alone."""

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kw: Any
    ) -> tuple[Tensor, None]:
        with torch.autocast(q.device.type, enabled=False):
            q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves rotated ones in float32
            weights = (q @ k.mT) * scaling
            if mask is not None:
                weights = weights.masked_fill(~mask, -torch.inf)
            out = weights.softmax(-1) @ v
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register(_KEY, attend)
    masks = transformers.AttentionMaskInterface
    masks.register(_KEY, masks()["sdpa"])
    model.set_attn_implementation(_KEY)


class Optimizers:
    """Muon for the matrices of the layers, AdamW for all else; the rate warms up, stays, and falls
    to zero in the last steps."""

    def __init__(self, modules: Sequence[nn.Module], rate: float, steps: int) -> None:
        named = {p: name for module in modules for name, p in module.named_parameters()}
        # a table of embeddings is none, and no more is what reads off the labels
        matrices = [p for p, name in named.items() if p.ndim == 2 and "layers" in name]
        chosen = set(matrices)
        others = [p for p in named if p not in chosen]
        self.each = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.rate, self.steps, self.parameters = rate, steps, list(named)

    def step(self, index: int) -> None:
        left = (self.steps - index) / (_DECAY * self.steps)
        share = min(1.0, (index + 1) / _WARMUP, left)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for each in self.each:
            for group in each.param_groups:
                group["lr"] = self.rate * share
            each.step()
            each.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--out", type=Path, default=Path("build/lab"), help="of the log and of what goes on")
    option("--export", type=Path, default=Path("build/lab/model"), help="of the model when done")
    option("--steps", type=int, default=11000, help="in all")
    option("--images", type=int, default=8, help="of a step")
    option("--vision-steps", type=int, default=3000, help="first ones, without questions")
    option("--vision-images", type=int, default=24, help="of such a step")
    option("--rate", type=float, default=2e-3, help="highest learning rate")
    option("--seed", type=int, default=0)
    option("--every", type=int, default=250, help="steps between two checkpoints")
    option("--threads", type=int, default=os.cpu_count())
    train(parser.parse_args())


def train(given: argparse.Namespace) -> None:
    """Goes on from the checkpoint in ``given.out``, if there is one."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = models.tokenizer()
    lesson = Lesson(models.build(len(tokenizer))).to(device)
    inner, looks = lesson.model.model, given.vision_steps
    optimizers = [
        Optimizers([inner.vision_tower, lesson.patches, lesson.tags], given.rate, looks),
        Optimizers(
            [inner.multi_modal_projector, inner.language_model], given.rate, given.steps - looks
        ),
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    last = given.out / "last.pt"
    first = _resume(last, lesson, optimizers, device)
    log, loader = _Log(given.out / "log.jsonl"), None
    # images and rows of text in a step, and what they ask for, by the step from which on
    stages = {0: (given.vision_images, 0, Mix())}
    stages |= {looks + step: (given.images, ROWS, mix) for step, mix in MIXES.items()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=given.steps, completed=first)
        for index in range(first, given.steps):
            if loader is None or index in stages:
                images, rows, mix = next(
                    stage for start, stage in reversed(stages.items()) if index >= start
                )
                data = Batches(*(tokenizer, images, rows, LENGTH, given.seed + 1, index), mix=mix)
                loader = iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4))
            batch = next(loader).to(device)
            with torch.autocast(device, torch.bfloat16):
                losses = lesson.see(batch) if index < looks else lesson.answer(batch)
            losses["loss"].backward()
            if index < looks:
                optimizers[0].step(index)
            else:
                optimizers[1].step(index - looks)
            progress.update(task, advance=1, description=log.add(index + 1, losses))
            if (index + 1) % given.every == 0 or index + 1 == given.steps:
                _save(last, lesson, optimizers, index + 1)
    save(lesson.model, tokenizer, given.export)
    print(f"{given.export}: the model after {given.steps} steps")


class _Log:
    """Means of some steps, a line of JSON each."""

    EVERY = 50

    def __init__(self, path: Path) -> None:
        self.path, self.told = path, ""
        self._begin()

    def _begin(self) -> None:
        self.sums: dict[str, float] = {}
        self.count, self.since = 0, time.time()

    def add(self, step: int, losses: dict[str, Tensor]) -> str:
        """What the last line says."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        self.count += 1
        if step % self.EVERY == 0:
            line = {"step": step, "seconds": round((time.time() - self.since) / self.count, 3)}
            means = {name: round(value / self.count, 4) for name, value in self.sums.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({**line, **means}) + "\n")
            self.told = " ".join(f"{name} {value:.3f}" for name, value in means.items())
            self._begin()
        return self.told


def _resume(last: Path, lesson: Lesson, optimizers: list[Optimizers], device: str) -> int:
    """The steps that are done."""
    if not last.exists():
        return 0
    saved = torch.load(last, map_location=device, weights_only=True)
    lesson.load_state_dict(saved["lesson"])
    each = (each for both in optimizers for each in both.each)
    for one, state in zip(each, saved["optimizers"], strict=True):
        one.load_state_dict(state)
    return int(saved["step"])


def _save(last: Path, lesson: Lesson, optimizers: list[Optimizers], step: int) -> None:
    states = [each.state_dict() for both in optimizers for each in both.each]
    new = last.with_suffix(".new")
    torch.save({"lesson": lesson.state_dict(), "optimizers": states, "step": step}, new)
    new.replace(last)


if __name__ == "__main__":
    main()
