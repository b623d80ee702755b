"""The Python blocks of the README run as they stand, one after the other."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vmtc_kernels

README = Path(__file__).parents[1] / "README.md"
EXAMPLE = "examples/llava.py"


def tiny_llava(folder: Path) -> Path:
    """A model of 576 visual tokens under the name that the README loads, and the photograph."""
    pytest.importorskip("transformers")
    import vlm

    Image.new("RGB", (80, 60), "red").save(folder / "photo.jpg")
    return vlm.save("llava", folder / "llava-hf/llava-1.5-7b-hf", image_size=24 * vlm.PATCH)


def test_the_code_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llava(tmp_path)
    monkeypatch.chdir(tmp_path)
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
    images = names["inputs"]["input_ids"] == names["model"].config.image_token_id
    assert images.sum() == 160 and names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
    torch.testing.assert_close(names["out"], last, rtol=1e-4, atol=1e-4)


def test_the_example_runs_on_a_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_llava(tmp_path)
    spec = importlib.util.spec_from_file_location("llava_example", README.parent / EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    options = ["--image", str(tmp_path / "photo.jpg"), "--tokens", "4", "--primary", "20"]
    monkeypatch.setattr("sys.argv", ["llava.py", "--model", str(source), *options])
    example.main()
    lines = [line.split(" tokens")[0].split(": ") for line in capsys.readouterr().out.splitlines()]
    names, counts = zip(*lines[::2], strict=True)
    assert names == ("unmodified", "VMTC", "VMTC and CMAI")
    # 20 kept and 13.9% of 576 merged
    assert int(counts[0]) - int(counts[1]) == 576 - 100 and counts[1] == counts[2]
