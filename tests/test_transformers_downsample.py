"""Spatial downsampling in transformers, against features averaged outside of the model."""

import math

import pytest
import torch

pytest.importorskip("transformers")

import vlm
import vlm_oracle

from vmtc_kernels import CMAIConfig, VMTCConfig
from vmtc_kernels.integrations.transformers import attach

GRIDS = {"llava": 64, "idefics3": 16, "smolvlm": 16}  # tokens of an image, or of a tile


def averaged(x, factor):
    """Of x [tokens, D], a square line by line: the mean of each cell, in float64."""
    side = math.isqrt(len(x))
    grid = x.double().view(side, side, -1)
    starts = range(0, side, factor)
    cells = [
        grid[r : r + factor, c : c + factor].flatten(0, 1).mean(0) for r in starts for c in starts
    ]
    return torch.stack(cells).to(x.dtype)


def given_to(family):
    """A row with two images, one with one and one without any."""
    images = [[vlm.photo(96, 64, 1), vlm.photo(64, 64, 2)], [vlm.photo(50, 120, 3)], []]
    texts = [vlm.prompt(family, images=2), vlm.prompt(family, "how many?"), "what is it?"]
    return {"images": images, "text": texts}


def by_hand(family, model, inputs, factor, fixed=0):
    """The features that replace those of all images, [M, D]; `fixed` rows of each stay."""
    core = model.model
    names = ("pixel_values", "pixel_attention_mask")
    given = {k: v for k, v in inputs.items() if k in names}
    projector = core.multi_modal_projector if family == "llava" else core.connector
    projector = getattr(projector, "modality_projection", projector)
    x, _ = vlm_oracle.entering(projector, lambda: core.get_image_features(**given))
    units = [torch.cat([u[:fixed], averaged(u[fixed:], factor)]) for u in x]
    return projector(torch.stack(units)).flatten(0, 1)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("family", GRIDS)
def test_logits_are_those_of_features_averaged_outside(family, factor):
    model, processor = vlm.make(family)
    given = given_to(family)
    with torch.no_grad():
        plain = processor(**given, padding=True, return_tensors="pt")
        features = by_hand(family, model, plain, factor)
        with attach(model, processor, downsample=factor) as handle:
            assert handle.unit_tokens == GRIDS[family]
            inputs = handle.prepare(**given)
            actual = model(**inputs).logits
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        embeds = model.get_input_embeddings()(ids)
        shown = ids == model.config.image_token_id
        embeds[shown] = features
        expected = model(inputs_embeds=embeds, attention_mask=mask).logits
    side = math.isqrt(GRIDS[family])
    left, all_ = int(shown.sum()), int((plain["input_ids"] == model.config.image_token_id).sum())
    assert left * side**2 == all_ * math.ceil(side / factor) ** 2
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_cls_stays_where_the_projector_sees_it():
    model, processor = vlm.make("llava", strategy="full")
    given = {"images": [[vlm.photo(96, 64, 1)]], "text": [vlm.prompt("llava")]}
    with torch.no_grad():
        plain = processor(**given, return_tensors="pt")
        expected = by_hand("llava", model, plain, 2, fixed=1)
        with attach(model, processor, downsample=2) as handle:
            inputs = handle.prepare(**given)
            (actual,) = model.model.get_image_features(inputs["pixel_values"]).pooler_output
            model(**inputs)
    assert len(actual) == 1 + 16
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_generation_continuous_batching_and_what_was_done():
    model, processor = vlm.make("llava")
    one = {"images": [[vlm.photo(96, 64, 1)]], "text": [vlm.prompt("llava")]}
    with attach(model, processor, downsample=2, record=True) as handle, torch.no_grad():
        inputs = handle.prepare(**one)
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        (units,) = handle.last.merged["image"]
        ids = handle.request(images=one["images"][0], text=one["text"][0])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    assert len(ids) == inputs["input_ids"].shape[1]
    assert units.sizes.tolist() == [[4] * 16] and units.owner[0, [0, 1, 8, 9]].tolist() == [0] * 4
    assert units.place[0, :5].tolist() == [0, 2, 4, 6, 16]
    with attach(
        model, processor, downsample=2, cmai=CMAIConfig(keep_ratio=1.0, layers=None)
    ) as handle:
        inputs = handle.prepare(**one)
        assert (model.generate(**inputs, max_new_tokens=6, do_sample=False) == expected).all()


def test_what_cannot_be_downsampled():
    model, processor = vlm.make("llava")

    def refused(words, error=ValueError, of=(model, processor), **parts):
        with pytest.raises(error, match=words):
            attach(*of, **parts)

    refused("both given: choose one", vmtc=VMTCConfig(num_primary=0.5), downsample=2)
    refused("downsample must be at least 2, got 1", downsample=1)
    refused("downsample must be 2 to 8 for grids of 8 x 8 tokens, got 9", downsample=9)
    refused("downsample must be an int, got float", TypeError, downsample=2.0)
    for family in ("llava_next", "qwen2_5_vl", "qwen3_vl"):
        words = f"square grids of tokens, which those of {family} need not be: use vmtc"
        refused(words, of=vlm.make(family), downsample=2)
    attach(model, processor, downsample=8).detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
