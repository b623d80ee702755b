"""The Python blocks of the README run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vmtc_kernels

README = Path(__file__).parents[1] / "README.md"


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert "torch.Size([4, 160, 1024])" in capsys.readouterr().out
    # the decode loop: its last step saw the whole cache, and its state was kept
    assert names["out"].shape == (1, 32, 1, 128) and names["at"].tolist() == [[703]]
    text = (names["modality"] == 1)[0]
    assert (names["state"][0, 0, text][35:].sum(1) > 0).all()
    with vmtc_kernels.use_backend("reference"):
        last = names["cmai"].attention(
            *(names[name] for name in ("q", "k", "v", "modality")),
            576,
            text_image=names["state"].clone(),
            query_positions=names["at"],
        )
    torch.testing.assert_close(names["out"], last, rtol=1e-4, atol=1e-4)
