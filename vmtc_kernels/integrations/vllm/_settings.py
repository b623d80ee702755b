"""What the user asks of the plugin, and how every process of the engine gets to know it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...config import CMAIConfig, VMTCConfig

KINDS: Mapping[str, type] = {"vmtc": VMTCConfig, "cmai": CMAIConfig}
VARIABLES = {"vmtc": "VMTC_VLLM_VMTC", "cmai": "VMTC_VLLM_CMAI"}
# on the configuration of the model, which the engine sends to all its processes
ATTRIBUTE = "vmtc_kernels"


class Settings(NamedTuple):
    vmtc: VMTCConfig | None
    cmai: CMAIConfig | None


def asked(additional: Any) -> dict[str, dict[str, Any]]:
    """The settings in ``--additional-config`` and in the environment, as plain objects.

    Raises ValueError where they are no objects or the two places differ.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind, variable in VARIABLES.items():
        if (text := os.environ.get(variable)) is not None:
            try:
                found[kind] = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{variable} must be a JSON object, got {text!r}") from error
            _check_object(variable, found[kind])
        if isinstance(additional, Mapping) and additional.get(kind) is not None:
            given, name = additional[kind], f"additional_config[{kind!r}]"
            _check_object(name, given)
            if found.setdefault(kind, dict(given)) != given:
                raise ValueError(f"{variable} and {name} differ: {found[kind]} and {given}")
    return found


def parse(given: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Raises ValueError and TypeError for unknown fields and values out of range, named."""
    return Settings(*(_config(kind, given[kind]) if kind in given else None for kind in KINDS))


def settings_of(model_config: Any) -> Settings:
    """Of a model that the engine configured: both None where the plugin is not in use."""
    return parse(getattr(model_config.hf_config, ATTRIBUTE, {}))


def _config(kind: str, given: Mapping[str, Any]) -> Any:
    config = KINDS[kind]
    known = [field.name for field in dataclasses.fields(config)]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(
            f"{kind}: {config.__name__} has no {', '.join(unknown)}, only {', '.join(known)}"
        )
    # JSON has no tuples
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _check_object(name: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be an object of settings, got {given!r}")
