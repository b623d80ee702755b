"""What ``model_args`` may say, and what is refused of it before any weight is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from typing import Any

import torch

from ...config import CMAIConfig, VMTCConfig

# names and types as they are written in the two configurations
VMTC = {field.name: str(field.type) for field in dataclasses.fields(VMTCConfig)}
CMAI = {field.name: str(field.type) for field in dataclasses.fields(CMAIConfig)}
OTHERS = {
    "pretrained": "str",
    "downsample": "int",
    "batch_size": "int",
    "device": "str",
    "dtype": "str",
    "attn_implementation": "str",
    "revision": "str",
    "trust_remote_code": "bool",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is loaded, and what is attached to it: nothing for the baseline.

    ``batch_size``: prompts at a time; ``device``: None for the first GPU, or the CPU if there is
    none; ``dtype``: None for that of the weights; ``attn_implementation``, ``revision``: None for
    what transformers takes by itself.
    """

    pretrained: str
    vmtc: VMTCConfig | None = None
    cmai: CMAIConfig | None = None
    downsample: int | None = None
    batch_size: int = 1
    device: str | None = None
    dtype: torch.dtype | None = None
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def settings_of(arguments: dict[str, Any]) -> Settings:
    """The settings that lmms-eval's arguments mean: those of model_args, batch size and device.

    Values are as lmms-eval reads them: ``128`` an int, ``0.25``, ``1.0`` and ``-2`` floats,
    ``true`` a bool, all else text. VMTC is on where any field of `VMTCConfig` is given, CMAI where
    any of `CMAIConfig` is; the other fields have their defaults.

    Raises:
        ValueError: an unknown argument, a value that does not fit, or arguments that exclude one
            another, each by name.
    """
    known = {**OTHERS, **VMTC, **CMAI}
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise ValueError(f"vmtc_hf: unknown argument {name!r}{hint}")
    given = {name: _read(name, known[name], value) for name, value in arguments.items()}
    if not given.get("pretrained"):
        raise ValueError("vmtc_hf: pretrained is missing: the folder or id of a model")
    if "threshold" in given:
        given.setdefault("keep_ratio", None)
    vmtc = {name: value for name, value in given.items() if name in VMTC}
    cmai = {name: value for name, value in given.items() if name in CMAI}
    others = {name: value for name, value in given.items() if name in OTHERS}
    if "downsample" in others:
        if vmtc:
            raise ValueError(
                f"vmtc_hf: downsample and {', '.join(vmtc)} are both given: an image's tokens are"
                " either averaged by cell or merged by VMTC"
            )
        if others["downsample"] < 2:
            raise ValueError(f"vmtc_hf: downsample must be at least 2, got {others['downsample']}")
    if others.get("batch_size", 1) < 1:
        raise ValueError(f"vmtc_hf: batch_size must be at least 1, got {others['batch_size']}")
    if "dtype" in others:
        others["dtype"] = _dtype(others["dtype"])
    return Settings(
        vmtc=VMTCConfig(**vmtc) if vmtc else None,
        cmai=CMAIConfig(**cmai) if cmai else None,
        **others,
    )


def _read(name: str, kind: str, value: Any) -> Any:
    """The value of a field whose type is written ``kind``."""
    if isinstance(value, float) and value.is_integer() and "float" not in kind:
        value = int(value)  # a number with a sign comes as a float
    if "tuple" in kind:
        return _layers(name, value)
    if type(value) is int and kind == "str":
        value = str(value)  # a folder's name, for example
    if type(value) is int and "int" not in kind and "float" in kind:
        value = float(value)
    if name == "batch_size" and isinstance(value, str) and value.isdecimal():
        value = int(value)  # the command line hands on text
    types = {"bool": bool, "int": int, "float": float, "str": str, "Literal": str}
    if type(value) not in [each for word, each in types.items() if word in kind]:
        kinds = kind.removesuffix(" | None").replace(" | ", " or ")
        raise ValueError(f"vmtc_hf: {name} must be {kinds}, got {value!r}")
    return value


def _layers(name: str, value: Any) -> tuple[int, ...] | str | None:
    """``[0,-1]``, which lmms-eval leaves as text, one number, ``upper``, or ``all``."""
    if value in ("upper", "all"):
        return None if value == "all" else "upper"
    try:
        layers = json.loads(value) if isinstance(value, str) else [value]
    except json.JSONDecodeError:
        layers = None
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(
            f"vmtc_hf: {name} must be upper, all, or a list of ints as [0,1,-1], got {value!r}"
        )
    return tuple(layers)


def _dtype(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"vmtc_hf: dtype must be auto, float32, bfloat16 or float16, got {name!r}")
    return dtype
