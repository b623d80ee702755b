"""Argument checks, shared by all operators: each raises with what was got and what was expected."""

from __future__ import annotations

from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor(op: str, name: str, value: Any, shape: str) -> None:
    """value must be a tensor with as many dimensions as ``shape`` names, e.g. ``"B, N, D"``."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor [{shape}], got {type(value).__name__}")
    if value.dim() != len(shape.split(",")):
        raise ValueError(f"{op}: {name} must be [{shape}], got shape {list(value.shape)}")


def floating(op: str, name: str, value: torch.Tensor) -> None:
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, float16, bfloat16 or float64, got {value.dtype}"
        )


def size(op: str, name: str, value: torch.Tensor, expected: tuple[Any, ...], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{op}: {name} must be {list(expected)} ({meaning}), got {list(value.shape)}"
        )


def same_device(op: str, name: str, value: torch.Tensor, x: torch.Tensor, x_name: str) -> None:
    if value.device != x.device:
        raise ValueError(
            f"{op}: {name} must be on {x.device} like {x_name}, got a tensor on {value.device}"
        )


def count(op: str, name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value}")


def option(op: str, name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{op}: {name} must be one of {list(options)}, got {value!r}")


def nonempty_features(op: str, name: str, value: torch.Tensor) -> None:
    if value.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have at least one feature, got {list(value.shape)}")


def valid_mask(op: str, valid: Any, x: torch.Tensor) -> None:
    """valid: bool [B, N] beside x: [B, N, D], or None."""
    if valid is None:
        return
    tensor(op, "valid", valid, "B, N")
    if valid.dtype != torch.bool:
        raise TypeError(f"{op}: valid must be bool, got {valid.dtype}")
    size(op, "valid", valid, tuple(x.shape[:2]), "B, N of x")
    same_device(op, "valid", valid, x, "x")
