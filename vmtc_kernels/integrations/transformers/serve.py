"""``python -m vmtc_kernels.integrations.transformers.serve MODEL``: the HTTP server of
``transformers serve``, OpenAI's API, with an attached model.

Needs ``pip install "transformers[serving]"``; nothing of the package imports this.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
import transformers
from transformers.utils.import_utils import is_serve_available

from ...config import CMAIConfig, VMTCConfig
from ._handle import Handle, attach

if not is_serve_available():
    raise ImportError(
        'serve needs fastapi, uvicorn and openai: pip install "transformers[serving]"'
    )

import uvicorn
from fastapi import FastAPI, HTTPException

# by parameter of build_server
HANDLERS = {
    "chat_handler": "chat_completion.ChatCompletionHandler",
    "completion_handler": "completion.CompletionHandler",
    "response_handler": "response.ResponseHandler",
    "systemone_handler": "systemone.SystemOneHandler",
    "transcription_handler": "transcription.TranscriptionHandler",
}


def build(handle: Handle, name: str) -> FastAPI:
    """The application of ``transformers serve`` for one model, to be run by uvicorn.

    Requests are generated one after another. Its chat completions and responses read images as
    compressed tokens; what it says of a prompt's length counts those.

    Args:
        handle: of `attach`; it stays attached as long as the application runs.
        name: of the model in requests, which may leave it out.

    Raises:
        ImportError: this version of transformers has no such server, and what is missing.
    """
    manager, state = Manager(handle, name), _part("utils.GenerationState")()
    build_server = _part("server.build_server")
    signature = inspect.signature(build_server)
    given = {"model_manager": manager, "generation_state": state}
    for parameter, handler in HANDLERS.items():
        # 5.17 has no System One
        if parameter in signature.parameters or parameter != "systemone_handler":
            given[parameter] = _part(handler)(manager, state)
    try:
        signature.bind(**given)
    except TypeError as error:
        raise _unknown(f"another build_server: {error}") from error
    return build_server(**given)


class Manager:
    """In place of the server's ``ModelManager``: one model, which is loaded already.

    It has what the server asks of one and no more, so that nothing else is loaded unattached.
    """

    def __init__(self, handle: Handle, name: str) -> None:
        self.force_model = name
        self.process_model_name = _part("model_manager.ModelManager.process_model_name")
        self.get_model_modality = _part("model_manager.ModelManager.get_model_modality")
        self._loaded = handle.model, Processor(handle)

    def load_model_and_processor(self, model_id: str, **_: Any) -> tuple[Any, Processor]:
        if model_id != self.process_model_name(self.force_model):
            raise HTTPException(400, f"this server has {self.force_model!r} only")
        return self._loaded

    def load_model_streaming(self, model_id: str, **_: Any) -> Iterator[str]:
        self.load_model_and_processor(model_id)
        event = {"status": "ready", "model": model_id, "cached": True}
        return iter([f"data: {json.dumps(event)}\n\n"])

    def list_models(self) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "local"}]

    # as it was called in 5.17
    get_gen_models = list_models

    def shutdown(self) -> None:
        """The model is not the server's to unload."""


class Processor:
    """The processor of a handle, whose chats have as many placeholders as there will be tokens."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle.processor, name)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        inputs = self._handle.processor.apply_chat_template(conversation, **options)
        try:
            return self._handle.shrink(inputs)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error


def _part(path: str) -> Any:
    """Something of ``transformers.cli.serving``."""
    module, name = path.split(".", 1)
    try:
        return attrgetter(name)(importlib.import_module(f"transformers.cli.serving.{module}"))
    except (ImportError, AttributeError) as error:
        raise _unknown(f"no transformers.cli.serving.{path}") from error


def _unknown(what: str) -> ImportError:
    version = transformers.__version__
    return ImportError(
        f"serve knows the servers of transformers 5.17 to 5.24; {version} has {what}"
    )


def number(text: str) -> int | float:
    """A count, or a share if it has a point."""
    return int(text) if text.isdecimal() else float(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Load a model, attach to it and serve it until interrupted."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add = parser.add_argument
    add("model", help="folder or id of a vision-language model")
    add("--primary", type=number, default=128, help="tokens kept: a count, or a share as 0.25")
    add("--merged", type=number, default=32, help="tokens that the others become, likewise")
    add("--keep-ratio", type=float, help="inhibit too: share of image tokens a text token keeps")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help="bfloat16 for example; that of the weights by default")
    add("--host", default="localhost")
    add("--port", type=int, default=8000)
    given = parser.parse_args(arguments)
    try:
        vmtc = VMTCConfig(num_primary=given.primary, num_merged=given.merged)
        cmai = None if given.keep_ratio is None else CMAIConfig(keep_ratio=given.keep_ratio)
    except ValueError as error:
        parser.error(str(error))
    load = transformers.AutoModelForImageTextToText.from_pretrained
    model = load(given.model, dtype=given.dtype).to(given.device).eval()
    processor = transformers.AutoProcessor.from_pretrained(given.model)
    with attach(model, processor, vmtc=vmtc, cmai=cmai) as handle:
        uvicorn.run(build(handle, given.model), host=given.host, port=given.port)


if __name__ == "__main__":
    main()
