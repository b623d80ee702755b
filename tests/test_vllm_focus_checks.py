"""CMAI in vLLM: what is refused, and why; nothing here generates."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
import vllm_models as models
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vmtc_kernels import CMAIConfig
from vmtc_kernels.integrations.vllm import _focus, _focus_checks

MEAN, HEADS = CMAIConfig(layers=None), CMAIConfig(head_mode="per_head", layers=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("llava"), image_size=32)


class Changed:
    """An object but for some attributes."""

    def __init__(self, whole, **changes):
        self.__dict__.update(changes)
        self.whole = whole

    def __getattr__(self, name):
        return getattr(self.whole, name)


@pytest.fixture(scope="module")
def vllm_config(folder):
    from vllm.engine.arg_utils import EngineArgs

    options = {"dtype": "float32", "max_model_len": 256, "limit_mm_per_prompt": {"image": 2}}
    return EngineArgs(model=folder, **options).create_engine_config()


@pytest.mark.parametrize(
    ("part", "changes", "config", "message"),
    [
        ("parallel_config", {"tensor_parallel_size": 2}, {}, "mean.* with tensor parallelism: "),
        ("parallel_config", {"pipeline_parallel_size": 2}, {}, "pipeline parallelism: "),
        ("parallel_config", {"decode_context_parallel_size": 2}, {}, "decode context parallelism"),
        ("parallel_config", {"prefill_context_parallel_size": 2}, {}, "prefill context paralleli"),
        ("parallel_config", {"use_ubatching": True}, {}, "micro-batches"),
        ("model_config", {"enable_prompt_embeds": True}, {}, "prompt embeddings: nobody says"),
        ("model_config", {"is_mm_prefix_lm": True}, {}, "bidirectional attention"),
        ("model_config", {"use_mla": True}, {}, "latent attention"),
        ("model_config", {"runner_type": "pooling"}, {}, "not generative"),
        ("cache_config", {"cache_dtype": "fp8"}, {}, "a cache of fp8: .* in torch.float32"),
        ("cache_config", {"cache_dtype": "bfloat16"}, {}, "a cache of bfloat16"),
        (
            None,
            {"speculative_config": SimpleNamespace(method="eagle")},
            {},
            "speculative decoding other than ngram: a draft model's",
        ),
        (None, {"kv_transfer_config": object()}, {}, "a KV connector: its state lies in pages"),
        ("attention_config", {"backend": AttentionBackendEnum.FLASH_ATTN}, {}, "FLASH_ATTN"),
        (
            "attention_config",
            {"backend_per_kind": {"full_attention": AttentionBackendEnum.TRITON_ATTN}},
            {},
            "--attention-backend TRITON_ATTN: it is one itself",
        ),
        (None, {}, {"prefill": False}, "inhibition in prefill or decode alone: tokens that were"),
        (None, {}, {"decode": False}, "inhibition in prefill or decode alone"),
    ],
)
def test_refused(vllm_config, part, changes, config, message):
    changed = Changed(getattr(vllm_config, part), **changes) if part else None
    whole = Changed(vllm_config, **({part: changed} if part else changes))
    with pytest.raises(NotImplementedError, match=f"cmai cannot be used with .*{message}"):
        _focus.check(whole, CMAIConfig(**config))


def test_what_is_not_refused(vllm_config):
    _focus.check(vllm_config, CMAIConfig(layers=(0, 1, 2)))
    parallel = Changed(vllm_config.parallel_config, tensor_parallel_size=2)
    _focus.check(Changed(vllm_config, parallel_config=parallel), HEADS)


def test_refused_layers(vllm_config):
    with pytest.raises(ValueError, match=r"layers \[3\] are not among 3 layers"):
        _focus.check(vllm_config, CMAIConfig(layers=(3,)))


def test_refused_heads_and_platforms(vllm_config, monkeypatch):
    from vllm import platforms

    wide = Changed(vllm_config.model_config, get_head_size=lambda: 288)
    whole = Changed(vllm_config, model_config=wide)
    _focus.check(whole, MEAN)
    for cuda, message in ((True, "heads of 288 features"), (False, "the platform none")):
        other = SimpleNamespace(
            is_cpu=lambda: False, is_cuda=lambda cuda=cuda: cuda, device_name="none"
        )
        monkeypatch.setattr(platforms, "_current_platform", other)
        with pytest.raises(NotImplementedError, match=message):
            _focus.check(whole, MEAN)


def test_another_backend_of_the_name(vllm_config):
    register_backend(AttentionBackendEnum.CUSTOM, "some.other.Backend")
    try:
        with pytest.raises(NotImplementedError, match="as the attention backend CUSTOM"):
            _focus.check(vllm_config, MEAN)
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()


def test_refused_before_the_engine_starts(folder):
    with pytest.raises(NotImplementedError, match="inhibition in prefill or decode alone"):
        models.engine(folder, cmai={"decode": False})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alibi_slopes": [1.0]}, "ALiBi slopes"),
        ({"sliding_window": 8}, "a sliding window"),
        ({"logits_soft_cap": 30.0}, "softcapping"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention of type"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "shared between layers"),
        ({"sinks": torch.zeros(4)}, "sinks"),
    ],
)
def test_layers_that_need_more(given, message):
    assert _focus.FocusImpl(4, 32, 1.0, 2, sinks=None).num_kv_heads == 2
    with pytest.raises(NotImplementedError, match=f"has no .*{message}"):
        _focus.FocusImpl(4, 32, 1.0, 2, **given)


def limited(images, each=16, embeds=False, longest=256):
    info = SimpleNamespace(
        allowed_mm_limits={"image": images, "audio": 0},
        get_mm_max_tokens_per_item=lambda seq_len, mm_counts: dict.fromkeys(mm_counts, each),
    )
    model = SimpleNamespace(
        max_model_len=longest,
        hf_config=SimpleNamespace(vmtc_kernels={"cmai": {}}),
        multimodal_config=SimpleNamespace(enable_mm_embeds=embeds),
    )
    info.ctx = SimpleNamespace(model_config=model)
    return model, SimpleNamespace(info=info)


def test_room_for_images():
    assert _focus_checks.most_image_tokens(*limited(3)) == 48
    assert _focus_checks.most_image_tokens(*limited(999)) == 256
    assert _focus_checks.most_image_tokens(*limited(3, embeds=True)) == 256
    with pytest.raises(ValueError, match="takes no images"):
        _focus_checks.most_image_tokens(*limited(0))


def test_prompts_with_more_images_than_expected():
    class Processor:
        def apply(self, *sizes):
            each = [SimpleNamespace(get_num_embeds=lambda n=n: n) for n in sizes]
            return {"mm_placeholders": {"image": each}}

    class Checked(_focus.Bounded, Processor):
        info = limited(2)[1].info

    checked = Checked()
    assert checked.apply(16, 16)
    with pytest.raises(ValueError, match="has 33 image tokens, and CMAI has room for 32"):
        checked.apply(16, 17)
    Checked.info.ctx.model_config.hf_config.vmtc_kernels = {}
    assert checked.apply(16, 17)


def test_a_step_of_which_nothing_is_known():
    impl = _focus.FocusImpl(1, 4, 1.0, 1)
    place = _focus.Place(1, 2)
    impl.connect(_focus.Tokens(), MEAN, place, 64)
    cache = torch.zeros(2, 1, 4, place.size(8, 4) // 4)
    q, out = torch.ones(3, 1, 4), torch.ones(3, 1, 4)
    table = torch.zeros(1, 1, dtype=torch.int32)

    def forward(slots):
        batch = _focus.Batch([0, 2], torch.tensor(slots), torch.tensor([2]).int(), table, 2)
        return impl.forward(None, q, q, q, cache, _focus.FocusMetadata(batch), out)

    # runs that keep step with other engines have no slots
    assert not forward([-1, -1, -1]).any() and not cache.any()
    with pytest.raises(RuntimeError, match="which tokens are images: it got 0 of 2"):
        forward([4, 5, -1])
    impl.tokens.put(torch.ones(3, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="it got 3 of 2"):
        forward([4, 5, -1])
    impl.tokens.put(torch.ones(2, dtype=torch.uint8))
    assert (
        forward([0, 1, -1])[:2].eq(1).all() and cache[0, 0, :2].any() and not cache[0, 0, 2:].any()
    )


def test_backend_without_a_model():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="models of this plugin alone"):
        _focus.FocusBackend.customize_spec(spec)
    with pytest.raises(NotImplementedError, match="causal attention alone"):
        _focus.FocusBuilder(spec, [], None, "cpu").build(0, SimpleNamespace(causal=False))
