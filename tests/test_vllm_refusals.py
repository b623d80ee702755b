"""What the plugin refuses, by name and before an engine starts, and that it is silent unset."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

import transformers
import vllm
import vllm_models as models
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vmtc_kernels.integrations.vllm import register
from vmtc_kernels.integrations.vllm._plugin import ARCHITECTURES

GOOD = {"num_primary": 10, "num_merged": 4}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
FULL = {"vision_feature_select_strategy": "full"}  # no [CLS] to leave out
SIZES = ("hidden_size", "image_size", "patch_size", "num_hidden_layers", "num_attention_heads")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        each: models.save(tmp_path_factory.mktemp(each), each) for each in ("llava", "qwen2_5_vl")
    }


@pytest.fixture
def configure(folders, monkeypatch, tmp_path):
    """The configuration of an engine, which is not started: of a model of this family, with
    changes of its configuration in ``edit``."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")

    def configure(vmtc=GOOD, family="llava", edit=None, additional=None, **options):
        folder = folders[family]
        if edit is not None:
            folder = shutil.copytree(folder, tmp_path / "edited")
            (folder / "config.json").write_text(json.dumps(edit(config_of(folder))))
        given = {} if vmtc is None else {"vmtc": vmtc}
        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256} | options
        return EngineArgs(
            model=str(folder),
            additional_config=given if additional is None else additional,
            **options,
        ).create_engine_config()

    return configure


def config_of(folder):
    with open(f"{folder}/config.json") as file:
        return json.load(file)


def vision(kind):
    """An edit: the same with an encoder of this type."""

    def edit(config):
        sizes = {name: config["vision_config"][name] for name in SIZES}
        return config | FULL | {"vision_config": sizes | {"model_type": kind}}

    return edit


def refused(configure, message, *args, error=(ValueError, NotImplementedError), **options):
    with pytest.raises(error) as caught:
        configure(*args, **options)
    assert message in str(caught.value)


def test_what_is_configured_and_can_be(configure):
    for family, options in (
        ("llava", {}),
        ("llava", {"pipeline_parallel_size": 2}),
        ("llava", {"speculative_config": NGRAM}),
        ("llava", {"vmtc": GOOD | {"score_layer": 0, "placement": 0}}),
        ("llava", {"vmtc": GOOD | {"feature_layer": "keys", "placement": "after_projector"}}),
        ("llava", {"edit": vision("siglip_vision_model")}),
        ("llava", {"vmtc": {"num_primary": 60, "num_merged": 4}}),
        ("qwen2_5_vl", {}),
        ("qwen2_5_vl", {"vmtc": {"num_primary": 100_000}}),
    ):
        hf_config = configure(family=family, **options).model_config.hf_config
        (architecture,) = hf_config.architectures
        assert architecture.startswith("VMTC")


SETTINGS = {
    "more tokens than an image has": (
        {"num_primary": 61, "num_merged": 4},
        "num_primary + num_merged must be 1 to 64 for an image of 64 tokens, got 61 + 4",
    ),
    "the defaults are too many": ({}, "for an image of 64 tokens, got 80 + 80"),
    "an unknown field": (GOOD | {"primary": 3}, "VMTCConfig has no primary, only num_primary, "),
    "a list": ([1], "additional_config['vmtc'] must be an object of settings, got [1]"),
    "a text": ("on", "additional_config['vmtc'] must be an object of settings, got 'on'"),
    "no option": (
        GOOD | {"metric": "l1"},
        "metric must be one of ['cosine', 'euclidean'], got 'l1'",
    ),
    "no number": ({"num_primary": "10"}, "num_primary must be an int, got str"),
    "no share": ({"num_primary": 1.5}, "num_primary as a share must be in [0, 1], got 1.5"),
    "a layer too far": (GOOD | {"score_layer": 3}, "score_layer is 3, the encoder has 3 layers"),
    "a layer before the first": (GOOD | {"feature_layer": -4}, "3 layers: -3 to 2"),
    "a layer that is not loaded": (
        GOOD | {"score_layer": -1},
        "score_layer is layer 2, but vLLM loads 2 layers, counted from 0",
    ),
    "features not loaded": (
        GOOD | {"feature_layer": 2},
        "feature_layer is layer 2, but vLLM loads",
    ),
    "a layer by name": (
        GOOD | {"score_layer": "last"},
        "score_layer must be the number of a layer, got 'last'",
    ),
    "half a layer": (GOOD | {"placement": 0.5}, "placement must be the number of a layer, got 0.5"),
    "yes": (
        GOOD | {"feature_layer": True},
        "feature_layer must be the number of a layer, got True",
    ),
    "nowhere": (GOOD | {"placement": None}, "placement must be the number of a layer, got None"),
    "placed before the scores": (
        GOOD | {"placement": 0},
        "placement is after layer 0, which must not come before layer 1",
    ),
    "placed before the features": (
        GOOD | {"placement": 0, "score_layer": 0, "feature_layer": 1},
        "which must not come before layer 1, the last that scores or gives features",
    ),
    "placed at the end": (
        GOOD | {"placement": 1},
        "and must come before layer 1, whose output the model takes",
    ),
}


@pytest.mark.parametrize("vmtc, message", SETTINGS.values(), ids=SETTINGS)
def test_settings(configure, vmtc, message):
    refused(configure, message, vmtc, error=(ValueError, TypeError))


OPTIONS = {
    "llava": {
        "cudagraph_mm_encoder": {"compilation_config": {"cudagraph_mm_encoder": True}},
        "compile_mm_encoder": {"compilation_config": {"compile_mm_encoder": True}},
        "enable_tower_connector_lora": {"enable_lora": True, "enable_tower_connector_lora": True},
    },
    "qwen2_5_vl": {
        "mm_encoder_tp_mode='data'": {"mm_encoder_tp_mode": "data", "tensor_parallel_size": 2},
        "mm_encoder_attn_backend='FLASHINFER'": {"mm_encoder_attn_backend": "FLASHINFER"},
        "video_pruning_rate": {"video_pruning_rate": 0.5},
        "pipeline_parallel_size": {"pipeline_parallel_size": 2},
        "speculative_config": {"speculative_config": NGRAM},
        "cudagraph_mode='FULL'": {"compilation_config": {"cudagraph_mode": "FULL"}},
    },
}


@pytest.mark.parametrize("family, name", [(f, name) for f in OPTIONS for name in OPTIONS[f]])
def test_options_that_conflict(configure, family, name):
    options = OPTIONS[family][name]
    refused(configure, f"vmtc: {name} ", family=family, error=NotImplementedError, **options)
    configure(None, family=family, **options)  # without our settings it is up to vLLM


def test_drafts_of_another_model(configure, folders):
    draft = {"method": "draft_model", "model": folders["llava"], "num_speculative_tokens": 2}
    error = NotImplementedError
    refused(configure, "vmtc: speculative_config gives", speculative_config=draft, error=error)
    configure(None, speculative_config=draft)


@pytest.mark.parametrize(
    "vmtc, message",
    [
        ({"score_source": "cls"}, "the encoder of qwen2_5_vl has no [CLS]: use 'received' or"),
        ({"placement": 1}, "qwen2_5_vl cannot be shortened inside its encoder in vLLM"),
        ({"score_layer": 4}, "score_layer is 4, the encoder has 4 layers"),
    ],
)
def test_settings_of_an_encoder_without_cls(configure, vmtc, message):
    refused(configure, message, GOOD | vmtc, family="qwen2_5_vl")


@pytest.mark.parametrize(
    "vmtc, edit, message",
    [
        (
            {},
            vision("pixtral"),
            "does not support a vision tower of type 'pixtral' in vLLM, only clip",
        ),
        (
            {"score_source": "cls"},
            vision("siglip_vision_model"),
            "score_source is 'cls', but the encoder of llava has no [CLS]",
        ),
        (
            {},
            lambda config: config | {"vision_feature_layer": [-2, -1]},
            "features of several layers (vision_feature_layer) are not supported",
        ),
    ],
)
def test_models_of_another_kind(configure, vmtc, edit, message):
    refused(configure, message, GOOD | vmtc, edit=edit)


@pytest.mark.parametrize("other", ["LlamaForCausalLM", "Qwen2VLForConditionalGeneration"])
def test_other_models(configure, other):
    kinds = {"LlamaForCausalLM": transformers.LlamaConfig}
    config = kinds.get(other, transformers.Qwen2VLConfig)(architectures=[other])
    message = f"vmtc_kernels does not support {other} in vLLM, only LlavaForConditionalGeneration"
    refused(configure, message, edit=lambda _: config.to_dict())


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "0.320.1", "1.0.0"])
def test_other_versions(configure, monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.delenv("VMTC_VLLM_ANY_VERSION", raising=False)
    refused(configure, f"was tested with vLLM 0.32.*, this is {version}", error=NotImplementedError)
    assert configure(None).model_config.hf_config.architectures == ["LlavaForConditionalGeneration"]
    monkeypatch.setenv("VMTC_VLLM_ANY_VERSION", "1")
    assert configure().model_config.hf_config.architectures == ["VMTCLlava"]


def test_the_environment(configure, monkeypatch):
    monkeypatch.setenv("VMTC_VLLM_VMTC", json.dumps(GOOD))
    for given in (None, GOOD):
        hf_config = configure(given).model_config.hf_config
        assert hf_config.architectures == ["VMTCLlava"]
        assert hf_config.vmtc_kernels == {"vmtc": GOOD}
    message = "VMTC_VLLM_VMTC and additional_config['vmtc'] differ"
    refused(configure, message, GOOD | {"num_merged": 5})
    for text in ("num_primary=10", "", "[1]", "null", "12"):
        monkeypatch.setenv("VMTC_VLLM_VMTC", text)
        refused(configure, "VMTC_VLLM_VMTC must be ", None)


def test_unset_it_changes_nothing(configure):
    register()
    completes = VllmConfig.try_verify_and_update_config
    register()  # as often as vLLM likes
    assert VllmConfig.try_verify_and_update_config is completes
    for additional in ({}, {"vmtc": None, "cmai": None}, {"another": {"plugin": 1}}):
        model_config = configure(additional=additional).model_config
        (architecture,) = model_config.hf_config.architectures
        assert not hasattr(model_config.hf_config, "vmtc_kernels")
        stock, name = ModelRegistry.resolve_model_cls([architecture], model_config)
        assert name == architecture == stock.__name__ == "LlavaForConditionalGeneration"
        assert stock.__module__ == "vllm.model_executor.models.llava"
    for name in ARCHITECTURES:
        assert ModelRegistry.models[name].module_name.startswith("vllm.model_executor.models.")


# an engine without our settings: its answers, and what it has of ours
UNSET = """
import json, sys
import vllm_models as models, vlm
llm = models.engine(sys.argv[1])
ask = [("what colour is it?", [vlm.photo(96, 64, 1)]), ("how many?", [])]
answers = models.answers(llm, [models.request("llava", text, *photos) for text, photos in ask])
answers = [(prompt, tokens, logs.tolist()) for prompt, tokens, logs in answers]
ours = sorted(name for name in sys.modules if name.startswith("vmtc_kernels.integrations"))
print(json.dumps([answers, ours, type(models.model_of(llm)).__name__]))
models.close(llm)
"""


def test_unset_it_answers_as_without_it(folders):
    def start(**env):
        env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__), **env}
        return subprocess.Popen(
            [sys.executable, "-c", UNSET, folders["llava"]],
            stdout=subprocess.PIPE,
            env=os.environ | env,
            text=True,
        )

    both = [start(), start(VLLM_PLUGINS="")]
    try:
        out = [json.loads(each.communicate(timeout=240)[0].splitlines()[-1]) for each in both]
    finally:
        for each in both:
            each.kill()
    (answers, ours, name), (without, none, stock) = out
    assert answers == without
    assert name == stock == "LlavaForConditionalGeneration"
    assert answers[0][0].count(3) == 64
    package = "vmtc_kernels.integrations"
    assert ours == [package, *(f"{package}.vllm{each}" for each in ("", "._plugin", "._settings"))]
    assert none == []
