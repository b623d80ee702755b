"""The laboratory's model, which lies in the package: a toy, and what the commands use by default.

It imports nothing, so that it can be asked without the extra ``demo``.
"""

from __future__ import annotations

from pathlib import Path

# a folder that `from_pretrained` of transformers reads; its README.md is the model card
LAB = Path(__file__).with_name("lab")
LAB_SCENE = LAB / "scene.png"
LAB_QUESTION = "what colour is the triangle? use exactly three words."
# behind the scene is a photograph that ships in scikit-image
LAB_CREDIT = "Scene: drawn on a CC0 photograph."
LAB_NOTE = (
    "The laboratory's model is a toy: it knows only the drawn shapes and words of its own world, so"
    " its answer on a photograph means little."
)

# of an image's tokens, kept and merged: 20 + 20 of 144, 80 + 80 of 576
PRIMARY, MERGED = "0.139", "0.139"


def is_lab(source: str | Path) -> bool:
    """Whether a model's folder or id is that of the laboratory's model."""
    return Path(source).resolve() == LAB.resolve()


def name_of(source: str, parameters: int) -> str:
    """A model's name for the user: the end of its folder or id."""
    if is_lab(source):
        return f"the laboratory's toy ({parameters / 1e6:.1f} M parameters)"
    return source.rstrip("/").rsplit("/", 1)[-1]
