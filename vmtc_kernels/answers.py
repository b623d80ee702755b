"""What a model answers to a question on a picture, as it is and with less of it; needs the extra
``transformers``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image

from . import checkpoints
from .config import CMAIConfig, VMTCConfig

# tokens after which an answer is cut off
LONGEST = 48


class Answer(NamedTuple):
    """how: "unmodified", "VMTC", "CMAI" or "VMTC and CMAI"; image_tokens: in the prompt; text: as
    the model wrote it, with an ellipsis where it was cut off; seconds: to its end."""

    how: str
    image_tokens: int
    text: str
    seconds: float


def answers(
    model: Any,
    processor: Any,
    name: str,
    image: Image.Image,
    prompt: str,
    vmtc: VMTCConfig | None = None,
    cmai: CMAIConfig | None = None,
    *,
    warm: bool = False,
) -> Iterator[Answer]:
    """The answer of a model as it is, then one with ``vmtc``, then one with ``cmai`` on top.

    Either may be left out, and a ``cmai`` that inhibits nothing is. Each token is the likeliest.

    name: of the model, for errors; warm: run each once before its time is taken.
    """
    attach = checkpoints.integration().attach
    runs: list[tuple[str, Any]] = [("VMTC", {"vmtc": vmtc})] if vmtc is not None else []
    if cmai is not None and inhibits(cmai):
        how = "CMAI" if vmtc is None else "VMTC and CMAI"
        runs.append((how, {"vmtc": vmtc, "cmai": cmai}))
    with checkpoints.refusals(f"{name} cannot answer"):
        text = checkpoints.conversation(processor, prompt)
        options = checkpoints.text_options(processor, text)
        given = {"images": [[image]], "text": [text], "text_kwargs": options, "padding": False}
        plain = processor(**given, return_tensors="pt").to(model.device, model.dtype)
        yield _answer(model, processor, "unmodified", plain, warm)
        for how, parts in runs:
            with checkpoints.settings():
                handle = attach(model, processor, **parts)
            with handle:
                with checkpoints.settings():
                    inputs = handle.prepare(**given)
                answer = _answer(model, processor, how, inputs, warm)
            yield answer


def inhibits(config: CMAIConfig) -> bool:
    """Whether there is anything that these settings could inhibit."""
    return config.keep_ratio != 1 if config.threshold is None else config.threshold > 0


def _answer(model: Any, processor: Any, how: str, inputs: Any, warm: bool) -> Answer:
    greedy = {"do_sample": False, "num_beams": 1}
    with torch.inference_mode():
        if warm:
            model.generate(**inputs, max_new_tokens=1, **greedy)
        start = time.perf_counter()
        ids = model.generate(**inputs, max_new_tokens=LONGEST, **greedy)[0].tolist()
        seconds = time.perf_counter() - start
    prompt = inputs["input_ids"][0]
    new = ids[len(prompt) :]
    text = processor.tokenizer.decode(
        new, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    ends = model.generation_config.eos_token_id
    ended = new[-1] in (ends if isinstance(ends, list) else [ends])
    image_tokens = int((prompt == model.config.image_token_id).sum())
    return Answer(how, image_tokens, text if ended else f"{text}…", seconds)
