"""The trained model as a folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from vmtc_kernels.laboratory import LAB

from . import model as models

FOLDER = LAB


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights in float16, which are read as float32: no CPU counts faster in float16."""
    half = models.build(len(tokenizer))
    half.load_state_dict({name: t.detach().half() for name, t in model.state_dict().items()})
    half.half().save_pretrained(folder)
    config = half.config
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32
    config.save_pretrained(folder)
    models.processor(tokenizer).save_pretrained(folder)


def load(folder: Path = FOLDER) -> tuple[Any, Any]:
    """The model, ready to answer, and its processor."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder)
