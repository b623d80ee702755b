"""VMTC and CMAI in models of Hugging Face transformers, from 5.17: see `attach`."""

from importlib.metadata import version as _version

if tuple(int(part) for part in _version("transformers").split(".")[:2]) < (5, 17):
    raise ImportError(
        "vmtc_kernels.integrations.transformers needs transformers 5.17 or newer, this is"
        f" {_version('transformers')}: pip install -U transformers"
    )

from ._families import FAMILIES as _FAMILIES
from ._handle import Handle, Last, attach

MODEL_TYPES = tuple(_FAMILIES)  # as a model's configuration names them

__all__ = ["MODEL_TYPES", "Handle", "Last", "attach"]
