"""What VMTC and CMAI do to a photograph in a model of transformers: needs the extra for these."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from . import _registry, checkpoints
from .answers import Answer, answers
from .config import CMAIConfig, VMTCConfig
from .focus_mask import unpack
from .llava import choose, words_of
from .merge_tokens import MergedTokens
from .mosaic import make_mosaic
from .patches import InputError, _open

# cells for which no token stands: pruned, left out by the model, beside the tiles
DROPPED, CUT, OUTSIDE = -1, -2, -3


class Focus(NamedTuple):
    """What a text token focuses on: ``scores`` f32 [n] and ``inhibited`` bool [n] of each slot.

    ``word``: its text; ``place``: counted from the end of the prompt, -1 for the last; ``hidden``
    of ``tokens`` image tokens, newlines among them, are inhibited; ``layer`` of ``layers``, from 0.
    """

    word: str
    place: int
    scores: np.ndarray
    inhibited: np.ndarray
    hidden: int
    tokens: int
    layer: int
    layers: int


@dataclass(frozen=True)
class Explained:
    """Which visual tokens of a photograph are kept and merged, on a `Mosaic` of G x G cells.

    ``photo``, ``shape``, ``cell``, ``tiles``, ``where``: of the mosaic; ``slot``: i64 ``[G, G]``,
    the token that stands for a cell, or `DROPPED`, `CUT`, `OUTSIDE`; ``scores``: f32 ``[G, G]``,
    the importance, NaN where there is none, of ``source`` in ``layer`` of ``layers`` of the vision
    encoder, from 0; ``primary``: bool ``[n]``, the slots that are kept as they are; ``group``: i64
    ``[n]``, the number of a merged one in its tile; ``before``, ``after``: image tokens, ``extra``
    of which are no patches; ``seconds``: of the forward pass on ``device``; ``backend``: that of
    `merge_tokens`.
    """

    photo: np.ndarray
    shape: tuple[int, int]
    cell: int
    slot: np.ndarray
    scores: np.ndarray
    primary: np.ndarray
    group: np.ndarray
    before: int
    after: int
    extra: int
    tiles: str
    where: str
    layer: int
    layers: int
    source: str
    config: VMTCConfig
    model: str
    prompt: str
    backend: str
    device: str
    seconds: float
    focus: Focus | None = None


def photograph(path: Path | None) -> Image.Image:
    """A photograph in RGB, turned as its EXIF says; None for scikit-image's ``rocket``."""
    return Image.fromarray(data.rocket()) if path is None else _open(path)


class Explainer:
    """A vision-language model of transformers with its processor, for one photograph at a time."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model, processor, name

    @classmethod
    def load(cls, source: str) -> Explainer:
        """source: a folder or a model id, as `checkpoints.load` takes it."""
        families = list(checkpoints.integration("._families").FAMILIES)
        model, processor = checkpoints.load(source, families, f"of type {', '.join(families)}")
        return cls(model, processor, checkpoints.name_of(source, model))

    def explain(
        self,
        image: Image.Image,
        prompt: str,
        vmtc: VMTCConfig,
        cmai: CMAIConfig | None = None,
        *,
        layer: int | None = None,
        token: str | None = None,
    ) -> Explained:
        """What a forward pass over a photograph and a question does.

        cmai: to see also what the text token ``token`` (see `choose`) focuses on in the text layer
        ``layer``, counted as in a Python list, by default the middle one.
        """
        attach = checkpoints.integration().attach
        noting = _Noting(**vars(vmtc))
        text, (index, depth) = self._text(prompt), self._layer(layer)
        if cmai is not None and not cmai.applies(index, depth):
            some = [i for i in range(depth) if cmai.applies(i, depth)]
            raise InputError(f"text layer {index} of {depth} inhibits nothing, only {some} do")
        with checkpoints.refusals(f"{self.name} cannot run"):
            with checkpoints.settings():
                handle = attach(self.model, self.processor, vmtc=noting, cmai=cmai, record=True)
            with handle, torch.inference_mode():
                with checkpoints.settings():
                    inputs = self._inputs(handle, image, text)
                words = self._after_image(inputs["input_ids"][0])
                chosen = choose(words, token)
                seconds = self._run(inputs)
                family, last = handle._family, handle.last
                layout = family.layout("image", inputs)
        slots = _slots(last.merged["image"], layout, vmtc)
        focus = None
        if cmai is not None:
            place = chosen - len(words)
            seen = _focus(last.focus[index], slots, place, f"{self.name}, layer {index}")
            focus = Focus(words[chosen], place, *seen, layer=index, layers=depth)
        mosaic = make_mosaic(inputs, layout, family, self.processor)
        cells = mosaic.rows.clip(0)
        encoder, by_cls = len(family.layers), family.has_cls and vmtc.score_source != "received"
        return Explained(
            photo=mosaic.photo,
            shape=mosaic.shape,
            cell=mosaic.cell,
            slot=np.where(mosaic.rows < 0, OUTSIDE, slots.of_row[cells]),
            scores=np.where(mosaic.rows < 0, np.nan, slots.scores[cells]),
            primary=slots.primary.numpy(),
            group=slots.group.numpy(),
            before=len(layout.rows),
            after=len(slots.shown),
            extra=int((slots.shown < 0).sum()),
            tiles=mosaic.tiles,
            where=mosaic.where,
            layer=vmtc.score_layer % encoder,
            layers=encoder,
            source="attention from [CLS]" if by_cls else "attention received",
            config=vmtc,
            model=self.name,
            prompt=prompt,
            backend=", ".join(sorted(noting.backends)) or "none, as no token is merged",
            device=str(self.model.device),
            seconds=seconds,
            focus=focus,
        )

    def answers(
        self, image: Image.Image, prompt: str, vmtc: VMTCConfig, cmai: CMAIConfig | None = None
    ) -> Iterator[Answer]:
        """What the model answers as it is, with VMTC, and with CMAI on top."""
        return answers(self.model, self.processor, self.name, image, prompt, vmtc, cmai)

    def _layer(self, layer: int | None) -> tuple[int, int]:
        """Its index, and how many there are."""
        layers = self.model.config.get_text_config().num_hidden_layers
        index = layers // 2 if layer is None else layer
        if not -layers <= index < layers:
            raise InputError(f"{self.name} has {layers} text layers, none is layer {index}")
        return int(index % layers), int(layers)

    def _text(self, prompt: str) -> str:
        with checkpoints.refusals(f"{self.name} cannot run"):
            return checkpoints.conversation(self.processor, prompt)

    def _inputs(self, handle: Any, image: Image.Image, text: str) -> Any:
        options = checkpoints.text_options(self.processor, text)
        return handle.prepare(images=[[image]], text=[text], text_kwargs=options)

    def _after_image(self, ids: Tensor) -> list[str]:
        """The text after the image, token by token."""
        places = (ids == self.model.config.image_token_id).nonzero()[:, 0].tolist()
        if not places or places[-1] == len(ids) - 1:
            raise InputError(f"{self.name}: there is no text after the image")
        return words_of(self.processor.tokenizer, ids[places[-1] + 1 :].tolist())

    def _run(self, inputs: Any) -> float:
        """Seconds of a forward pass."""
        start = time.perf_counter()
        self.model.model(**inputs, use_cache=False)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class _Noting(VMTCConfig):
    """Settings that note by which backends they merge."""

    backends: set[str] = field(default_factory=set)

    def merge(
        self,
        x: Tensor,
        scores: Tensor,
        *,
        features: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> MergedTokens:
        counts = self.counts(x.shape[1])
        explanation = _registry.explain(
            "merge_tokens", x, scores, *counts, features=features, valid=valid
        )
        self.backends.add(explanation.backend)
        return super().merge(x, scores, features=features, valid=valid)


class _Slots(NamedTuple):
    """of_row i64, scores f32: of each row of the projector; primary, group: of each slot; shown
    i64: of each image token that is left the row, -1 if it is no patch's."""

    of_row: Tensor
    scores: Tensor
    primary: Tensor
    group: Tensor
    shown: Tensor


def _slots(merged: list[Any], layout: Any, config: VMTCConfig) -> _Slots:
    """The units' slots, numbered one after the other."""
    of_row = torch.full((layout.size,), CUT)
    scores = torch.full((layout.size,), torch.nan)
    stays = torch.zeros(layout.size, dtype=torch.bool)
    primary, group = [], []
    count = 0
    for rows, owner, score, place, _ in (map(Tensor.cpu, units) for units in merged):
        units, slots = place.shape
        number = torch.arange(slots)
        first = count + slots * torch.arange(units)[:, None]
        of_row[rows] = torch.where(owner < 0, DROPPED, owner + first)
        scores[rows] = score.float()
        stays[rows.gather(1, place)] = True
        kept, clusters = layout.counts(config, rows.shape[1])
        # where nothing has to go, nothing is clustered
        if kept + clusters == rows.shape[1]:
            kept = slots
        primary.append((number < kept).repeat(units))
        group.append((number - kept).repeat(units))
        count += units * slots
    is_patch = stays.clone()
    stays[layout.fixed] = True
    shown = layout.rows[layout.shown(stays)]
    shown = torch.where((shown >= 0) & is_patch[shown], shown, -1)
    return _Slots(of_row, scores, torch.cat(primary), torch.cat(group), shown)


def _focus(
    result: Any, slots: _Slots, place: int, what: str
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Of each slot score and inhibition, then how many image tokens are inhibited, and of all."""
    scores = result.scores[0, :, place].mean(0).float().cpu()
    tokens = len(slots.shown)
    inhibited = unpack(result.mask[0, 0, place], tokens).cpu()
    if not scores.isfinite().all():
        raise InputError(f"{what}: the attention is not finite")
    patch = slots.shown >= 0
    of_token = slots.of_row[slots.shown[patch]]
    by_slot = torch.zeros(len(slots.primary)).index_put((of_token,), scores[:tokens][patch])
    hidden = torch.zeros(len(slots.primary), dtype=torch.bool)
    hidden[of_token] = inhibited[patch]
    return by_slot.numpy(), hidden.numpy(), int(inhibited.sum()), tokens
