"""What a request of lmms-eval asks: a prompt and its images, and how to generate the answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image

# lmms-eval puts this into every task that names no end of its own. As a real end it would cut a
# longer answer at its first empty line, so its models leave it out.
NO_END = ["\n\n"]


class Prompt(NamedTuple):
    """``text``, as the chat template writes it, with a placeholder for each of ``images``."""

    text: str
    images: list[Any]


def prompt_of(processor: Any, messages: Any) -> Prompt:
    """Of messages ``[{"role": ..., "content": [{"type": "text" or "image", ...}, ...]}, ...]``.

    Raises:
        NotImplementedError: a video or a sound.
        TypeError: an image that is neither a picture nor a file's name.
    """
    turns, images = [], []
    for message in messages:
        content = []
        for part in message["content"]:
            kind = part["type"]
            if kind == "text":
                content.append({"type": "text", "text": part["text"]})
            elif kind == "image":
                content.append({"type": "image"})
                images.append(_image(part["url"]))
            else:
                raise NotImplementedError(f"vmtc_hf reads images and text, the task has a {kind}")
        turns.append({"role": message["role"], "content": content})
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return Prompt(text, images)


def user_turn(images: Any, text: str) -> Any:
    """Messages of a task that gives images, or none, and a question."""
    content = [{"type": "image", "url": image} for image in images or []]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _image(given: Any) -> Any:
    if isinstance(given, str | os.PathLike):
        with Image.open(given) as image:
            return image.convert("RGB")
    if not isinstance(given, Image.Image):
        raise TypeError(
            f"vmtc_hf: an image must be a PIL image or a file's name, got {type(given).__name__}"
        )
    return given.convert("RGB")


def generation_of(asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options of ``generate``, and the texts at which an answer ends, of a task's settings.

    Greedy where ``do_sample`` is false or, if it is not given, the temperature is 0 or not given
    either; a temperature of 0 always is. 1024 new tokens, unless the task says otherwise.
    ``generate`` refuses what it does not know.

    Raises:
        ValueError: several answers to one prompt.
    """
    options = dict(asked)
    ends = options.pop("until", None) or []
    ends = [ends] if isinstance(ends, str) else [end for end in ends if end]
    if ends == NO_END:
        ends = []
    # how LLaVA's own code cuts images up; here the processor knows
    options.pop("image_aspect_ratio", None)
    if options.get("num_return_sequences", 1) != 1:
        raise ValueError("vmtc_hf gives one answer: use repeats, not num_return_sequences")
    options.setdefault("max_new_tokens", 1024)
    temperature = options.get("temperature")
    options["do_sample"] = temperature != 0 and bool(options.get("do_sample", temperature))
    if not options["do_sample"]:
        # None takes away what the model's own settings say of sampling
        options.update(temperature=None, top_p=None, top_k=None)
    return options, ends


class Ends(transformers.StoppingCriteria):
    """Ends an answer in which one of ``ends`` stands; the prompt has ``length`` tokens."""

    def __init__(self, ends: list[str], length: int, decode: Any) -> None:
        self.ends, self.length, self.decode = ends, length, decode

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        answers = self.decode(input_ids[:, self.length :])
        found = [any(end in answer for end in self.ends) for answer in answers]
        return torch.tensor(found, device=input_ids.device)


def cut(answer: str, ends: list[str]) -> str:
    """The answer up to the first of ``ends``."""
    return min((answer.split(end, 1)[0] for end in ends), key=len, default=answer)
