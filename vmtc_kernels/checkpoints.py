"""Models of transformers for the commands; needs the extra ``transformers``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import laboratory
from .patches import InputError


def transformers_package() -> Any:
    """transformers, told to be silent: its reports would only bury our own line."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f'--model needs {error.name}: pip install "vmtc-kernels[transformers]"'
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load(source: str, types: Collection[str], expected: str) -> tuple[Any, Any]:
    """A model that answers with text, on the GPU if there is one, and its processor.

    source: a folder or a model id, as `from_pretrained` of transformers takes it (which looks into
        its cache and, unless ``HF_HUB_OFFLINE`` is set, on the hub); expected: the ``types`` of
        model that it may be, in words.
    """
    transformers = transformers_package()
    kind = type_of(source)
    if kind not in types:
        raise InputError(f"--model must be {expected}, {source} is of type {kind!r}")
    with refusals(f"cannot load {source}"):
        processor = transformers.AutoProcessor.from_pretrained(source)
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            source, dtype="auto", output_loading_info=True
        )
        if info["missing_keys"]:
            raise InputError(f"{source} lacks weights: {min(info['missing_keys'])}")
        model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return model, processor


def type_of(source: str) -> str:
    """The type of a model, as its configuration names it."""
    transformers = transformers_package()
    with refusals(f"cannot load {source}"):
        return str(transformers.AutoConfig.from_pretrained(source).model_type)


def name_of(source: str, model: Any) -> str:
    """A loaded model's name for the user."""
    return laboratory.name_of(source, sum(part.numel() for part in model.parameters()))


def conversation(processor: Any, prompt: str) -> str:
    """The prompt after one placeholder, in the template of the model's chat if it has one."""
    for token in (processor.image_token, getattr(processor, "video_token", None)):
        if token and token in prompt:
            raise InputError(f"--prompt must not contain {token}: there is one image")
    if not getattr(processor, "chat_template", None):
        return f"USER: {processor.image_token}\n{prompt} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    turn = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def text_options(processor: Any, text: str) -> dict[str, bool]:
    """How the tokenizer takes such a text: a template may have written the first token already."""
    start = processor.tokenizer.bos_token
    return {"add_special_tokens": not (start and text.startswith(start))}


def integration(module: str = "") -> Any:
    """Our integration of transformers, or a module of it: it refuses one that is too old."""
    transformers_package()
    try:
        return importlib.import_module(f"vmtc_kernels.integrations.transformers{module}")
    except ImportError as error:
        raise InputError(str(error)) from error


@contextmanager
def settings() -> Iterator[None]:
    """Refusals of the integration, which are the user's to mend, without the names of its parts."""
    try:
        yield
    except ValueError as error:
        text = str(error).splitlines()[0]
        text = re.sub(r"^(attach|prepare): |(VMTC|CMAI)Config(\.|: )", "", text)
        raise InputError(text) from error


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Errors of other packages, whose causes are many, in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{what}: {lines[0] if lines else type(error).__name__}") from error
