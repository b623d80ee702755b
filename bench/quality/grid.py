"""What is measured: reducers at budgets, and what VMTC and CMAI leave open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmtc_kernels import CMAIConfig

from .reducers import NAMED, TOKENS, VMTC, Reducer

HALF, QUARTER, EIGHTH = 72, 36, 17
PARTS = {
    "budgets": "every reducer at half, a quarter and an eighth of the tokens",
    "vmtc": "what the paper leaves open in VMTC, one setting at a time",
    "cmai": "CMAI alone and on a quarter of the tokens",
    "pilot": "spatial downsampling at every factor",
    "tuned": "reducers at a quarter of the tokens after a short fine-tuning with each in place",
}
# for images that the parts do not have: what was chosen on theirs, and its rivals
CONFIRMED = "confirmed"


@dataclass(frozen=True)
class Row:
    """``part``: of `PARTS`, or `CONFIRMED`; ``name``: in its table; ``tuned``: steps of fine-tuning
    before."""

    part: str
    name: str
    reducer: Reducer
    tokens: int
    tuned: int = 0

    @property
    def key(self) -> str:
        """What is measured, whatever it is called."""
        settings = {k: v for k, v in self.reducer.settings.items() if k != "name"}
        return f"{type(self.reducer).__name__} {self.tokens} {self.tuned} {settings}"


def rows(parts: tuple[str, ...], quick: bool = False) -> list[Row]:
    """Of the parts, the unreduced model first; quick: without what costs most for what it tells."""
    makers = {"budgets": _budgets, "vmtc": _vmtc, "cmai": _cmai, "pilot": _pilot, "tuned": _tuned}
    makers[CONFIRMED] = _confirmed
    found = [] if CONFIRMED in parts else [Row("budgets", "none", NAMED["none"](), TOKENS)]
    for part in parts:
        found += makers[part](quick)
    return found


def _budgets(quick: bool) -> list[Row]:
    return [
        Row("budgets", name, reducer, tokens)
        for tokens in (HALF, QUARTER, EIGHTH)
        for name, make in NAMED.items()
        if (reducer := make()).counts(tokens)
    ]


def _vmtc(quick: bool) -> list[Row]:
    tried: list[dict[str, Any]] = [{}]
    tried += [{"metric": "euclidean"}, {"weighting": "uniform"}]
    tried += [{"metric": "euclidean", "weighting": "uniform"}]
    tried += [{"feature_layer": "keys"}, {"feature_layer": "keys", "weighting": "uniform"}]
    tried += [{"share": share} for share in (0.0, 0.1, 0.2, 0.35, 0.65, 0.8, 1.0)]
    tried += [{"share": 0.2, "weighting": "uniform"}, {"share": 1.0, "weighting": "uniform"}]
    tried += [{"head_reduction": "max"}, {"score_layer": -3}, {"score_layer": -1}]
    tried += [{"iterations": 0}, {"iterations": 3}]
    tried += [{"placement": "after_projector"}, {"placement": 3, "score_layer": 3}]
    if quick:
        tried = [t for t in tried if not {"iterations", "placement", "head_reduction"} & set(t)]
    return [
        Row("vmtc", _told(settings), VMTC(name="VMTC", **settings), tokens)
        for tokens in ((QUARTER,) if quick else (QUARTER, EIGHTH))
        for settings in tried
    ]


def _cmai(quick: bool) -> list[Row]:
    tried: list[dict[str, Any]] = [{"keep_ratio": ratio} for ratio in (0.75, 0.5, 0.25)]
    tried += [{"keep_ratio": None, "threshold": t} for t in (0.02, 0.1, 0.3)]
    tried += [{"aggregate": "residual"}, {"head_mode": "per_head"}, {"renormalize": False}]
    tried += [{"suppression": 0.5}, {"layers": (0, 1, 2)}]
    tried += [{"layers": None, "keep_ratio": ratio} for ratio in (0.75, 0.5, 0.25)]
    tried += [{"decode": False}, {"prefill": False}]
    if quick:
        tried = [t for t in tried if not {"renormalize", "decode", "prefill"} & set(t)]
    return [
        Row("cmai", f"CMAI {_told(settings)}", make(cmai=CMAIConfig(**settings)), tokens)
        for make, tokens in ((NAMED["none"], TOKENS), (NAMED["VMTC"], QUARTER))
        for settings in tried
    ]


def _pilot(quick: bool) -> list[Row]:
    return [
        Row("pilot", f"downsampling by {factor}", NAMED["downsampling"](), (12 // factor) ** 2)
        for factor in (2, 3, 4, 6)
    ]


def _tuned(quick: bool) -> list[Row]:
    steps = 40
    names = ("downsampling", "random", "strided", "VMTC", "ToMe", "VisionZip", "PruMerge")
    return [
        Row("tuned", name, NAMED[name](), tokens, steps)
        for name, tokens in (("none", TOKENS), *((name, QUARTER) for name in names))
    ]


def _confirmed(quick: bool) -> list[Row]:
    """Of each budget the default first."""
    found: list[tuple[str, Reducer, int]] = []
    for tokens in (TOKENS, HALF, QUARTER, EIGHTH):
        plain = NAMED["none" if tokens == TOKENS else "VMTC"]
        found.append(("none" if tokens == TOKENS else "VMTC", plain(), tokens))
        if tokens in (QUARTER, EIGHTH):
            for share in (0.0, 0.2, 0.8):
                found.append((f"VMTC, share {share}", plain(share=share), tokens))
        if tokens < TOKENS:
            rivals = ("VisionZip", "PruMerge+", "FastV")
            found += [(name, NAMED[name](), tokens) for name in rivals]
        if tokens in (TOKENS, QUARTER):
            found.append(("CMAI", plain(cmai=CMAIConfig()), tokens))
            found.append(("CMAI, layers all", plain(cmai=CMAIConfig(layers=None)), tokens))
    return [Row(CONFIRMED, *each) for each in found]


def _told(settings: dict[str, Any]) -> str:
    told = {k: v for k, v in settings.items() if v is not None or k == "layers"}
    told = {k: "all" if v is None else v for k, v in told.items()}
    return ", ".join(f"{name} {value}" for name, value in told.items()) or "as it is"
