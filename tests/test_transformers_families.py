"""VMTC in each family of models, against embeddings that are compressed outside of it."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

import vlm
import vlm_oracle

from vmtc_kernels import VMTCConfig
from vmtc_kernels.integrations.transformers import attach

SOME = {"num_primary": 0.3, "num_merged": 0.2}


@pytest.fixture(scope="module", params=vlm.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def made(family):
    return vlm.make(family)


def photos(family):
    """Two rows with images of several sizes, then one without any."""
    images = [[vlm.photo(96, 64, 1), vlm.photo(64, 64, 2)], [vlm.photo(50, 120, 3)], []]
    texts = [vlm.prompt(family, images=2), vlm.prompt(family, "how many?"), "what is it?"]
    return {"images": images, "text": texts}


def real(inputs, values):
    return [v[m.bool()] for v, m in zip(values, inputs["attention_mask"], strict=True)]


def assert_equal_rows(actual, expected):
    assert [len(a) for a in actual] == [len(e) for e in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def run(model, processor, config, given, **options):
    with attach(model, processor, vmtc=config, **options) as handle, torch.no_grad():
        inputs = handle.prepare(**given)
        return real(inputs, model(**inputs).logits), inputs


@pytest.mark.parametrize("placement", ["before_projector", "after_projector"])
def test_logits_are_those_of_embeddings_compressed_outside(family, made, placement):
    model, processor = made
    given = photos(family)
    config = VMTCConfig(**SOME, placement=placement)
    inputs = processor(**given, padding=True, return_tensors="pt")
    expected = vlm_oracle.logits(family, model, inputs, config)
    actual, prepared = run(model, processor, config, given)
    assert prepared["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    assert_equal_rows(actual, expected)


def test_uniform_weights_and_another_layer(family, made):
    model, processor = made
    config = VMTCConfig(**SOME, weighting="uniform", score_layer=0, metric="euclidean")
    given = photos(family)
    inputs = processor(**given, padding=True, return_tensors="pt")
    expected = vlm_oracle.logits(family, model, inputs, config, score_layer=0)
    assert_equal_rows(run(model, processor, config, given)[0], expected)


@pytest.mark.parametrize("features", ["keys", 0])
@pytest.mark.parametrize("placement", ["before_projector", "after_projector"])
def test_clusters_of_other_features(family, made, features, placement):
    model, processor = made
    config = VMTCConfig(**SOME, feature_layer=features, placement=placement)
    given = photos(family)
    inputs = processor(**given, padding=True, return_tensors="pt")
    expected = vlm_oracle.logits(family, model, inputs, config)
    assert_equal_rows(run(model, processor, config, given)[0], expected)


def test_pruning_alone(family, made):
    model, processor = made
    config = VMTCConfig(num_primary=0.4, num_merged=0)
    given = photos(family)
    inputs = processor(**given, padding=True, return_tensors="pt")
    expected = vlm_oracle.logits(family, model, inputs, config)
    assert_equal_rows(run(model, processor, config, given)[0], expected)


@pytest.mark.parametrize("family", ["llava"])
def test_llava_may_score_by_attention_received(family):
    model, processor = vlm.make(family)
    config = VMTCConfig(**SOME, score_source="received")
    given = photos(family)
    inputs = processor(**given, padding=True, return_tensors="pt")
    expected = vlm_oracle.logits(family, model, inputs, config, cls=False)
    assert_equal_rows(run(model, processor, config, given)[0], expected)


ALL = VMTCConfig(num_primary=0.75, num_merged=0.25)
INSIDE = {"placement": 1, "score_layer": 1}
CHOICES = [
    {"placement": "before_projector"},
    {"placement": "after_projector"},
    {"feature_layer": "keys"},
    {"feature_layer": 0},
    INSIDE,
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
def test_where_all_is_kept_nothing_changes(family, choice):
    if family == "llava_next" and choice is INSIDE:
        choice = CHOICES[0]  # what is refused there, see below
    model, processor = vlm.make(family, vision_layers=4)
    given = photos(family)
    plain = processor(**given, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = real(plain, model(**plain).logits)
    actual, inputs = run(model, processor, replace(ALL, **choice), given)
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    for a, e in zip(actual, expected, strict=True):
        if choice is INSIDE:  # the layers after it may have their patches in another order
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(a, e)


@pytest.mark.parametrize("choice", CHOICES[2:], ids=["keys", "features", "inside"])
def test_other_features_and_layers_choose_other_tokens(family, choice):
    if family == "llava_next" and choice is INSIDE:
        choice = CHOICES[1]
    model, processor = vlm.make(family, vision_layers=4)
    given = photos(family)
    config = VMTCConfig(num_primary=0.1, num_merged=0.2)
    base, _ = run(model, processor, config, given)
    other, _ = run(model, processor, replace(config, **choice), given)
    assert all(o.isfinite().all() for o in other)
    assert [o.shape for o in other] == [b.shape for b in base]
    assert not torch.allclose(other[0], base[0], atol=1e-3)


# llava_next cuts its tiles after the encoder
@pytest.mark.parametrize("family", [f for f in vlm.FAMILIES if f != "llava_next"])
def test_layers_after_the_merge_run_on_fewer_tokens(family):
    model, processor = vlm.make(family, vision_layers=4)
    sizes = []
    layers = next(
        m for m in model.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4
    )
    for layer in layers:
        layer.register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[-2]))
    run(model, processor, VMTCConfig(**SOME, **INSIDE), photos(family))
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3]


@pytest.mark.parametrize("family", [f for f in vlm.FAMILIES if f != "llava_next"])
def test_layers_after_the_merge_see_what_is_left(family):
    """As if the tokens that are dropped were masked in the layers after that."""
    model, processor = vlm.make(family, vision_layers=4)
    core = model.model
    inputs = processor(**photos(family), padding=True, return_tensors="pt")
    names = ("pixel_values", "pixel_attention_mask", "image_grid_thw")
    given = {name: inputs[name] for name in names if name in inputs}
    if "pixel_attention_mask" in given:  # some patches are padding
        given["pixel_attention_mask"][..., 40:, :24] = 0
    config = VMTCConfig(num_primary=0.4, num_merged=0, **INSIDE)
    with attach(model, processor, vmtc=config, record=True) as handle, torch.no_grad():
        actual = core.get_image_features(**given)
        kept = [m.rows.gather(1, m.place).flatten() for m in handle.last.merged["image"]]
        rows = torch.cat(kept).sort().values
    with torch.no_grad(), vlm_oracle.dropped(family, model, rows, after=1):
        expected = core.get_image_features(**given)
    for name in ("pooler_output", "deepstack_features"):
        few, all_ = vlm_oracle.flat(actual, name), vlm_oracle.flat(expected, name)
        assert len(few) == len(all_)
        for a, e in zip(few, all_, strict=True):
            shown = vlm_oracle.shown(family, core, rows, given)
            torch.testing.assert_close(a, e[shown], rtol=1e-4, atol=1e-4)


def test_features_that_are_taken_where_tokens_are_merged():
    """Qwen3-VL's features of the layer behind which tokens become fewer are of merged tokens."""
    model, processor = vlm.make("qwen3_vl", vision_layers=4)
    visual = model.model.visual
    (index,) = visual.deepstack_visual_indexes[:1]
    inputs = processor(**photos("qwen3_vl"), padding=True, return_tensors="pt")
    config = VMTCConfig(**SOME, placement=index, score_layer=index)
    with attach(model, processor, vmtc=config), torch.no_grad():
        given = inputs["pixel_values"], inputs["image_grid_thw"]
        block = visual.blocks[index]
        states, output = vlm_oracle.hidden_after(
            block, lambda: model.model.get_image_features(*given)
        )
    with torch.no_grad():
        expected = visual.deepstack_merger_list[0](states)
    assert torch.equal(vlm_oracle.flat(output, "deepstack_features")[0], expected)


def test_generation_goes_on_as_without_a_cache(family, made):
    model, processor = made
    config = VMTCConfig(**SOME)
    with attach(model, processor, vmtc=config) as handle:
        inputs = handle.prepare(**photos(family))
        steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        steps |= {"output_logits": True, "return_dict_in_generate": True}
        cached = model.generate(**inputs, **steps)
        whole = model.generate(**inputs, **steps, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    for a, b in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_the_others(family, made):
    model, processor = made
    given = photos(family)
    together, _ = run(model, processor, VMTCConfig(**SOME), given)
    for row, (images, text) in enumerate(zip(given["images"], given["text"], strict=True)):
        alone = {"images": [images] if images else None, "text": [text]}
        (single,), _ = run(model, processor, VMTCConfig(**SOME), alone)
        torch.testing.assert_close(single, together[row], rtol=1e-4, atol=1e-4)


def test_an_image_of_one_colour(family, made):
    """All scores and features alike: as many tokens as asked for all the same."""
    model, processor = made
    image = vlm.photo(64, 64).resize((1, 1)).resize((64, 64))
    given = {"images": [[image]], "text": [vlm.prompt(family)]}
    (actual,), inputs = run(model, processor, VMTCConfig(**SOME), given)
    assert actual.isfinite().all() and inputs["attention_mask"].all()


def test_counts_of_tokens(family, made):
    """Counts as well as shares; a tile that was cut keeps no more than it has."""
    model, processor = made
    size = {"llava": 64, "qwen2_5_vl": 24, "qwen3_vl": 24}.get(family, 16)
    given = {"images": [[vlm.photo(96, 64)]], "text": [vlm.prompt(family)]}
    plain = processor(**given, return_tensors="pt")["input_ids"]
    token = model.config.image_token_id
    config = VMTCConfig(num_primary=5, num_merged=3)
    _, inputs = run(model, processor, config, given)
    left, before = ((ids == token).sum().item() for ids in (inputs["input_ids"], plain))
    if family == "llava_next":  # 16 + 6 rows of newlines of 4 tiles of which 8 to 12 stay
        assert before == 70 and left == 8 * 5 + 6
    else:
        assert left * size == before * 8


def test_a_chat_of_several_turns(family, made):
    model, processor = made
    image = [{"type": "image"}]
    chat = [
        {"role": "user", "content": [*image, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a rocket."}]},
        {"role": "user", "content": [*image, {"type": "text", "text": "and this?"}]},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    given = {"images": [[vlm.photo(64, 64, 1), vlm.photo(96, 64, 2)]], "text": [text]}
    config = VMTCConfig(**SOME)
    inputs = processor(**given, return_tensors="pt")
    expected = vlm_oracle.logits(family, model, inputs, config)
    assert_equal_rows(run(model, processor, config, given)[0], expected)


@pytest.mark.parametrize("family", vlm.QWEN)
def test_a_video_is_compressed_frame_by_frame(family):
    model, processor = vlm.make(family)
    video = vlm.video(64, 48, frames=6)
    given = {
        "images": [vlm.photo(64, 64)],
        "videos": [video],
        "text": [vlm.prompt(family, images=1, videos=1)],
    }
    plain = processor(**given, return_tensors="pt")
    with torch.no_grad():
        expected = model(**plain).logits
    (actual,), _ = run(model, processor, ALL, given)
    assert torch.equal(actual, expected[0])

    config = VMTCConfig(num_primary=2, num_merged=1)
    with attach(model, processor, vmtc=config, record=True) as handle:
        inputs = handle.prepare(**given)
        steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        cached = model.generate(**inputs, **steps)
        assert torch.equal(cached, model.generate(**inputs, **steps, use_cache=False))
    ids = inputs["input_ids"]
    frames = int(plain["video_grid_thw"][0, 0])
    assert frames == 3 and (ids == model.config.video_token_id).sum() == 3 * frames
    assert (ids == model.config.image_token_id).sum() == 3
    assert sum(len(m.rows) for m in handle.last.merged["video"]) == frames


@pytest.mark.parametrize("family", vlm.QWEN)
def test_places_in_the_grid(family):
    """Rotary positions of what is left are those that it had; text goes on after the whole image"""
    model, processor = vlm.make(family)
    given = photos(family)
    plain = processor(**given, padding=True, return_tensors="pt")
    asked = {k: v for k, v in plain.items() if k != "pixel_values"}
    whole, deltas = model.model.get_rope_index(**asked)
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with attach(model, processor, vmtc=VMTCConfig(**SOME)) as handle, torch.no_grad():
        inputs = handle.prepare(**given)
        model(**inputs)
        assert model.model.rope_deltas.shape == deltas.shape
        for row in range(3):
            mask, before = inputs["attention_mask"][row].bool(), plain["attention_mask"][row].bool()
            now, full = seen[0][-3:, row, mask], whole[:, row, before]
            assert now.max() + 1 - now.shape[1] == model.model.rope_deltas[row]
            text = inputs["input_ids"][row, mask] != model.config.image_token_id
            text_before = plain["input_ids"][row, before] != model.config.image_token_id
            assert torch.equal(now[:, text], full[:, text_before])
            left = [tuple(p) for p in now[:, ~text].T.tolist()]
            # in the order of the image, and none twice
            places = [tuple(p) for p in full[:, ~text_before].T.tolist()]
            assert [places.index(p) for p in left] == sorted({places.index(p) for p in left})
