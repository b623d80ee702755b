"""A model of lmms-eval, ``vmtc_hf``, and the paper's table of its results.

The benchmarks' commands are in docs/evaluation.md. ``python -m vmtc_kernels.integrations.lmms_eval
FOLDER...`` prints the table.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What the entry point ``vmtc_hf`` of the group ``lmms_eval.models`` tells lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    here = f"{__name__}._model"
    return ModelManifest(
        model_id="vmtc_hf",
        chat_class_path=f"{here}.VmtcHf",
        simple_class_path=f"{here}.VmtcHfSimple",
    )
