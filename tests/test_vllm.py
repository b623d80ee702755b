"""VMTC in vLLM's engine: the answers that its reference gives outside of it."""

import pytest

pytest.importorskip("vllm")

import functools

import numpy as np
import torch
import transformers
import vllm_models as vm
import vlm

import vmtc_kernels
from vmtc_kernels import CMAIConfig, VMTCConfig
from vmtc_kernels.integrations.transformers import attach

# photos of several sizes and shapes
PHOTOS = [vlm.photo(90, 70), vlm.photo(70, 110, 1), vlm.photo(64, 64, 2), vlm.photo(120, 60, 3)]
SHARES = {"num_primary": 0.25, "num_merged": 0.15}
COUNTS = {"num_primary": 10, "num_merged": 4}
# of the logarithms of shares: sums in another order, in float32
CLOSE = {"rtol": 0, "atol": 5e-4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {each: vm.save(tmp_path_factory.mktemp(each), each) for each in vm.FAMILIES}


@pytest.fixture
def start(folders):
    """Engines that end with their test."""
    engines = []

    def started(family="llava", **options):
        engines.append(vm.engine(folders[family], **options))
        return engines[-1]

    yield started
    for each in engines:
        vm.close(each)


def mixed(family):
    """Requests of one batch: one image, none, several of different sizes, one image twice."""
    ask = [
        ("what colour is it?", PHOTOS[:1]),
        ("how many?", []),
        ("the photo shows", PHOTOS[1:4]),
        ("two of them. what is it", [PHOTOS[0], PHOTOS[0]]),
        ("a rocket", PHOTOS[3:]),
    ]
    return [vm.request(family, text, *photos) for text, photos in ask]


@pytest.fixture(scope="module")
def expected(folders):
    """What transformers answers to `mixed`, one request after the other, compressed by the
    reference."""

    @functools.cache
    def answered(family, config, cmai):
        return _expected(folders[family], config, cmai, mixed(family))

    return lambda family, config, cmai=None: answered(family, VMTCConfig(**config), cmai)


def _expected(folder, config, cmai, requests, tokens=8):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    handle = attach(model.eval(), processor, vmtc=config, cmai=cmai)
    out = []
    for each in requests:
        photos = each.get("multi_modal_data", {}).get("image") or None
        inputs = handle.prepare(images=photos, text=each["prompt"])
        with vmtc_kernels.use_backend("reference"):
            result = model.generate(
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        ids = result.sequences[0, inputs["input_ids"].shape[1] :]
        logs = torch.stack(result.logits)[:, 0].log_softmax(-1)
        out.append((inputs["input_ids"][0].tolist(), ids.tolist(), logs.gather(1, ids[:, None])))
    return out


def agree(given, wanted):
    for (prompt, ids, logs), (prompt_, ids_, logs_) in zip(given, wanted, strict=True):
        assert prompt == prompt_
        assert ids == ids_
        torch.testing.assert_close(logs, logs_.flatten(), **CLOSE)


@pytest.mark.parametrize("family", vm.FAMILIES)
def test_as_the_reference_in_transformers(start, expected, family):
    """Several images, different sizes, mixed with text alone, in one batch."""
    llm = start(family, vmtc=SHARES)
    agree(vm.answers(llm, mixed(family)), expected(family, SHARES))


@pytest.mark.parametrize("family", vm.FAMILIES)
def test_with_inhibition(start, expected, family):
    """Both halves of the method at once."""
    cmai = {"keep_ratio": 0.4, "suppression": 0.1}
    llm = start(family, vmtc=SHARES, cmai=cmai, limit_mm_per_prompt={"image": 3, "video": 0})
    agree(vm.answers(llm, mixed(family)), expected(family, SHARES, CMAIConfig(**cmai)))


@pytest.mark.parametrize(
    "config",
    [
        {**COUNTS, "metric": "euclidean", "weighting": "uniform", "iterations": 3},
        {**COUNTS, "score_layer": 0, "score_source": "received", "head_reduction": "max"},
        {**COUNTS, "feature_layer": "keys", "placement": "after_projector"},
        {**COUNTS, "feature_layer": 0, "num_merged": 1.0 / 16},
        {**COUNTS, "score_layer": 0, "placement": 0},
        {"num_primary": 9, "num_merged": 0},
        {"num_primary": 0, "num_merged": 9},
    ],
    ids=str,
)
def test_settings(start, expected, config):
    agree(vm.answers(start(vmtc=config), mixed("llava")), expected("llava", config))


@pytest.mark.parametrize(
    "config",
    [{"feature_layer": "keys", "placement": "after_projector"}, {"score_layer": 1}],
    ids=str,
)
def test_settings_with_windows(start, expected, config):
    """Qwen2.5-VL, of which layer 1 sees the whole image, and the usual one windows."""
    config = {**SHARES, **config}
    llm = start("qwen2_5_vl", vmtc=config)
    agree(vm.answers(llm, mixed("qwen2_5_vl")), expected("qwen2_5_vl", config))


def test_same_engine_with_embeddings_made_outside(start, folders):
    """The stock engine, to which the reference hands compressed embeddings."""
    config = VMTCConfig(**COUNTS)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folders["llava"], dtype="float32"
    )
    processor = transformers.AutoProcessor.from_pretrained(folders["llava"])
    attach(model.eval(), processor, vmtc=config)

    def embeddings(photo):
        pixels = processor.image_processor(photo, return_tensors="pt")["pixel_values"]
        with vmtc_kernels.use_backend("reference"), torch.no_grad():
            return torch.stack(list(model.get_image_features(pixels).pooler_output))

    requests = mixed("llava")
    outside = []
    for each in requests:
        photos = each.get("multi_modal_data", {}).get("image", [])
        data = {"image": torch.cat([embeddings(photo) for photo in photos])} if photos else {}
        outside.append({"prompt": each["prompt"], **({"multi_modal_data": data} if data else {})})
    stock = start(enable_mm_embeds=True)
    wanted = vm.answers(stock, outside)
    vm.close(stock)
    agree(vm.answers(start(vmtc=COUNTS), requests), wanted)


def test_embeddings_of_the_users_own_stay(start):
    """`image_embeds` are what the user made of an image: no token of them is taken away."""
    stock = start(enable_mm_embeds=True)
    # vLLM takes those of one length only in a step
    own = [
        [{"prompt": "<image>what is it", "multi_modal_data": {"image": torch.randn(1, n, 128)}}]
        for n in (5, 64)
    ]
    wanted = [vm.answers(stock, each) for each in own]
    vm.close(stock)
    llm = start(vmtc=COUNTS, enable_mm_embeds=True)
    for each, answer in zip(own, wanted, strict=True):
        agree(vm.answers(llm, each), answer)


@pytest.mark.parametrize("family", vm.FAMILIES)
def test_all_tokens_kept_is_the_model_itself(start, family):
    requests = mixed(family)
    stock = start(family)
    wanted = vm.answers(stock, requests, tokens=16)
    vm.close(stock)
    given = vm.answers(start(family, vmtc={"num_primary": 1.0, "num_merged": 0.0}), requests, 16)
    for (*ids, logs), (*ids_, logs_) in zip(given, wanted, strict=True):
        assert ids == ids_  # token for token
        assert torch.equal(logs, logs_)


@pytest.mark.parametrize("family", vm.FAMILIES)
def test_prompts_read_in_pieces(start, expected, family):
    """A step reads less than an image, which is therefore cut in the middle."""
    wanted = expected(family, SHARES)
    longest = max(len(prompt) for prompt, *_ in wanted)
    pieces = start(
        family,
        vmtc=SHARES,
        max_num_batched_tokens=max(32, longest // 2),
        max_num_seqs=3,
        enable_chunked_prefill=True,
        enable_prefix_caching=False,
    )
    agree(vm.answers(pieces, mixed(family)), wanted)


def cached(llm, requests):
    """Tokens of each prompt that were found in the cache; and the answers."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    results = [llm.generate([each], params, use_tqdm=False)[0] for each in requests]
    return [r.num_cached_tokens for r in results], [list(r.outputs[0].token_ids) for r in results]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_prefix_caching(start, family):
    """The same image hits, whole or in part; another one or another setting does not."""
    text = "how many? two of them. the photo shows a rocket. " * 3
    a, b, c = (vlm.photo(128, 128, seed) for seed in range(3))  # each more than a block
    ask = [
        vm.request(family, text, a, b),
        vm.request(family, text, a, b),
        vm.request(family, text, a, c),
        vm.request(family, text, c, b),
        vm.request(family, "what colour is it?" + text, a, b),
    ]
    fewer = {"mm_processor_kwargs": {"vmtc": {"num_primary": 0.2, "num_merged": 0.1}}}
    ask += [{**ask[0], **fewer}, {**ask[0], **fewer}]
    config = {"num_primary": 0.6, "num_merged": 0.3}
    fresh = start(family, vmtc=config, enable_prefix_caching=False)
    none, wanted = cached(fresh, ask)
    assert none == [0] * len(ask)
    vm.close(fresh)
    llm = start(family, vmtc=config, block_size=32)
    hits, given = cached(llm, ask)
    assert given == wanted
    first, again, half, other, end, setting, setting_again = hits
    assert first == other == setting == 0
    assert again > half > 0 and end >= half and setting_again > 0
    assert half % 32 == 0 and again % 32 == 0


def test_settings_of_a_request(start, expected):
    """Fewer tokens than the engine's, side by side with requests of the engine's own, of which one
    call encodes all images."""
    llm, requests = start(vmtc=COUNTS), mixed("llava")
    tower, sizes = vm.model_of(llm).vision_tower, []
    inner = tower.forward
    tower.forward = lambda pixels, **more: sizes.append(len(pixels)) or inner(pixels, **more)
    few = {"num_primary": 3, "num_merged": 2}
    own = [{**each, "mm_processor_kwargs": {"vmtc": few}} for each in requests]
    both = [each for pair in zip(requests, own, strict=True) for each in pair]
    given = vm.answers(llm, both)
    assert max(sizes) > 3 and sum(sizes) == 2 * len(PHOTOS)  # each once with each setting
    agree(given[::2], expected("llava", COUNTS))
    agree(given[1::2], expected("llava", {**COUNTS, **few}))


def test_videos_pass_uncompressed(start):
    """Beside compressed images, with the positions that they have without."""
    frames = np.stack([np.asarray(frame) for frame in vlm.video(64, 64, 4)])
    meta = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
    prompt = vlm.prompt("qwen2_5_vl", "what is it", images=1, videos=1)
    data = {"image": [PHOTOS[0]], "video": [(frames, meta)]}
    ask = [{"prompt": prompt, "multi_modal_data": data}]
    options = {"limit_mm_per_prompt": {"image": 1, "video": 1}}
    stock = start("qwen2_5_vl", **options)
    wanted = vm.answers(stock, ask)
    vm.close(stock)
    whole = start("qwen2_5_vl", vmtc={"num_primary": 1.0, "num_merged": 0.0}, **options)
    agree(vm.answers(whole, ask), wanted)
    vm.close(whole)
    fewer = vm.answers(start("qwen2_5_vl", vmtc=SHARES, **options), ask)
    assert len(fewer[0][0]) < len(wanted[0][0])
