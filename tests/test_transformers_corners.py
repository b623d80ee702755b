"""What a model may go through besides: other prompts before, threads, autocast, compilation."""

import copy
import pickle
import threading
from contextlib import nullcontext
from inspect import signature

import pytest
import torch

pytest.importorskip("transformers")

import transformers
import vlm

from vmtc_kernels import CMAIConfig, VMTCConfig
from vmtc_kernels.integrations.transformers import attach

SOME = VMTCConfig(num_primary=0.3, num_merged=0.2)
HALF = CMAIConfig(keep_ratio=0.5, layers=None)
BOTH = {"vmtc": SOME, "cmai": HALF}


@pytest.fixture(scope="module", params=vlm.FAMILIES)
def made(request):
    return request.param, *vlm.make(request.param)


@pytest.fixture(params=vlm.QWEN)
def qwen(request):
    return request.param, *vlm.make(request.param)


@pytest.fixture
def llava():
    return vlm.make("llava")


def one(family="llava", seed=1, size=(96, 64)):
    return {"images": [[vlm.photo(*size, seed)]], "text": [vlm.prompt(family)]}


def fresh(family, inputs_of, **parts):
    """Logits of a prompt on a model that has seen no other."""
    model, processor = vlm.make(family)
    with attach(model, processor, **parts) as handle, torch.no_grad():
        return model(**inputs_of(handle)).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def cache_name(model):
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


# positions of Qwen


def test_prompts_of_another_kind_one_after_the_other(qwen):
    family, model, processor = qwen
    prompts = {
        "image": {"images": [vlm.photo(64, 96, 2)], "text": [vlm.prompt(family)]},
        "video": {"videos": [vlm.video(64, 48)], "text": [vlm.prompt(family, images=0, videos=1)]},
        "none": {"text": ["how many?"]},
    }
    prompts["both"] = {
        **{"images": [vlm.photo(96, 64, 3)], "videos": [vlm.video(48, 64)]},
        "text": [vlm.prompt(family, images=1, videos=1)],
    }
    with attach(model, processor, vmtc=SOME) as handle, torch.no_grad():
        for name in ("image", "video", "both", "none", "video", "image", "both"):
            given = prompts[name]
            expected = fresh(family, lambda h, given=given: h.prepare(**given), vmtc=SOME)
            assert torch.equal(model(**handle.prepare(**given)).logits, expected)


@pytest.mark.parametrize("parts", [{"vmtc": SOME}, BOTH], ids=["vmtc", "both"])
def test_a_second_question_on_the_same_cache(made, parts):
    family, model, processor = made
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"max_new_tokens": 3, "suppress_tokens": [2, 3, 4]}
    with attach(model, processor, **parts) as handle:
        first = handle.prepare(**one(family))
        given = one(family)
        more = handle.prepare(images=given["images"], text=[given["text"][0] + " and how many?"])
        expected = model.generate(**more, **options)
        name = cache_name(model)
        kept = model.generate(**first, max_new_tokens=1, return_dict_in_generate=True)[name]
        del more["pixel_values"]
        cached = model.generate(**more, **{name: kept}, **options)
    assert torch.equal(cached.sequences, expected.sequences)
    for a, b in zip(cached.logits, expected.logits, strict=True):
        close(a, b)


def encodes_first(model):
    return "mm_encoder_outputs" in signature(model.forward).parameters


def test_a_second_image_on_the_same_cache(qwen):
    family, model, processor = qwen
    if not encodes_first(model):
        pytest.skip("transformers takes no images that are encoded already")
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"max_new_tokens": 3, "suppress_tokens": [2, 3, 4]}
    image, second = one(family)["images"][0], vlm.photo(64, 96, 2)
    text = vlm.prompt(family)
    with attach(model, processor, **BOTH) as handle:
        first = handle.prepare(images=[image], text=[text])
        new = handle.prepare(images=[[second]], text=[text])
        both = handle.prepare(images=[[*image, second]], text=[text + " two. " + text])
        expected = model.generate(**both, **options)
        name = cache_name(model)
        kept = model.generate(**first, max_new_tokens=1, return_dict_in_generate=True)[name]
        with torch.no_grad():
            encoded = model.get_image_features(new["pixel_values"], new["image_grid_thw"])
        del both["pixel_values"]
        both["mm_encoder_outputs"] = {"image": encoded}
        cached = model.generate(**both, **{name: kept}, **options)
    for a, b in zip(cached.logits, expected.logits, strict=True):
        close(a, b)


def test_images_that_were_encoded_before(qwen):
    family, model, processor = qwen
    if not encodes_first(model):
        pytest.skip("transformers takes no images that are encoded already")
    with attach(model, processor, vmtc=SOME) as handle, torch.no_grad():
        inputs = [handle.prepare(**one(family, seed)) for seed in (1, 2)]
        expected = [model(**each).logits for each in inputs]
        encoded = [
            model.get_image_features(each["pixel_values"], each["image_grid_thw"])
            for each in inputs
        ]
        for each, image, logits in zip(inputs, encoded, expected, strict=True):
            rest = {k: v for k, v in each.items() if k != "pixel_values"}
            actual = model(**rest, mm_encoder_outputs={"image": image}).logits
            assert torch.equal(actual, logits)


def test_positions_that_cannot_be_put_right(qwen):
    family, model, processor = qwen
    with attach(model, processor, vmtc=SOME) as handle, torch.no_grad():
        inputs = handle.prepare(**one(family))
        asked = {k: v for k, v in inputs.items() if k != "pixel_values"}
        positions, _ = model.model.get_rope_index(**asked)
        close(model(**inputs, position_ids=positions).logits, model(**inputs).logits)
        model.model.get_rope_index(**asked)
        other = handle.prepare(**one(family, size=(64, 96)))
        with pytest.raises(RuntimeError, match="prepare no other prompt in between"):
            model.model.get_rope_index(**{k: v for k, v in other.items() if k != "pixel_values"})
            model(**inputs, position_ids=positions + 1)


def test_seconds_between_frames_keep_their_digits():
    model, processor = vlm.make("qwen2_5_vl", dtype=torch.bfloat16)
    with attach(model, processor, vmtc=SOME) as handle:
        prompt = vlm.prompt("qwen2_5_vl", images=0, videos=1)
        inputs = handle.prepare(videos=[vlm.video(64, 48)], text=[prompt])
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16
    assert inputs["second_per_grid_ts"].dtype != torch.bfloat16


# padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_asked_for(llava, side):
    model, processor = llava
    given = {
        "images": [[vlm.photo(64, 64)], [vlm.photo(64, 64)]],
        "text": [vlm.prompt("llava"), vlm.prompt("llava", "a longer question than the other is?")],
    }
    with attach(model, processor, vmtc=SOME) as handle:
        for options in ({"padding_side": side}, {"text_kwargs": {"padding_side": side}}):
            mask = handle.prepare(**given, **options)["attention_mask"]
            assert mask[1].all() and mask[0, 0] == (side == "right")
        options = {"padding": "max_length", "max_length": 120, "padding_side": side}
        assert handle.prepare(**given, **options)["attention_mask"].shape[1] == 120
        inputs = handle.prepare(**given, pad_to_multiple_of=16)
        assert inputs["input_ids"].shape[1] % 16 == 0
        made = processor(**given, padding=True, padding_side=side, return_tensors="pt")
        assert handle.shrink(made)["attention_mask"][0, 0] == (side == "right")
        with pytest.raises(ValueError, match="return_tensors must be 'pt'"):
            handle.prepare(**given, return_tensors="np")


# masks of one's own


def test_a_mask_of_all_pairs(llava):
    model, processor = llava
    inputs = processor(**one(), return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    packed = causal.clone()
    packed[..., 40:, :40] = False
    call = {k: inputs[k] for k in ("input_ids", "pixel_values")}
    with attach(model, processor, cmai=HALF), torch.no_grad():
        expected = model(**inputs).logits
        close(model(**call, attention_mask=causal).logits, expected)
        additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo().min)
        close(model(**call, attention_mask=additive).logits, expected)
        with pytest.raises(NotImplementedError, match="causal attention"):
            model(**call, attention_mask=packed)


# precision


def test_autocast(made):
    family, model, processor = made
    plain = processor(**one(family), return_tensors="pt")
    everything = VMTCConfig(num_primary=0.75, num_merged=0.25)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        try:
            expected = model(**plain).logits.float()
        except RuntimeError as error:
            # in 5.17 the model itself does not run
            assert family == "smolvlm", error
            pytest.skip(str(error))
        with attach(
            model, processor, vmtc=everything, cmai=CMAIConfig(keep_ratio=1.0, layers=None)
        ) as handle:
            actual = model(**handle.prepare(**one(family))).logits.float()
        assert (actual - expected).norm() < 0.1 * expected.norm()
        with attach(model, processor, **BOTH) as handle:
            assert model(**handle.prepare(**one(family))).logits.isfinite().all()


def test_double_precision(made):
    family = made[0]
    model, processor = vlm.make(family, dtype=torch.float64)
    with attach(model, processor, **BOTH) as handle:
        inputs = handle.prepare(**one(family))
        cached = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(cached, model.generate(**inputs, max_new_tokens=3, use_cache=False))


# where weights are


class Packed(torch.nn.Module):
    """A linear layer without a weight, as some quantised ones are."""

    def __init__(self, linear):
        super().__init__()
        self.qweight = torch.nn.Parameter(linear.weight.data, requires_grad=False)

    def forward(self, x):
        return x @ self.qweight.T


def test_layers_without_a_weight(llava):
    model, processor = llava
    with attach(model, processor, cmai=HALF) as handle:
        inputs = handle.prepare(**one())
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj = Packed(layer.self_attn.o_proj)
    with attach(model, processor, cmai=HALF):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)


def test_an_offloaded_model(llava):
    accelerate = pytest.importorskip("accelerate")
    model, processor = llava
    with attach(model, processor, **BOTH) as handle:
        expected = model.generate(**handle.prepare(**one()), max_new_tokens=3, do_sample=False)
    accelerate.cpu_offload(model, execution_device="cpu")
    with attach(model, processor, **BOTH) as handle:
        inputs = handle.prepare(**one())
        assert inputs["input_ids"].device.type == "cpu"
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)


# threads, copies, compilation


# the positions of Qwen's last prompt are kept in the model, by transformers as well
@pytest.mark.parametrize("family", [f for f in vlm.FAMILIES if f not in vlm.QWEN])
def test_threads(family):
    model, processor = vlm.make(family)
    with attach(model, processor, **BOTH) as handle, torch.no_grad():
        inputs = [handle.prepare(**one(family, seed)) for seed in range(3)]
        expected = [model(**each).logits for each in inputs]
        results = []

        def work(index):
            with torch.no_grad():
                for _ in range(4):
                    try:
                        same = torch.equal(model(**inputs[index]).logits, expected[index])
                        results.append("right" if same else "wrong")
                    except Exception as error:
                        results.append(repr(error))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == ["right"] * 12


@pytest.mark.parametrize("parts", [{"vmtc": SOME}, {"cmai": HALF}], ids=["vmtc", "cmai"])
def test_copies_are_refused(llava, parts):
    model, processor = llava
    with attach(model, processor, **parts):
        with pytest.raises(TypeError, match="detach first"):
            copy.deepcopy(model)
        with pytest.raises(TypeError, match="detach first"):
            pickle.dumps(model)
    copy.deepcopy(model)


def test_a_model_with_adapters_is_one_with_them(llava):
    peft = pytest.importorskip("peft")
    model, processor = llava
    config = peft.LoraConfig(r=2, target_modules=r".*(q_proj|k_proj)")
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad(), attach(tuned, processor, **BOTH) as handle:
        inputs = handle.prepare(**one())
        logits = tuned(**inputs).logits
    with torch.no_grad(), attach(model, processor, **BOTH):
        assert torch.equal(tuned(**inputs).logits, logits)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_compiled_before_or_after_attach(family, before):
    """The encoder's layers are of one class, and only one of them has hooks."""
    model, processor = vlm.make(family)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager")
    with torch.no_grad():
        if before:
            run(**processor(**one(family), return_tensors="pt"))
        with attach(model, processor, vmtc=SOME) as handle:
            inputs = handle.prepare(**one(family))
            close(run(**inputs).logits, fresh(family, lambda h: inputs, vmtc=SOME))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_encoder_that_is_compiled_by_itself(family, wrapped):
    model, processor = vlm.make(family)
    name = "vision_tower" if family == "llava" else "visual"
    with attach(model, processor, vmtc=SOME) as handle:
        inputs = handle.prepare(**one(family))
        if wrapped:
            setattr(model.model, name, torch.compile(getattr(model.model, name), backend="eager"))
        else:
            getattr(model.model, name).compile(backend="eager")
        with pytest.raises(NotImplementedError, match=f"{name} was compiled by itself"):
            model(**inputs)


def test_a_cache_of_inference_mode_goes_on_outside(llava):
    model, processor = llava
    with attach(model, processor, cmai=HALF) as handle:
        inputs = handle.prepare(**one())
        name = cache_name(model)
        with torch.inference_mode():
            kept = model(**inputs, use_cache=True)[name]
        with torch.no_grad():
            token = torch.tensor([[7]])
            mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.int64)
            cached = model(input_ids=token, attention_mask=mask, **{name: kept}).logits
            ids = torch.cat([inputs["input_ids"], token], 1)
            pixels = inputs["pixel_values"]
            expected = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
    close(cached, expected[:, -1:])


# training


def checkpointing(model, **options):
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    next(getattr(model, n) for n in names if hasattr(model, n))(options or None)


def loss_of(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)
    return model(**inputs, labels=labels, use_cache=False).loss


@pytest.mark.parametrize("choice", [{}, {"placement": 1, "score_layer": 1}], ids=["before", "in"])
def test_checkpointing_of_the_encoder(choice):
    model, processor = vlm.make("llava", vision_layers=4)
    model.train()
    config = VMTCConfig(num_primary=0.3, num_merged=0.2, **choice)
    weight = model.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight
    old = "__call__" in vars(transformers.modeling_layers.GradientCheckpointingLayer)
    grads = []
    for again in (False, True):
        if again:
            checkpointing(model)
        refused = pytest.raises(NotImplementedError, match="before_projector")
        with (
            attach(model, processor, vmtc=config) as handle,
            refused if again and old and choice else nullcontext(),
        ):
            model.zero_grad()
            loss_of(model, handle.prepare(**one())).backward()
            grads.append(weight.grad.clone())
    if len(grads) == 2:
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_checkpointing_that_would_lose_gradients(llava):
    model, processor = llava
    model.train()
    checkpointing(model, use_reentrant=True)
    with attach(model, processor, vmtc=SOME) as handle:
        inputs = handle.prepare(**one())
        inputs["pixel_values"].requires_grad_()
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            loss_of(model, inputs)


def test_what_is_recorded_keeps_no_graph(llava):
    model, processor = llava
    with attach(model, processor, **BOTH, record=True) as handle:
        loss_of(model, handle.prepare(**one())).backward()
        assert not any(f.out.requires_grad for f in handle.last.focus.values())
        assert not any(m.scores.requires_grad for m in handle.last.merged["image"])


def test_another_feature_layer_than_the_model_had(llava):
    model, processor = llava
    with attach(model, processor, vmtc=SOME) as handle:
        inputs = handle.prepare(**one())
        with pytest.raises(ValueError, match="vision_feature_layer=-1 is not what the model had"):
            model(**inputs, vision_feature_layer=-1)
