"""CMAI in a model's attention: against its definition, and as the cache goes on."""

from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import focus_oracle
import transformers
import vlm

from vmtc_kernels import CMAIConfig, VMTCConfig
from vmtc_kernels.integrations.transformers import attach

HALF = CMAIConfig(keep_ratio=0.5, layers=None)
SPY = "vmtc_test_focus"
GREEDY = {
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    # random weights would end early, or write images
    "suppress_tokens": [2, 3, 4],
}


@pytest.fixture(
    scope="module", params=["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "idefics3"]
)
def made(request):
    return request.param, *vlm.make(request.param)


@pytest.fixture(scope="module")
def llava():
    return vlm.make("llava")


def photos(family="llava"):
    images = [[vlm.photo(96, 64, 1), vlm.photo(64, 64, 2)], [vlm.photo(50, 120, 3)], []]
    texts = [vlm.prompt(family, images=2), vlm.prompt(family, "how many?"), "what is it?"]
    return {"images": images, "text": texts}


def one(family="llava"):
    return {"images": [[vlm.photo(96, 64, 1)]], "text": [vlm.prompt(family)]}


def cache_name(model):
    """What the models call it: it was renamed."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def encodes_first(model):
    """Whether images are encoded before generate repeats or splits the prompts."""
    return "mm_encoder_outputs" in signature(model.forward).parameters


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_generation(a, b):
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        close(x, y)


def by_definition(model, inputs, config):
    """Logits of a pass whose language model attends as the definition says, row by row."""
    tokens = [model.config.image_token_id, getattr(model.config, "video_token_id", -1)]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    kinds = torch.where(torch.isin(ids, torch.tensor(tokens)), 2, 1) * mask
    layers = model.config.text_config.num_hidden_layers

    def spy(module, q, k, v, attention_mask, scaling=None, **kwargs):
        out = torch.zeros(*q.shape[:3], v.shape[3])
        for b in range(len(q)):
            modality, place = kinds[b].numpy(), np.arange(q.shape[2])
            images = int((modality == 2).sum())
            state = np.zeros((1 if config.head_mode == "mean" else q.shape[1], len(place), images))
            row = [x[b].double().numpy() for x in (q, k, v)]
            scores = focus_oracle.scores(
                *row[:2], modality, images, place, state,
                config.aggregate, config.head_mode, config.renormalize, scaling,
            )  # fmt: skip
            bits = focus_oracle.inhibited(
                scores, modality, place, config.keep_ratio, config.threshold, config.min_keep
            )
            if not config.applies(module.layer_idx, layers):
                bits[:] = False
            out[b] = torch.from_numpy(
                focus_oracle.attention(*row, modality, bits, place, config.suppression, scaling)[0]
            )
        return out.transpose(1, 2).to(q.dtype), None

    transformers.AttentionInterface.register(SPY, spy)
    model.set_attn_implementation({"text_config": SPY})
    try:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


@pytest.mark.parametrize(
    "config",
    [
        HALF,
        CMAIConfig(keep_ratio=0.25, head_mode="per_head", aggregate="residual", layers=None),
        CMAIConfig(
            keep_ratio=None, threshold=0.5, renormalize=False, suppression=0.25, layers=None
        ),
        CMAIConfig(keep_ratio=0.25, layers=(0, -1)),
    ],
    ids=["mean", "per_head", "threshold", "layers"],
)
def test_logits_are_those_of_the_definition(config):
    model, processor = vlm.make("llava", image_size=32)
    with attach(model, processor, cmai=config) as handle:
        inputs = handle.prepare(**photos())
        with torch.no_grad():
            actual = model(**inputs).logits
    expected = by_definition(model, inputs, config)
    plain = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    close(actual[real], expected[real])
    assert (actual - plain)[real].abs().max() > 0.1


def test_where_nothing_is_inhibited_nothing_changes(made):
    family, model, processor = made
    given = photos(family)
    plain = processor(**given, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**plain).logits
        generated = model.generate(**plain, **GREEDY, max_new_tokens=4)
    with (
        attach(model, processor, cmai=CMAIConfig(keep_ratio=1.0, layers=None)) as handle,
        torch.no_grad(),
    ):
        inputs = handle.prepare(**given)
        actual = model(**inputs).logits
        assert_same_generation(model.generate(**inputs, **GREEDY, max_new_tokens=4), generated)
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    real = plain["attention_mask"].bool()
    close(actual[real], expected[real])


def test_prompts_without_images_are_not_touched(llava):
    model, processor = llava
    plain = processor(
        text=["what is it?", "how many are there?"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**plain).logits
        with attach(model, processor, cmai=HALF):
            assert torch.equal(model(**plain).logits, expected)


def whole(model, inputs, steps, **options):
    """Generation in which each step is a pass over all tokens."""
    return model.generate(**inputs, **GREEDY, max_new_tokens=steps, use_cache=False, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_goes_on_as_without_a_cache(made, cache):
    family, model, processor = made
    with attach(model, processor, cmai=HALF) as handle:
        inputs = handle.prepare(**photos(family))
        options = {} if cache == "dynamic" else {"cache_implementation": cache}
        cached = model.generate(**inputs, **GREEDY, max_new_tokens=5, **options)
        assert_same_generation(cached, whole(model, inputs, 5))
    plain = model.generate(**inputs, **GREEDY, max_new_tokens=5)
    assert not torch.allclose(plain.logits[0], cached.logits[0], atol=0.1)


def test_with_compression(made):
    family, model, processor = made
    config = VMTCConfig(num_primary=0.3, num_merged=0.2)
    with attach(model, processor, vmtc=config, cmai=HALF) as handle:
        inputs = handle.prepare(**photos(family))
        cached = model.generate(**inputs, **GREEDY, max_new_tokens=4)
        assert_same_generation(cached, whole(model, inputs, 4))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_one_phase_alone(llava, phase):
    """The other phase attends to all, and keeps the state up to date."""
    model, processor = llava
    both, none = HALF, CMAIConfig(keep_ratio=1.0, layers=None)
    config = replace(HALF, **{"decode" if phase == "prefill" else "prefill": False})
    logits = []
    for each in (config, both, none):
        with attach(model, processor, cmai=each) as handle:
            inputs = handle.prepare(**one())
            logits.append(model.generate(**inputs, **GREEDY, max_new_tokens=2).logits)
    like = 1 if phase == "prefill" else 2
    close(logits[0][0], logits[like][0])
    assert not torch.allclose(logits[0][0], logits[3 - like][0], atol=1e-2)
    assert not torch.allclose(logits[0][1], logits[like][1], atol=1e-2)


def test_beam_search(made):
    family, model, processor = made
    with attach(model, processor, cmai=HALF) as handle:
        inputs = handle.prepare(**one(family))
        options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 5}
        options |= {"return_dict_in_generate": True, "output_scores": True}
        options |= {"suppress_tokens": [2, 3, 4], "num_return_sequences": 3}
        cached = model.generate(**inputs, **options)
        expected = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, expected.sequences)
    close(cached.sequences_scores, expected.sequences_scores)
    assert len({tuple(row) for row in cached.sequences.tolist()}) == 3


def test_several_samples_of_a_prompt(llava):
    model, processor = llava
    with attach(model, processor, cmai=HALF) as handle:
        inputs = handle.prepare(**one())
        options = {"max_new_tokens": 4, "num_return_sequences": 3, "do_sample": True}
        options |= {"suppress_tokens": [2, 3]}
        torch.manual_seed(1)
        cached = model.generate(**inputs, **options)
        torch.manual_seed(1)
        assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


def test_drafts_that_are_taken_back(llava):
    """Prompt lookup decoding crops the cache where a draft was wrong."""
    model, processor = llava
    given = {"images": [[vlm.photo(96, 64, 1)]], "text": [vlm.prompt("llava", "aa bb aa bb aa")]}
    with attach(model, processor, cmai=HALF) as handle:
        inputs = handle.prepare(**given)
        options = {"do_sample": False, "max_new_tokens": 12, "suppress_tokens": [2, 3]}
        expected = model.generate(**inputs, **options, use_cache=False)
        drafted = model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_second_question_on_the_same_cache(llava, cache):
    model, processor = llava
    if cache == "dynamic":
        kept = transformers.DynamicCache(config=model.config.get_text_config())
    else:
        kept = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=120)
    name = cache_name(model)
    options = {**GREEDY, "max_new_tokens": 3}
    with attach(model, processor, cmai=HALF) as handle:
        inputs = handle.prepare(**one())
        first = model.generate(**inputs, **options, **{name: kept}).sequences
        more = processor.tokenizer("and how many?", add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([first, more["input_ids"]], dim=1)
        cached = model.generate(input_ids=ids, **options, **{name: kept})
        inputs["input_ids"], inputs["attention_mask"] = ids, torch.ones_like(ids)
        assert_same_generation(cached, whole(model, inputs, 3))


def test_a_second_image_on_the_same_cache(llava):
    model, processor = llava
    second = vlm.photo(64, 64, 5)
    with attach(model, processor, cmai=HALF) as handle, torch.no_grad():
        inputs = handle.prepare(**one())
        out = model(**inputs, use_cache=True)
        name = cache_name(model)
        kept = out[name]
        more = handle.prepare(images=[second], text=vlm.prompt("llava", "and this?"))
        more["attention_mask"] = torch.cat([inputs["attention_mask"], more["attention_mask"]], 1)
        cached = model(**more, **{name: kept}).logits
        together = {
            "input_ids": torch.cat([inputs["input_ids"], more["input_ids"]], dim=1),
            "pixel_values": torch.cat([inputs["pixel_values"], more["pixel_values"]]),
        }
        expected = model(**together, use_cache=False).logits
    close(cached, expected[:, -cached.shape[1] :])


def test_a_cache_that_is_expanded_selected_cropped_and_emptied(llava):
    model, processor = llava
    with attach(model, processor, cmai=HALF) as handle, torch.no_grad():
        inputs = handle.prepare(**photos())
        out = model(**inputs, use_cache=True)
        name = cache_name(model)
        kept = out[name]
        token = torch.tensor([[7], [8], [9]])

        def step(ids, rows):
            """One more token, and what a pass over all tokens of these rows says."""
            mask = torch.cat([inputs["attention_mask"][rows], torch.ones_like(ids)], dim=1)
            cached = model(input_ids=ids, attention_mask=mask, **{name: kept}).logits[:, -1]
            full = {
                "input_ids": torch.cat([inputs["input_ids"][rows], ids], dim=1),
                "attention_mask": mask,
                "pixel_values": torch.cat([inputs["pixel_values"][pixels[r]] for r in rows]),
            }
            close(cached, model(**full, use_cache=False).logits[:, -1])

        pixels = {0: [0, 1], 1: [2], 2: []}
        step(token, [0, 1, 2])
        kept.crop(-1)
        step(token + 1, [0, 1, 2])
        kept.crop(-1)
        kept.batch_repeat_interleave(2)
        step(torch.arange(7, 13)[:, None], [0, 0, 1, 1, 2, 2])
        kept.crop(-1)
        kept.batch_select_indices(torch.tensor([0, 3]))
        step(token[:2], [0, 1])
        kept.crop(-1)
        kept.reorder_cache(torch.tensor([1, 0]))
        step(token[:2], [1, 0])


def test_a_static_cache_is_used_again(llava):
    model, processor = llava
    kept = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=160)
    name = cache_name(model)
    with attach(model, processor, cmai=HALF) as handle:
        for given in (
            photos(),
            {**photos(), "images": [photos()["images"][0][::-1], *photos()["images"][1:]]},
        ):
            kept.reset()
            inputs = handle.prepare(**given)
            cached = model.generate(**inputs, **GREEDY, max_new_tokens=3, **{name: kept})
            assert_same_generation(cached, whole(model, inputs, 3))


def test_a_prompt_read_in_chunks(made):
    family, model, processor = made
    if not encodes_first(model):
        pytest.skip("transformers reads no images in chunks")
    with attach(model, processor, cmai=HALF) as handle:
        inputs = handle.prepare(**photos(family))
        cached = model.generate(**inputs, **GREEDY, max_new_tokens=3, prefill_chunk_size=40)
        assert_same_generation(cached, whole(model, inputs, 3))


def test_generation_compiled_with_a_static_cache(llava):
    model, processor = llava
    compiled = transformers.CompileConfig(backend="aot_eager", fullgraph=True)
    compiled.mode, compiled._compile_all_devices = None, True
    options = {"cache_implementation": "static", "compile_config": compiled}
    with attach(model, processor, cmai=HALF) as handle:
        inputs = handle.prepare(**photos())
        torch._dynamo.utils.counters.clear()
        cached = model.generate(**inputs, **GREEDY, max_new_tokens=5, **options)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        assert_same_generation(cached, whole(model, inputs, 5))


def test_a_compiled_model(llava):
    model, processor = llava
    with attach(
        model, processor, vmtc=VMTCConfig(num_primary=8, num_merged=4), cmai=HALF
    ) as handle:
        inputs = handle.prepare(**photos())
        with torch.no_grad():
            expected = model(**inputs).logits
            torch._dynamo.reset()
            actual = torch.compile(model, backend="aot_eager")(**inputs).logits
    real = inputs["attention_mask"].bool()
    close(actual[real], expected[real])


def test_scores_and_masks_are_kept_on_request(llava):
    model, processor = llava
    with attach(model, processor, cmai=replace(HALF, layers=(1,)), record=True) as handle:
        inputs = handle.prepare(**one())
        with torch.no_grad():
            logits = model(**inputs).logits
        (layer,) = handle.last.focus
        result = handle.last.focus[layer]
    length = inputs["input_ids"].shape[1]
    assert layer == 1
    assert result.scores.shape == (1, 1, length, 64) and result.mask.shape == (1, 1, length, 2)
    with attach(model, processor, cmai=replace(HALF, layers=(1,))), torch.no_grad():
        close(model(**inputs).logits, logits)
