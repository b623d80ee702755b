"""Token reducers of the laboratory: in its model, against embeddings reduced outside and loops."""
# bench is a folder of the project and not installed
# ruff: noqa: E402

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

transformers = pytest.importorskip("transformers", "5.17")
pytest.importorskip("skimage")
llava = transformers.LlavaForConditionalGeneration.forward

from bench.quality import fastv
from bench.quality.model import BOS, EOS, IMAGE, SPECIAL, build, processor
from bench.quality.reducers import NAMED, TOKENS
from vmtc_kernels import CMAIConfig
from vmtc_kernels.integrations.transformers import attach

VMTC = NAMED["VMTC"]
BUDGETS = (TOKENS, 72, 36, 17)
BEFORE = {
    **{name: make() for name, make in NAMED.items() if name != "FastV"},
    "euclidean": VMTC(metric="euclidean", weighting="uniform", share=0.5),
    "keys": VMTC(feature_layer="keys", head_reduction="max", score_layer=-3),
    "layer": VMTC(feature_layer=1, iterations=3),
    "pruning": VMTC(share=0.0),
    "merging": VMTC(share=1.0),
}
INSIDE = {"FastV": NAMED["FastV"](), "after": VMTC(placement="after_projector")}
ALL = {**BEFORE, **INSIDE}
# of a model's argument and of what it gives; an older name in transformers 5.17
CACHE = next(n for n in ("cache", "past_key_values") if n in inspect.signature(llava).parameters)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def lab():
    """A model of random weights that are large enough to tell tokens apart, with two images."""
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    model = build(64).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embed" not in name:
                p.mul_(5)
    tokens = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(dict(zip(SPECIAL, range(4), strict=True)))),
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    pixels = torch.nn.functional.interpolate(torch.randn(2, 3, 24, 24), size=(192, 192))
    return SimpleNamespace(model=model, processor=processor(tokens), pixels=pixels)


def prompt(lab, count, words=7):
    ids = torch.randint(4, 64, (2, words), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([torch.full((2, 1), BOS), torch.full((2, count), IMAGE), ids], dim=1)
    return {"input_ids": ids, "pixel_values": lab.pixels}


@torch.no_grad()
def logits(lab, count):
    return lab.model(**prompt(lab, count)).logits


@torch.no_grad()
def generate(model, inputs, new=8):
    """Tokens ``[B, new]`` and their logits ``[B, new, V]``."""
    options = {"return_dict_in_generate": True, "output_logits": True}
    # one of random weights would say one word all the time
    options |= {"no_repeat_ngram_size": 1, "do_sample": False}
    out = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, **options)
    return out.sequences[:, -new:], torch.stack(out.logits, dim=1)


@pytest.fixture
def projected(lab):
    """What the projector got, last pass first."""
    seen = []
    # behind the projector's own hooks
    hook = lab.model.model.multi_modal_projector.linear_1.register_forward_pre_hook(
        lambda _, args: seen.insert(0, args[0])
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize("name", BEFORE)
@torch.no_grad()
def test_the_model_sees_what_was_reduced_outside(lab, name, projected):
    reducer, inner, met = BEFORE[name], lab.model.model, 0
    whole = logits(lab, TOKENS)
    for tokens in BUDGETS:
        if not (count := reducer.counts(tokens)):
            continue
        seen = reducer.see(lab.model, lab.pixels)
        few = reducer.reduce(*seen[:3], tokens, seed=5)
        assert few.shape == (2, count, 192) and few.dtype == torch.float32
        inputs = prompt(lab, count)
        embedded = inner.get_input_embeddings()(inputs["input_ids"])
        embedded[:, 1 : 1 + count] = inner.multi_modal_projector(few)
        expected = lab.model(inputs_embeds=embedded).logits
        with reducer.on(lab.model, lab.processor, tokens, seed=5):
            got = lab.model(**inputs).logits
        torch.testing.assert_close(got, expected, **CLOSE)
        # bit for bit, and so in the same order
        assert torch.equal(projected[0].reshape(few.shape), few)
        if count == TOKENS:
            assert torch.equal(few, seen.x) and torch.equal(got, whole)
        else:
            assert (got[:, -1] - whole[:, -1]).abs().max() > 0.01
        met += 1
    assert met == {"none": 1, "downsampling": 3}.get(name, 4)


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_as_before(lab, name):
    reducer = ALL[name]
    before = logits(lab, TOKENS)
    # transformers leaves hooks of its own
    parts, names = _hooks(lab.model), vars(lab.model.model).keys() | set()
    tokens = next(t for t in reversed(BUDGETS) if reducer.counts(t))
    count = reducer.counts(tokens)
    with reducer.on(lab.model, lab.processor, tokens):
        once = logits(lab, count)
    assert _hooks(lab.model) == parts and torch.equal(logits(lab, TOKENS), before)
    with (
        pytest.raises(ValueError, match=r"do not match|image tokens of rows"),
        reducer.on(lab.model, lab.processor, tokens),
    ):
        logits(lab, 3)  # an error in the middle of a pass
    with pytest.raises(KeyError), reducer.on(lab.model, lab.processor, tokens):
        raise KeyError
    assert _hooks(lab.model) == parts and vars(lab.model.model).keys() == names
    assert lab.model.model.language_model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(lab, TOKENS), before)
    with reducer.on(lab.model, lab.processor, tokens):
        assert torch.equal(logits(lab, count), once)


def _hooks(model):
    return [(*m._forward_pre_hooks, *m._forward_hooks) for m in model.modules()]


def test_an_error_on_the_way_in_leaves_nothing(lab):
    reducer, parts = NAMED["ToMe"](cmai=CMAIConfig(layers=(9,))), _hooks(lab.model)
    with (
        pytest.raises(ValueError, match="not among 6 layers"),
        reducer.on(lab.model, lab.processor, 36),
    ):
        raise AssertionError
    assert _hooks(lab.model) == parts


# ---- what reducers go by


@torch.no_grad()
def test_rivals_go_by_the_layer_that_is_read(lab):
    tower = lab.model.model.vision_tower
    tower.set_attn_implementation("eager")
    try:
        out = tower(lab.pixels, output_attentions=True, output_hidden_states=True)
    finally:
        tower.set_attn_implementation("sdpa")
    seen = NAMED["PruMerge"]().see(lab.model, lab.pixels)
    torch.testing.assert_close(seen.x, out.hidden_states[5][:, 1:], **CLOSE)
    torch.testing.assert_close(seen.scores, out.attentions[4][:, :, 0, 1:].mean(1), **CLOSE)
    layer = tower.get_submodule("encoder" if hasattr(tower, "encoder") else "vision_model.encoder")
    layer = layer.layers[4]
    keys = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[4]))[:, 1:]
    torch.testing.assert_close(seen.keys, keys.unflatten(2, (6, 32)).mean(2), **CLOSE)
    # scores far from alike, or a wrong layer would be as good
    assert (seen.scores.amax(1) > 3 * seen.scores.mean(1)).all()
    assert seen.output.pooler_output.shape == (2, 192)
    # a count from the start is the same layer
    lab.model.config.vision_feature_layer = 5
    try:
        again = NAMED["PruMerge"]().see(lab.model, lab.pixels)
    finally:
        lab.model.config.vision_feature_layer = -2
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], again[:3], strict=True))


def test_random_hangs_on_the_seed_alone(lab):
    reducer = NAMED["random"]()
    x = torch.arange(2.0 * TOKENS).view(2, TOKENS, 1)
    drawn = {seed: reducer.reduce(x, None, None, 36, seed)[..., 0] for seed in (0, 1, 0)}
    assert torch.equal(drawn[0], reducer.reduce(x, None, None, 36)[..., 0])
    assert not torch.equal(drawn[0], drawn[1])
    for rows in drawn.values():
        assert (rows.diff(dim=1) > 0).all() and torch.equal(rows[1], rows[0] + TOKENS)
    seen = []
    for seed in (0, 1, 0):
        with reducer.on(lab.model, lab.processor, 36, seed):
            seen.append(logits(lab, 36))
    assert torch.equal(seen[0], seen[2]) and (seen[0] - seen[1]).abs().max() > 0.01


def test_strided_tokens_are_even():
    x = torch.arange(float(TOKENS)).view(1, TOKENS, 1)
    steps = NAMED["strided"]().reduce(x, None, None, 36, 0).flatten().diff()
    assert (steps == 4).all()


def test_counts_and_what_a_layer_sees():
    counts = {name: [make().counts(t) for t in BUDGETS] for name, make in NAMED.items()}
    assert counts.pop("none") == [144, 0, 0, 0]
    assert counts.pop("downsampling") == [144, 0, 36, 16]
    assert counts.pop("FastV") == [144] * 4
    assert all(each == [144, 72, 36, 17] for each in counts.values())
    assert [NAMED["downsampling"]().counts(t) for t in (1, 9, 10, 15, 16, 18, 35, 38)] == [
        *(1, 9, 9, 0, 16, 0, 0, 36)
    ]
    for make in NAMED.values():
        assert make().counts(0) == make().counts(145) == make().counts(-3) == 0
    assert [NAMED["FastV"]().mean_tokens(t) for t in BUDGETS] == [144, 96, 72, 356 / 6]
    assert NAMED["FastV"]().mean_tokens(36, layers=12) == 54
    assert NAMED["downsampling"]().mean_tokens(17) == 16
    assert [VMTC().config(t).counts(TOKENS) for t in BUDGETS] == [
        *((72, 72), (36, 36), (18, 18), (9, 8))
    ]


@torch.no_grad()
def test_what_cannot_be_is_refused(lab):
    x = torch.randn(1, TOKENS, 192)
    cases = [
        (lambda: NAMED["downsampling"]().reduce(x, None, None, 72), "downsampling cannot reduce"),
        (lambda: NAMED["none"]().on(lab.model, lab.processor, 36).__enter__(), "none cannot"),
        (lambda: NAMED["FastV"]().reduce(x, None, None, 36), "inside the language model"),
        (lambda: INSIDE["after"].reduce(x, x[..., 0], None, 36), "placement 'after_projector'"),
        (lambda: NAMED["FastV"](cmai=CMAIConfig()), "one of them"),
        (lambda: NAMED["ToMe"](method="tome"), "method must be of ToMe, VisionZip, PruMerge"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_settings_are_json_and_tell_reducers_apart():
    made = [*ALL.values(), VMTC(cmai=CMAIConfig(layers=(2, 3))), VMTC(cmai=CMAIConfig())]
    assert len(set(made)) == len(made) and VMTC() in made
    told = [json.dumps(r.settings) for r in made]
    assert len(set(told)) == len(made)
    assert json.loads(told[-2])["cmai"]["layers"] == [2, 3]
    assert json.loads(told[-1])["share"] == 0.5
    assert {r.name for r in made} == set(NAMED)
    assert replace(VMTC(), name="ours").name == "ours"


# ---- in training


@pytest.mark.parametrize("name", BEFORE)
def test_gradients_pass(lab, name):
    reducer, tower = BEFORE[name], lab.model.model.vision_tower
    tokens = next(t for t in reversed(BUDGETS) if reducer.counts(t))
    with torch.autocast("cpu", torch.bfloat16):
        seen = reducer.see(lab.model, lab.pixels)
        few = reducer.reduce(*seen[:3], tokens)
    few.float().square().sum().backward()
    gradients = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
    tower.zero_grad()
    assert all(g.isfinite().all() for g in gradients.values())
    # of layers 4 and 0: scores alone would have none for what comes after the attention of layer 4
    for part in ("layers.4.mlp.fc2.weight", "layers.0.mlp.fc2.weight"):
        assert any(part in n and g.abs().sum() > 0 for n, g in gradients.items()), part


# ---- CMAI


@pytest.mark.parametrize("name", ["none", "downsampling", "random", "VMTC", "VisionZip"])
@torch.no_grad()
def test_cmai_on_top(lab, name, monkeypatch):
    cmai = CMAIConfig(keep_ratio=0.25)
    reducer = NAMED[name](cmai=cmai)
    tokens = TOKENS if name == "none" else 36
    inputs = prompt(lab, tokens)
    with NAMED[name]().on(lab.model, lab.processor, tokens):
        without = generate(lab.model, inputs)[1]
    with reducer.on(lab.model, lab.processor, tokens):
        got = generate(lab.model, inputs)
    few = reducer.reduce(*reducer.see(lab.model, lab.pixels)[:3], tokens)
    features = list(lab.model.model.multi_modal_projector(few))
    output = transformers.modeling_outputs.BaseModelOutputWithPooling(pooler_output=features)
    monkeypatch.setattr(lab.model.model, "get_image_features", lambda pixel_values, **_: output)
    with attach(lab.model, lab.processor, cmai=cmai):
        expected = generate(lab.model, inputs)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], **CLOSE)
    assert (got[1] - without).abs().max() > 0.01


# ---- FastV


def loop(model, ids, embedded, tokens, new):
    """Greedy tokens and logits of one row ``[L]`` and ``[1, L, D]``, every pass from the beginning
    and without a cache: each layer gets the tokens that it may see, at the places they had."""
    text, left, out, said = model.model.language_model, [], [], []
    text.set_attn_implementation("eager")
    for _ in range(new):
        states, places = embedded, torch.arange(embedded.shape[1])[None]
        for i, layer in enumerate(text.layers):
            if i == 2:
                places = torch.tensor([[*left, *range(1 + TOKENS, embedded.shape[1])]])
                states = states[:, places[0]]
            length = states.shape[1]
            mask = torch.full((1, 1, length, length), -torch.inf).triu(1)
            turned = text.rotary_emb(states, places)
            if i == 1 and not left:
                normed = layer.input_layernorm(states)
                weights = layer.self_attn(normed, position_embeddings=turned, attention_mask=mask)
                image = weights[1][0, :, -1].mean(0)[1 : 1 + TOKENS].tolist()
                best = sorted(range(TOKENS), key=[-w for w in image].__getitem__)[:tokens]
                left = [0, *(1 + j for j in sorted(best))]
            states = layer(states, attention_mask=mask, position_embeddings=turned)
        out.append(model.lm_head(text.norm(states)[:, -1]))
        ruled_out = torch.tensor([EOS, *ids.tolist(), *said])
        said.append(int(out[-1].index_fill(1, ruled_out, -torch.inf).argmax()))
        embedded = torch.cat([embedded, text.embed_tokens(torch.tensor([said[-1:]]))], dim=1)
    text.set_attn_implementation("sdpa")
    return torch.tensor(said), torch.cat(out)


@pytest.mark.parametrize("tokens", [72, 17, TOKENS])
@torch.no_grad()
def test_fastv_is_its_loop(lab, tokens):
    inner, inputs = lab.model.model, prompt(lab, TOKENS)
    with NAMED["FastV"]().on(lab.model, lab.processor, tokens):
        chosen, got = generate(lab.model, inputs)
        whole = lab.model(**inputs).logits
    unpruned = generate(lab.model, inputs)[1]
    ids = inputs["input_ids"]
    embedded = inner.get_input_embeddings()(ids)
    x = NAMED["none"]().see(lab.model, lab.pixels).x
    embedded[:, 1 : 1 + TOKENS] = inner.multi_modal_projector(x)
    rows = [loop(lab.model, ids[i], embedded[i, None], tokens, 8) for i in range(2)]
    words, expected = (torch.stack(each) for each in zip(*rows, strict=True))
    assert torch.equal(chosen, words)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert whole.shape[1] == 1 + tokens + 7
    torch.testing.assert_close(whole[:, -1], expected[:, 0], **CLOSE)
    if tokens < TOKENS:
        assert (got - unpruned).abs().amax((0, 2)).min() > 0.01


@torch.no_grad()
def test_fastv_shortens_the_later_caches_alone(lab):
    with NAMED["FastV"]().on(lab.model, lab.processor, 17):
        cache = lab.model(**prompt(lab, TOKENS))[CACHE]
    lengths = [cache.get_seq_length(i) for i in range(6)]
    assert lengths == [152] * fastv.LAYER + [25] * (6 - fastv.LAYER)


@torch.no_grad()
def test_fastv_refuses_what_it_would_get_wrong(lab):
    inputs, reducer = prompt(lab, TOKENS), NAMED["FastV"]()
    padded = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    padded["attention_mask"][0, 0] = 0
    uneven = {**inputs, "input_ids": inputs["input_ids"].clone()}
    uneven["input_ids"][0, 1] = 9
    with reducer.on(lab.model, lab.processor, 36):
        with pytest.raises(ValueError, match="without padding"):
            lab.model(**padded)
        with pytest.raises(ValueError, match=r"same number .* \[143, 144\]"):
            lab.model(**uneven)
        with pytest.raises(ValueError, match="needs input_ids"):
            lab.model(inputs_embeds=torch.randn(1, 150, 192))
        cache = lab.model(**inputs)[CACHE]
        with pytest.raises(ValueError, match="one piece"):
            lab.model(**inputs, **{CACHE: cache})
        with pytest.raises(ValueError, match="grows"):
            lab.model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    lab.model.set_attn_implementation({"text_config": "eager"})
    try:
        with (
            pytest.raises(ValueError, match="got 'eager'"),
            reducer.on(lab.model, lab.processor, 36),
        ):
            raise AssertionError
    finally:
        lab.model.set_attn_implementation({"text_config": "sdpa"})
