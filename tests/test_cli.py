"""The `vmtc` command, its errors, `vmtc demo` without weights, and the CLIP tower behind
``--model``; test_lab_demo.py has what the commands do without ``--model``."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vmtc_kernels import VMTCConfig, __version__, _registry, cli, commands
from vmtc_kernels.patches import InputError, load_photo

# every module of the extra 'demo', made impossible to import
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"typer", "rich", "matplotlib", "PIL", "skimage"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def vmtc(monkeypatch, capsys, same_start):
    """Run the command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(commands, "_MAX_SECONDS", 0.0)
    torch.set_num_threads(1)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vmtc", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run


def words(text):
    return " ".join(text.split())


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_demo_writes_the_picture_and_the_table(vmtc, tmp_path):
    out = tmp_path / "demo.png"
    code, stdout, _ = vmtc("demo", "--model", "none", "--out", out)
    assert code == 0
    with Image.open(out) as image:
        assert image.size == (2000, 1570)
    text = words(stdout)
    assert "tokens 576 → 160 (80 primary + 80 merged)" in text
    assert "ms, median of" in text and "backend" in text and "not cuda" in text
    assert re.search(r"VMTC 160 33\.\d dB .* Smaller photo 144 33\.\d dB", text)
    assert "model none" in text and "answers none: no model is asked" in text
    assert f"Picture: {out}" in stdout and "Question" not in stdout


def test_demo_options(vmtc, tmp_path):
    image, out = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)).save(image)
    code, stdout, _ = vmtc(
        *("demo", "--model", "none", "--image", image, "--primary", 32, "--merged", 16),
        *("--metric", "euclidean", "--out", out),
    )
    assert code == 0 and out.exists()
    assert "tokens 576 → 48 (32 primary + 16 merged)" in words(stdout)
    assert "Average pooling 36" in words(stdout)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image", "gone.png"], "no such image: gone.png"),
        (["--image", "text.png"], "cannot read text.png as an image: cannot identify"),
        (["--primary", "600"], "must be 1 to 576 for an image of 576 tokens, got 600 + 80"),
        (["--primary", "some"], "--primary must be a count or a share, got 'some'"),
        (["--merged", "1.5"], "num_merged as a share must be in [0, 1], got 1.5"),
        (["--merged", "-1"], "num_merged must be"),
        (["--primary", "0", "--merged", "0"], "num_primary and num_merged must not both be 0"),
        (["--metric", "manhattan"], "metric must be one of ['cosine', 'euclidean'], got"),
        (["--out", "gone/a.png"], "cannot write gone/a.png: no directory gone"),
        (["--out", "folder.png"], "cannot write folder.png: is a directory"),
        (["--out", "a.jpg"], "--out must end in .png, got a.jpg"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(vmtc, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    code, stdout, stderr = vmtc("demo", "--model", "none", *arguments)
    assert code == 2 and stdout == ""
    (line,) = stderr.splitlines()
    assert line.startswith("vmtc: ") and message in line and "VMTCConfig" not in line
    assert not (tmp_path / "vmtc-demo.png").exists()


def test_an_unwritable_file_is_one_line(vmtc, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Figure, "savefig", refuse)
    code, _, stderr = vmtc("demo", "--model", "none", "--out", tmp_path / "a.png")
    assert code == 2 and f"vmtc: cannot write {tmp_path / 'a.png'}: Permission denied" in stderr


def test_an_unknown_backend_is_one_line(vmtc, tmp_path, monkeypatch):
    monkeypatch.setenv("VMTC_BACKEND", "abacus")
    code, _, stderr = vmtc("demo", "--model", "none", "--out", tmp_path / "a.png")
    assert code == 2 and "VMTC_BACKEND: backend must be one of" in stderr
    assert "Traceback" not in stderr


def test_info_reports_versions_and_backends(vmtc, monkeypatch):
    monkeypatch.setattr(_registry, "_C", None)
    no_module = "the compiled module does not load: no such"
    monkeypatch.setattr(_registry, "_missing", {"cpu": no_module}.get)
    code, stdout, _ = vmtc("info")
    text = words(stdout)
    assert code == 0 and f"vmtc_kernels {__version__}" in text
    assert f"torch {torch.__version__}" in text and f"numpy {np.__version__}" in text
    assert torch.backends.cpu.get_cpu_capability() in text
    assert "reference runs here" in text
    assert "cpu the compiled module does not load: no such" in text


def test_info_reports_the_build(vmtc, monkeypatch):
    flags = {"compiler": "g++ 13.2", "simd": "AVX2"}
    monkeypatch.setattr(_registry, "_C", SimpleNamespace(build_info=lambda: flags))
    monkeypatch.setattr(_registry, "_missing", lambda name: None)
    _, stdout, _ = vmtc("info")
    assert "compiler g++ 13.2 simd AVX2" in words(stdout) and "cpu runs here" in words(stdout)


def test_the_core_works_without_the_extra_and_the_command_says_what_is_missing():
    code = """
import torch, vmtc_kernels
print(vmtc_kernels.merge_tokens(torch.eye(8)[None], torch.arange(8.0)[None], 2, 3).tokens.shape)
from vmtc_kernels.cli import main
main()
"""
    result = run_python(BLOCKER + code)
    assert result.stdout == "torch.Size([1, 5, 8])\n"
    assert result.stderr == 'vmtc needs typer: pip install "vmtc-kernels[demo]"\n'
    assert result.returncode == 2


def test_benchmarks_are_a_command_with_an_extra_of_its_own(vmtc):
    code, stdout, _ = vmtc("bench", "--help")
    assert code == 0 and all(word in stdout for word in ("run", "report", "compare"))
    alone = """
import sys
sys.modules["skimage"] = None
sys.argv = ["vmtc", "bench", "--device", "abacus"]
from vmtc_kernels.cli import main
main()
"""
    result = run_python(alone)
    assert result.returncode == 2 and "cpu, cuda, got abacus" in words(result.stderr)
    assert "Usage: vmtc bench run" in result.stderr
    code = """
from vmtc_kernels.cli import main
sys.argv = ["vmtc", "bench", "--quick"]
main()
"""
    result = run_python(BLOCKER + code)
    assert result.stderr == 'vmtc needs typer: pip install "vmtc-kernels[bench]"\n'
    assert result.returncode == 2


def test_importing_the_package_loads_none_of_the_extra():
    code = """
import sys, vmtc_kernels, vmtc_kernels.cli
print(sorted({"typer", "rich", "matplotlib", "PIL", "skimage", "transformers"} & set(sys.modules)))
"""
    result = run_python(code)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize("command", ["demo", "focus", "explain-image", "info"])
def test_without_transformers_the_extra_is_named(vmtc, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, stdout, stderr = vmtc(command)
    assert code == 2 and stdout == ""
    assert stderr == 'vmtc needs transformers: pip install "vmtc-kernels[demo]"\n'


def test_a_tower_without_transformers_names_its_extra(monkeypatch):
    from vmtc_kernels.clip import ClipTower

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r'pip install "vmtc-kernels\[transformers\]"'):
        ClipTower.load("any")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip_folder(transformers, tmp_path_factory):
    """A randomly initialised CLIP of both towers: 8 x 8 patches, 3 layers, 4 heads."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = {**small, "num_hidden_layers": 3, "image_size": 64, "patch_size": 8}
    text = {**small, "num_hidden_layers": 1, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    # larger weights than the default, so that attention is far from uniform
    config = transformers.CLIPConfig(
        vision_config={**vision, "initializer_factor": 6.0}, text_config=text
    )
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_model_scores_are_the_cls_row_of_eager_attention(transformers, clip_folder):
    from vmtc_kernels.clip import ClipTower

    tower = ClipTower.load(str(clip_folder))
    assert (tower.size, tower.patch) == (64, 8)
    assert tower.model.config._attn_implementation != "eager"
    photo = load_photo(None, tower.size)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )
    pixels = processor(images=Image.fromarray(photo), return_tensors="pt")["pixel_values"]
    eager = transformers.CLIPVisionModel.from_pretrained(clip_folder, attn_implementation="eager")
    with torch.no_grad():
        out = eager(pixel_values=pixels, output_attentions=True, output_hidden_states=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    for layer, hidden in ((-2, -2), (-1, -1), (0, 1)):
        tokens = tower.tokens(photo, VMTCConfig(score_layer=layer))
        heads = out.attentions[layer][:, :, 0]  # [1, H, 1 + N]
        torch.testing.assert_close(tokens.scores, heads.mean(dim=1)[:, 1:], atol=1e-6, rtol=1e-4)
        expected = out.hidden_states[hidden][:, 1:]
        torch.testing.assert_close(tokens.features, expected, atol=1e-4, rtol=1e-4)
        assert tokens.scores.std() > 0.1 * tokens.scores.mean()
    strongest = tower.tokens(photo, VMTCConfig(head_reduction="max"))
    expected = out.attentions[-2][:, :, 0, 1:].amax(dim=1)
    torch.testing.assert_close(strongest.scores, expected, atol=1e-6, rtol=1e-4)


def test_model_is_left_without_hooks(clip_folder):
    from vmtc_kernels.clip import ClipTower

    tower = ClipTower.load(str(clip_folder))
    tower.tokens(load_photo(None, tower.size), VMTCConfig())
    assert not any(module._forward_hooks for module in tower.model.modules())
    with pytest.raises(InputError, match="tiny-clip has 3 encoder layers, none is layer 3"):
        tower.tokens(load_photo(None, tower.size), VMTCConfig(score_layer=3))


def test_demo_with_a_model(vmtc, clip_folder, tmp_path):
    out = tmp_path / "a.png"
    arguments = ("demo", "--model", clip_folder, "--out", out)
    code, stdout, stderr = vmtc(*arguments, "--primary", 10, "--merged", 6)
    assert code == 0, stderr
    text = words(stdout)
    assert "tokens 64 → 16 (10 primary + 6 merged)" in text and out.exists()
    assert "layer -2 of tiny-clip, attention of [CLS]" in text
    assert "by 32 features" in text and "model tiny-clip" in text
    assert "answers none: a vision tower has no words" in text and "Question" not in text
    code, stdout, _ = vmtc(*arguments)
    assert code == 0 and "tokens 64 → 18 (9 primary + 9 merged)" in words(stdout)
    code, _, stderr = vmtc(*arguments, "--primary", 128, "--merged", 32)
    assert code == 2 and "must be 1 to 64 for an image of 64 tokens, got 128 + 32" in stderr


def test_model_errors_are_one_line(vmtc, transformers, tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    wrong = transformers.BertConfig(**small, num_hidden_layers=1, vocab_size=9)
    wrong.save_pretrained(tmp_path / "bert")
    transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**small, num_hidden_layers=2, image_size=30, patch_size=8)
    ).save_pretrained(tmp_path / "odd")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("bert", "--model must be a CLIP model or a LLaVA model, "),
        ("odd", "patches of 8 pixels do not fill an image of 30"),
        ("empty", f"cannot load {tmp_path / 'empty'}: Unrecognized model"),
    ):
        code, _, stderr = vmtc("demo", "--model", tmp_path / name, "--out", tmp_path / "a.png")
        (line,) = [line for line in stderr.splitlines() if line.startswith("vmtc: ")]
        assert code == 2 and message in line and "Traceback" not in stderr


def test_a_model_that_lacks_weights_is_refused(transformers, clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    from vmtc_kernels.clip import ClipTower

    weights = load_file(clip_folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.2" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"lacks weights of the vision tower: .*layers\.2"):
        ClipTower.load(str(tmp_path))
