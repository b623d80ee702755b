"""The command `vmtc explain-image` and its errors."""

import sys

import pytest
import torch
from PIL import Image

from vmtc_kernels import cli

transformers = pytest.importorskip("transformers")

import vlm  # noqa: E402

PROMPT = "what colour is it?"


@pytest.fixture(autouse=True)
def one_thread(same_start):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        family: vlm.save(family, root / f"tiny-{family}")
        for family in ("llava", "llava_next", "qwen3_vl")
    }


@pytest.fixture
def vmtc(monkeypatch, capsys):
    """Run `vmtc explain-image` in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vmtc", "explain-image", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run


SHARES = ("--primary", "0.25", "--merged", "0.125")


def test_pruning_drops_what_is_not_kept(vmtc, folders, tmp_path):
    out = tmp_path / "a.png"
    arguments = ("--model", folders["llava"], "--primary", "10", "--merged", "0", "--out", out)
    code, stdout, stderr = vmtc(*arguments)
    assert code == 0, stderr
    text = " ".join(stdout.split())
    assert "image tokens 64 → 10 (10 primary + 0 merged)" in text and "54 of the patches" in text


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llava", "image tokens 64 → 24 (16 primary + 8 merged) importance attention from [CLS]"),
        ("llava_next", "image tokens 70 → 32 (16 primary + 10 merged + 6 that are no patches)"),
        ("qwen3_vl", "image tokens 54 → 21 (14 primary + 7 merged) importance attention received"),
    ],
)
def test_the_command_writes_the_picture_and_the_table(vmtc, folders, tmp_path, family, expected):
    out = tmp_path / "a.png"
    code, stdout, stderr = vmtc("--model", folders[family], *SHARES, "--out", out)
    assert code == 0, stderr
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width == 2000
    text = " ".join(stdout.split())
    assert expected in text and "image rocket, 640 x 427 pixels" in text
    assert f"model tiny-{family} backend cpu" in text or "backend reference" in text
    depth = 4 if family == "qwen3_vl" else 3
    assert f"layer {depth - 2} of {depth} of the vision encoder" in text
    assert "s, one forward pass on" in text and f"Picture: {out}" in stdout
    assert "answer, unmodified" in text and "answer, with VMTC" in text and "CMAI" not in text
    assert "inhibited" not in text and ("cut away" in text) == (family == "llava_next")


def test_options(vmtc, folders, tmp_path):
    image, out = tmp_path / "a.png", tmp_path / "b.png"
    vlm.photo(90, 70).save(image)
    arguments = ("--model", folders["llava"], "--image", image, "--out", out)
    code, stdout, stderr = vmtc(
        *(*arguments, "--primary", 10, "--merged", 6, "--metric", "euclidean"),
        *("--weighting", "uniform", "--placement", 0, "--score-layer", 0, "--feature-layer", 0),
        *("--score-source", "received", "--keep-ratio", 0.25, "--token", "colour", "--layer", 1),
        *("--prompt", PROMPT),
    )
    assert code == 0 and out.exists(), stderr
    text = " ".join(stdout.split())
    assert "90 x 70 pixels" in text
    assert "64 → 16 (10 primary + 6 merged)" in text and "attention received," in text
    assert "layer 0 of 3 of the vision encoder" in text and "text token ' colour'" in text
    assert f"prompt {PROMPT}" in text and "answer, with VMTC and CMAI" in text
    assert "inhibited 12 of 16 image tokens" in text and "in text layer 1" in text
    code, stdout, _ = vmtc(*arguments)
    assert code == 0 and "64 → 18 (9 primary + 9 merged)" in " ".join(stdout.split())
    code, stdout, _ = vmtc(*arguments, "--primary", "1.0", "--merged", 0)
    assert code == 0 and "64 → 64 (64 primary + 0 merged)" in " ".join(stdout.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image", "gone.png"], "no such image: gone.png"),
        (["--out", "a.jpg"], "--out must end in .png, got a.jpg"),
        (["--primary", "many"], "--primary must be a count or a share, got 'many'"),
        (["--primary", "-1"], "num_primary must be"),
        (["--primary", "1.5"], "num_primary as a share must be in [0, 1], got 1.5"),
        (["--primary", "62"], "must be 1 to 64 for an image of 64 tokens, got 62 + 9; shares"),
        (["--metric", "manhattan"], "metric must be one of ['cosine', 'euclidean']"),
        (["--placement", "nowhere"], "placement must be one of"),
        (["--placement", "2"], "placement is after layer 2, but llava takes features"),
        (["--score-layer", "3"], "score_layer is 3, the encoder has 3 layers: -3 to 2"),
        (["--keep-ratio", "2"], "keep_ratio must be in (0, 1], got 2"),
        (["--token", "it"], "--token and --layer need --keep-ratio"),
        (["--keep-ratio", "1", "--layer", "0"], "layer 0 of 3 inhibits nothing, only [1, 2] do"),
        (["--keep-ratio", "1", "--layer", "3"], "tiny-llava has 3 text layers, none is layer 3"),
        (["--keep-ratio", "1", "--token", "cow"], "--token 'cow' is not in the text after the"),
        (["--prompt", "<image> and <image>?"], "--prompt must not contain <image>: there is one"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    vmtc, folders, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = vmtc("--model", folders["llava"], *arguments)
    assert code == 2 and stdout == ""
    (line,) = stderr.splitlines()
    assert line.startswith("vmtc: ") and message in line
    assert "Config" not in line and "attach" not in line and "prepare" not in line
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused_in_one_line(vmtc, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    bert = transformers.BertConfig(**small, num_hidden_layers=1, vocab_size=9)
    bert.save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    lacks = tmp_path / "lacks"
    lacks.mkdir()
    for file in folders["llava"].iterdir():
        (lacks / file.name).write_bytes(file.read_bytes())
    weights = load_file(lacks / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.2" not in name}
    save_file(kept, lacks / "model.safetensors", metadata={"format": "pt"})
    for name, message in (
        ("bert", "--model must be of type llava, llava_next, idefics3, smolvlm, qwen2_5_vl, qwen3"),
        ("empty", f"cannot load {tmp_path / 'empty'}: Unrecognized model"),
        ("lacks", f"{lacks} lacks weights: "),
    ):
        code, _, stderr = vmtc("--model", tmp_path / name, "--out", tmp_path / "a.png")
        (line,) = [line for line in stderr.splitlines() if line.startswith("vmtc: ")]
        assert code == 2 and message in line and "Traceback" not in stderr


def test_transformers_too_old_is_said_in_one_line(vmtc, monkeypatch, tmp_path):
    package = "vmtc_kernels.integrations.transformers"
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "5.16.1")
    code, _, stderr = vmtc("--model", "any", "--out", tmp_path / "a.png")
    assert code == 2
    assert "needs transformers 5.17 or newer, this is 5.16.1: pip install -U" in stderr
