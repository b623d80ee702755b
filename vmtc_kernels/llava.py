"""A LLaVA model as the source of focus scores; needs the extra ``transformers``."""

from __future__ import annotations

import importlib
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import _modality, _registry, checkpoints
from .answers import Answer, answers
from .config import CMAIConfig
from .focus_mask import unpack
from .patches import InputError

# no other package's: transformers has one table of attention functions for the whole process
_KEY = "vmtc_focus_kept"


@dataclass(frozen=True)
class Focus:
    """What each text token after the image focuses on, in one layer.

    ``photo``: uint8 ``[S, S, 3]``, the pixels that the ``grid`` x ``grid`` patches cover;
    ``words``: the text of each of the T tokens, which put together are the text after the image;
    ``scores``: f32 ``[T, I]``; ``inhibited``: bool ``[T, I]``, the image tokens that the rule of
    ``config`` takes from it; ``layer`` of ``layers``, counted from 0; ``model``: its name;
    ``backend``: that of the scores.
    """

    photo: np.ndarray
    grid: int
    words: list[str]
    scores: np.ndarray
    inhibited: np.ndarray
    config: CMAIConfig
    layer: int
    layers: int
    model: str
    backend: str


class Llava:
    """A LLaVA model for one photograph and one prompt at a time, on the GPU if there is one.

    source: a folder or a model id, as `from_pretrained` of transformers takes it (which looks into
        its cache and, unless ``HF_HUB_OFFLINE`` is set, on the hub).

    ``size`` and ``patch`` are the sides in pixels of the square photograph and of its patches.
    """

    def __init__(self, source: str) -> None:
        self.model, self.processor = checkpoints.load(source, ["llava"], "a LLaVA model")
        _register(importlib.import_module("transformers"))
        self.name = checkpoints.name_of(source, self.model)
        vision = self.model.config.vision_config
        self.size, self.patch = vision.image_size, vision.patch_size

    def focus(
        self, photo: np.ndarray, prompt: str, config: CMAIConfig, layer: int | None = None
    ) -> Focus:
        """Focus scores and inhibited image tokens of a layer, the middle one by default.

        photo: uint8 ``[size, size, 3]``; layer: counted as in a Python list. Queries and keys are
        those of a forward pass in which nothing is inhibited, after the rotary embedding.
        """
        index, attention = self._attention(layer)
        with checkpoints.refusals(f"{self.name} cannot run"):
            inputs = self._inputs(photo, prompt)
            ids, grid = inputs["input_ids"], self.size // self.patch
            is_image = ids == self.model.config.image_token_id
            after = self._after_image(is_image[0], grid**2)
            modality = torch.where(is_image, _modality.IMAGE, _modality.TEXT).to(torch.uint8)
            with torch.inference_mode():
                q, k, v, scale = self._kept(attention, inputs)
                explanation = _registry.explain("focus_scores", q, k, modality, grid**2)
                result: Any = config.attention(
                    *(q, k, v, modality, grid**2),
                    scale=scale,
                    return_scores=True,
                    return_mask=True,
                )
        scores = result.scores[0].mean(0)[after].float().cpu()
        if not scores.isfinite().all():
            raise InputError(f"{self.name}: the attention of layer {index} is not finite")
        return Focus(
            photo=photo[: grid * self.patch, : grid * self.patch],
            grid=grid,
            words=words_of(self.processor.tokenizer, ids[0, after].tolist()),
            scores=scores.numpy(),
            inhibited=unpack(result.mask[0, 0, after], grid**2).cpu().numpy(),
            config=config,
            layer=index,
            layers=self.model.config.text_config.num_hidden_layers,
            model=self.name,
            backend=explanation.backend,
        )

    def answers(self, photo: np.ndarray, prompt: str, config: CMAIConfig) -> Iterator[Answer]:
        """What the model answers as it is, and where its layers inhibit."""
        image = Image.fromarray(photo)
        return answers(self.model, self.processor, self.name, image, prompt, cmai=config)

    def _attention(self, layer: int | None) -> tuple[int, Any]:
        layers = self.model.model.language_model.layers
        index = len(layers) // 2 if layer is None else layer
        if not -len(layers) <= index < len(layers):
            raise InputError(f"{self.name} has {len(layers)} text layers, none is layer {index}")
        return index % len(layers), layers[index].self_attn

    def _inputs(self, photo: np.ndarray, prompt: str) -> Any:
        """Ids and pixels of the prompt, in the template of the model's chat if it has one."""
        text = checkpoints.conversation(self.processor, prompt)
        inputs = self.processor(
            images=Image.fromarray(photo),
            text=text,
            return_tensors="pt",
            text_kwargs=checkpoints.text_options(self.processor, text),
            # the patches must be those of this photograph, which has the model's size
            images_kwargs={"do_resize": False},
        )
        shape = tuple(inputs["pixel_values"].shape)
        if shape != (1, 3, self.size, self.size):
            raise InputError(
                f"{self.name} must read an image as one of {self.size} pixels, its processor makes"
                f" {list(shape)} of it"
            )
        return inputs.to(self.model.device, self.model.dtype)

    def _after_image(self, is_image: Tensor, count: int) -> slice:
        """The positions of the text after the image, where it is one block of the grid's size."""
        places = is_image.nonzero()[:, 0].tolist()
        if len(places) != count or places[-1] - places[0] != count - 1:
            raise InputError(
                f"{self.name} must read one image as one block of {count} tokens, got {len(places)}"
                " in all"
            )
        if places[-1] == len(is_image) - 1:
            raise InputError(f"{self.name}: there is no text after the image")
        return slice(places[-1] + 1, None)

    def _kept(self, attention: Any, inputs: Any) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """Queries, keys, values and scale of one layer's attention in a forward pass."""
        kept: dict[str, Any] = {}
        former = self.model.config.text_config._attn_implementation
        self.model.set_attn_implementation({"text_config": _KEY})
        attention.vmtc_kept = kept
        try:
            self.model.model(**inputs, use_cache=False)
        finally:
            del attention.vmtc_kept
            self.model.set_attn_implementation({"text_config": former})
        return kept["q"], kept["k"], kept["v"], kept["scale"]


def choose(words: list[str], token: str | None) -> int:
    """The text token that is asked about: the last one for None.

    token: "-1", "-2" and so on count from the end; anything else is a piece of the text after the
    image, and the token is the one in which its last occurrence ends, as that has read it all.
    """
    if token is None:
        return len(words) - 1
    if re.fullmatch(r"-[1-9]\d*", token):
        if int(token) < -len(words):
            raise InputError(f"--token {token}: the image is followed by {len(words)} text tokens")
        return len(words) + int(token)
    text = "".join(words)
    start = text.rfind(token) if token else -1
    if start < 0:
        raise InputError(f"--token {token!r} is not in the text after the image, {text!r}")
    return bisect_left(list(accumulate(map(len, words))), start + len(token))


def words_of(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text of those before it: a token alone may lose its space."""

    def decode(count: int) -> str:
        return tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)

    whole, end, words = decode(len(ids)), 0, []
    for count in range(1, len(ids) + 1):
        # a character of several tokens belongs to the last of them
        text = decode(count).rstrip("\N{REPLACEMENT CHARACTER}") if count < len(ids) else whole
        words.append(whole[end : len(text)])
        end = max(end, len(text))
    return words


def _register(transformers: Any) -> None:
    """Stock attention under our own key: it keeps its inputs where its layer has room for them."""
    stock = transformers.AttentionInterface()["sdpa"]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> Any:
        kept = module.__dict__.get("vmtc_kept")
        if kept is not None:
            kept.update(q=query, k=key, v=value, scale=kw.get("scaling"))
        return stock(module, query, key, value, *args, **kw)

    transformers.AttentionInterface.register(_KEY, attend)
    # without a mask function of the same key there would be no mask at all
    masks = transformers.AttentionMaskInterface
    masks.register(_KEY, masks()["sdpa"])
