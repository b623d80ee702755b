"""Models of transformers for the commands; needs the extra ``transformers``."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

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
    with refusals(f"cannot load {source}"):
        kind = transformers.AutoConfig.from_pretrained(source).model_type
        if kind not in types:
            raise InputError(f"--model must be {expected}, {source} is of type {kind!r}")
        processor = transformers.AutoProcessor.from_pretrained(source)
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            source, dtype="auto", output_loading_info=True
        )
        if info["missing_keys"]:
            raise InputError(f"{source} lacks weights: {min(info['missing_keys'])}")
        model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return model, processor


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
