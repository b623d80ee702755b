"""The arguments of `vmtc_hf`, and what is refused of them."""

import pytest
import torch

pytest.importorskip("lmms_eval")

import lmms_task
import transformers
import vlm
from lmms_task import asked, made, texts

from vmtc_kernels import CMAIConfig, VMTCConfig
from vmtc_kernels.integrations.lmms_eval import _model
from vmtc_kernels.integrations.lmms_eval._settings import settings_of

pytest_plugins = ("lmms_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread", "caches")


def test_every_field_of_both_configurations(tmp_path):
    vmtc = {
        "num_primary": 0.25,
        "num_merged": 4,
        "metric": "euclidean",
        "weighting": "uniform",
        "iterations": 3,
        "score_layer": -3.0,  # as lmms-eval reads -3
        "score_source": "received",
        "feature_layer": "keys",
        "head_reduction": "max",
        "placement": 1,
    }
    cmai = {
        "threshold": 0.2,
        "min_keep": 2,
        "aggregate": "residual",
        "head_mode": "per_head",
        "renormalize": False,
        "suppression": 0.5,
        "layers": "[0,-1]",
        "prefill": True,
        "decode": True,
    }
    folder = vlm.save("llava", tmp_path / "deep", vision_layers=4)
    model = made(str(folder), dtype="bfloat16", **vmtc, **cmai)
    assert model.handle.vmtc == VMTCConfig(**(vmtc | {"score_layer": -3}))
    settings = cmai | {"layers": (0, -1), "keep_ratio": None}
    assert model.handle.cmai == CMAIConfig(**settings)
    assert model.model.dtype == torch.bfloat16
    assert len(texts(model.generate_until(asked(model)))) == len(lmms_task.QUESTIONS)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_primry": 4}, "unknown argument 'num_primry': did you mean num_primary"),
        ({"max_batch_size": 64}, "unknown argument 'max_batch_size'.*batch_size"),
        ({"device_map": "auto"}, "unknown argument 'device_map'"),
        ({"downsample": 2, "num_merged": 4}, "downsample and num_merged are both given"),
        ({"downsample": 1}, "downsample must be at least 2, got 1"),
        ({"downsample": 1.5}, "downsample must be int, got 1.5"),
        ({"keep_ratio": 0.5, "threshold": 0.1}, "exactly one of keep_ratio and threshold"),
        ({"keep_ratio": "half"}, "keep_ratio must be float, got 'half'"),
        ({"num_primary": 0.8, "num_merged": 0.7}, "at most 1 together"),
        ({"num_primary": -4.0}, "num_primary as a share"),
        ({"num_primary": True}, "num_primary must be int or float, got True"),
        ({"metric": "l1"}, "metric must be one of"),
        ({"iterations": 2.5}, "iterations must be int, got 2.5"),
        ({"renormalize": 1}, "renormalize must be bool, got 1"),
        (
            {"layers": "0-3"},
            r"layers must be upper, all, or a list of ints as \[0,1,-1\], got '0-3'",
        ),
        ({"layers": "[0.5]"}, "layers must be upper, all, or a list of ints"),
        ({"batch_size": "auto"}, "batch_size must be int, got 'auto'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        ({"trust_remote_code": "maybe"}, "trust_remote_code must be bool"),
    ],
)
def test_arguments_that_are_refused(monkeypatch, arguments, words):
    def never(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", never)
    with pytest.raises(ValueError, match=words):
        made("nowhere", **arguments)
    with pytest.raises(ValueError, match="pretrained is missing"):
        _model.VmtcHf()


def test_models_that_are_refused(folders, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", never)
    transformers.LlamaConfig(hidden_size=64).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"of type 'llama', supported are llava, llava_next"):
        made(str(tmp_path / "llama"))
    model, processor = vlm.make("llava")
    model.save_pretrained(tmp_path / "silent")
    processor.chat_template = None
    processor.save_pretrained(tmp_path / "silent")
    with pytest.raises(ValueError, match="has no chat template"):
        made(str(tmp_path / "silent"))


@pytest.mark.parametrize(
    "family, arguments, words",
    [
        ("llava", {"num_primary": 60, "num_merged": 30}, r"1 to 64 for an image.*60 \+ 30"),
        ("idefics3", {"num_primary": 16, "num_merged": 1}, r"1 to 16 for an image.*16 \+ 1"),
        ("llava", {"downsample": 9}, "downsample must be 2 to 8"),
        ("qwen2_5_vl", {"downsample": 2}, "those of qwen2_5_vl need not be"),
        ("llava", {"num_primary": 4, "score_layer": 9}, "score_layer is 9"),
        ("llava", {"keep_ratio": 0.5, "attn_implementation": "eager"}, "cannot replace 'eager'"),
        ("llava", {"layers": "[7]"}, r"layers \[7\]"),
    ],
)
def test_settings_that_do_not_fit_the_model(folders, family, arguments, words):
    with pytest.raises(ValueError, match=words):
        made(folders(family), **arguments)


def test_an_image_that_is_too_small_is_named(folders):
    model = made(folders("qwen2_5_vl"), num_primary=60, num_merged=30)
    with pytest.raises(ValueError, match=r"60 \+ 30; shares, num_primary=0.25"):
        model.generate_until(asked(model))


@pytest.mark.parametrize(
    "said, layers", [("upper", "upper"), ("all", None), ("[1]", (1,)), (2, (2,))]
)
def test_layers(said, layers):
    assert settings_of({"pretrained": "a/b", "layers": said}).cmai == CMAIConfig(layers=layers)
