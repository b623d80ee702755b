"""attach, prepare and detach: what they refuse, what they leave behind, and training."""

import copy
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import transformers
import vlm

from vmtc_kernels import CMAIConfig, VMTCConfig, merge_tokens, token_importance
from vmtc_kernels.integrations.transformers import attach

SOME = VMTCConfig(num_primary=0.3, num_merged=0.2)
HALF = CMAIConfig(keep_ratio=0.5, layers=None)


@pytest.fixture(scope="module", params=vlm.FAMILIES)
def made(request):
    return request.param, *vlm.make(request.param)


@pytest.fixture
def llava():
    return vlm.make("llava")


def one(family="llava"):
    return {"images": [[vlm.photo(96, 64, 1)]], "text": [vlm.prompt(family)]}


def test_detach_leaves_the_model_as_it_was(made):
    family, model, processor = made
    plain = processor(**one(family), return_tensors="pt")

    def everything():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        own = [sorted(k for k in vars(m) if k != "training") for m in model.modules()]
        implementations = [
            m.config._attn_implementation for m in model.modules() if hasattr(m, "config")
        ]
        return hooks, own, implementations, model.config.to_dict()

    with torch.no_grad():
        expected = model(**plain).logits  # transformers puts some hooks in at the first pass
        ids = model.generate(**plain, max_new_tokens=3, do_sample=False)
        before = everything()
        handle = attach(model, processor, vmtc=SOME, cmai=HALF, record=True)
        assert everything() != before
        inputs = handle.prepare(**one(family))
        assert not torch.equal(model(**inputs).logits[:, -1], expected[:, -1])
        handle.detach()
        handle.detach()
        assert everything() == before
        assert torch.equal(model(**plain).logits, expected)
        assert torch.equal(model.generate(**plain, max_new_tokens=3, do_sample=False), ids)


def test_detach_after_an_error_in_the_block(llava):
    model, processor = llava
    plain = processor(**one(), return_tensors="pt")
    expected = model(**plain).logits
    with pytest.raises(KeyError), attach(model, processor, vmtc=SOME, cmai=HALF) as handle:
        model(**handle.prepare(**one()))
        raise KeyError
    assert torch.equal(model(**plain).logits, expected)


def test_a_refused_attach_leaves_nothing_behind(llava):
    model, processor = llava
    plain = processor(**one(), return_tensors="pt")
    expected = model(**plain).logits
    with pytest.raises(ValueError, match="layers"):
        attach(model, processor, vmtc=SOME, cmai=CMAIConfig(layers=(7,)))
    assert torch.equal(model(**plain).logits, expected)
    attach(model, processor, vmtc=SOME).detach()


def test_inputs_of_a_chat_template(llava):
    model, processor = llava
    text = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )
    inputs = processor(images=vlm.photo(64, 64), text=prompt, return_tensors="pt")
    labels = inputs["input_ids"].clone()
    with attach(model, processor, vmtc=SOME) as handle:
        shrunk = handle.shrink({**inputs, "labels": labels})
        images = shrunk["input_ids"] == model.config.image_token_id
        assert images.sum() == 32 and torch.equal(shrunk["labels"], shrunk["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_anew(llava, side):
    model, processor = llava
    processor.tokenizer.padding_side = side
    given = {
        "images": [[vlm.photo(64, 64)], [vlm.photo(64, 64), vlm.photo(96, 64)], []],
        "text": [vlm.prompt("llava"), vlm.prompt("llava", images=2), "and a text that is longer"],
    }
    with attach(model, processor, vmtc=VMTCConfig(num_primary=4, num_merged=2)) as handle:
        inputs = handle.prepare(**given)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    lengths = [
        len(processor.tokenizer(t.replace("<image>", "<image>" * 6))["input_ids"])
        for t in given["text"]
    ]
    assert ids.shape == mask.shape == (3, max(lengths)) and mask.sum(1).tolist() == lengths
    for row, length in enumerate(lengths):
        padding = ids[row, : max(lengths) - length] if side == "left" else ids[row, length:]
        assert (padding == processor.tokenizer.pad_token_id).all()
        assert (ids[row, mask[row].bool()] != processor.tokenizer.pad_token_id).all()


def test_what_was_done_is_kept_on_request(llava):
    model, processor = llava
    with attach(model, processor, vmtc=SOME, record=True) as handle:
        model(**handle.prepare(**one()))
        (merged,) = handle.last.merged["image"]
    assert merged.owner.shape == merged.scores.shape == (1, 64)
    assert merged.place.shape == merged.sizes.shape == (1, 32)
    assert merged.sizes.sum() == 64 and (merged.sizes[0, :19] == 1).all()
    # each slot lies at one of its own tokens
    assert torch.equal(merged.owner.gather(1, merged.place), torch.arange(32)[None])
    with attach(model, processor, vmtc=SOME) as handle:
        model(**handle.prepare(**one()))
        assert not handle.last.merged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(made, dtype):
    family = made[0]
    model, processor = vlm.make(family, dtype=dtype)
    with attach(model, processor, vmtc=SOME, cmai=HALF) as handle, torch.no_grad():
        inputs = handle.prepare(**one(family))
        assert inputs["pixel_values"].dtype == dtype
        logits = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert logits.dtype == dtype and logits.isfinite().all() and generated.shape[0] == 1


# training


def test_gradients_are_those_of_the_same_pass_by_hand(llava):
    """Through merged tokens: the gradient of the embeddings that go into the language model."""
    model, processor = llava
    projector = model.model.multi_modal_projector
    with attach(model, processor, vmtc=SOME, record=True) as handle:
        inputs = handle.prepare(**one())
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)
        model(**inputs).loss.backward()
        actual = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        (merged,) = handle.last.merged["image"]
    seen = {}
    attention = model.model.vision_tower.encoder.layers[-2].self_attn
    hooks = [
        projector.register_forward_pre_hook(lambda m, args: seen.update(x=args[0])),
        attention.q_proj.register_forward_hook(lambda m, args, out: seen.update(q=out)),
        attention.k_proj.register_forward_hook(lambda m, args, out: seen.update(k=out)),
    ]
    model.model.get_image_features(inputs["pixel_values"])
    for hook in hooks:
        hook.remove()
    q, k = (seen[n].unflatten(-1, (4, 8)).transpose(1, 2) for n in "qk")
    tokens = merge_tokens(seen["x"], token_importance(q, k)[:, 1:], 19, 13)
    assert torch.equal(tokens.owner, merged.owner.int())
    order = merged.place[0].argsort()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    where = (inputs["input_ids"] == 3)[..., None]
    embeds = embeds.masked_scatter(where, projector(tokens.tokens[:, order]))
    model(inputs_embeds=embeds, labels=inputs["labels"]).loss.backward()
    assert actual["model.vision_tower.embeddings.patch_embedding.weight"].abs().max() > 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_fine_tuning_lowers_the_loss(made):
    family, model, processor = made
    model = copy.deepcopy(model).train()
    with attach(model, processor, vmtc=SOME, cmai=HALF) as handle:
        inputs = handle.prepare(**one(family))
        image = inputs["input_ids"] == model.config.image_token_id
        inputs["labels"] = inputs["input_ids"].masked_fill(image, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(4):
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    vision = [p for n, p in model.named_parameters() if "vis" in n and p.grad is not None]
    assert any(p.grad.abs().max() > 0 for p in vision)
    assert losses[-1] < 0.9 * losses[0]


def test_gradient_checkpointing(llava):
    model, processor = llava
    model.train()
    grads = []
    with attach(model, processor, vmtc=SOME, cmai=HALF) as handle:
        inputs = handle.prepare(**one())
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)
        for checkpointing in (False, True):
            if checkpointing:  # its newer name
                names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
                next(getattr(model, n) for n in names if hasattr(model, n))()
            model.zero_grad()
            model(**inputs, use_cache=False).loss.backward()
            grads.append(model.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_lora(llava):
    peft = pytest.importorskip("peft")
    model, processor = llava
    config = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights="gaussian"
    )
    tuned = peft.get_peft_model(model, config)
    with attach(model, processor, vmtc=SOME, cmai=HALF) as handle:
        inputs = handle.prepare(**one())
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(6):
            loss = tuned(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        del inputs["labels"]
        assert tuned.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert losses[-1] < losses[0]


def test_adapters_of_the_layer_that_scores_come_first(llava):
    peft = pytest.importorskip("peft")
    model, processor = llava
    config = peft.LoraConfig(r=2, target_modules=r".*vision_tower.*(q_proj|k_proj)")
    with attach(model, processor, vmtc=SOME) as handle:
        inputs = handle.prepare(**one())
        tuned = peft.get_peft_model(model, config)
        with pytest.raises(RuntimeError, match="replaced after attach"):
            tuned(**inputs)
    with attach(model, processor, vmtc=SOME) as handle:
        tuned(**handle.prepare(**one()))


# bad input


def refused(match, call, error=ValueError):
    with pytest.raises(error, match=match):
        call()


def test_models_that_are_not_supported():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**small, num_hidden_layers=1, vocab_size=20)
    )
    refused(
        "'llama' are not supported, only llava, .*Family", lambda: attach(llama, None, vmtc=SOME)
    )
    refused("not supported", lambda: attach(torch.nn.Linear(2, 2), None, vmtc=SOME))
    model, processor = vlm.make("llava")
    refused("does not generate text", lambda: attach(model.model, processor, vmtc=SOME))
    model.config.vision_config.model_type = "pixtral"
    refused("vision tower of type 'pixtral'", lambda: attach(model, processor, vmtc=SOME))


def test_processors_of_other_models(llava):
    model, processor = llava
    _, other = vlm.make("qwen2_5_vl")
    refused("needs LlavaProcessor, got", lambda: attach(model, other, vmtc=SOME))
    refused("needs LlavaProcessor", lambda: attach(model, processor.tokenizer, vmtc=SOME))
    model.config.image_token_id = 5
    refused("image token is 3, the model's 5", lambda: attach(model, processor, vmtc=SOME))


def test_settings_that_cannot_be_honoured(llava):
    model, processor = llava

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before = hooks()

    def attached(vmtc=None, cmai=None, model=model, processor=processor):
        return lambda: attach(model, processor, vmtc=vmtc, cmai=cmai)

    refused("nothing to do", attached())
    refused("score_layer is 9, the encoder has 3", attached(VMTCConfig(score_layer=9)))
    refused("feature_layer is -4", attached(VMTCConfig(feature_layer=-4)))
    refused("placement is 3", attached(VMTCConfig(placement=3)))
    early = VMTCConfig(placement=0, score_layer=1)
    refused("scores or features are those of layer 1: set", attached(early))
    late = VMTCConfig(placement=1, score_layer=0)
    refused("features from the output of layer 1: use", attached(late))
    refused(r"layers \[5\]", attached(cmai=CMAIConfig(layers=(5,))))
    refused(r"layers \[5\]", attached(SOME, CMAIConfig(layers=(5,))))
    assert hooks() == before
    qwen = vlm.make("qwen2_5_vl")
    cls = VMTCConfig(score_source="cls")
    refused("no \\[CLS\\]: use 'received'", attached(cls, model=qwen[0], processor=qwen[1]))
    tiles = vlm.make("llava_next", vision_layers=4)
    inside = VMTCConfig(placement=1, score_layer=0)
    refused("cuts its tiles after", attached(inside, model=tiles[0], processor=tiles[1]))


def test_attention_that_cannot_be_combined(llava):
    model, processor = llava
    eager, _ = vlm.make("llava", attn_implementation="eager")
    refused("cannot replace 'eager'", lambda: attach(eager, processor, cmai=HALF))
    attach(eager, processor, vmtc=SOME).detach()  # VMTC asks nothing of attention
    text = model.model.language_model.config
    text.sliding_window = 16
    refused("full attention in every layer", lambda: attach(model, processor, cmai=HALF))
    text.sliding_window = None
    with attach(model, processor, cmai=HALF) as handle:
        inputs = handle.prepare(**one())
        model.set_attn_implementation({"text_config": "sdpa"})
        refused("is now 'sdpa'", lambda: model(**inputs), RuntimeError)


def test_one_handle_at_a_time(llava):
    model, processor = llava
    with attach(model, processor, vmtc=SOME):
        refused("call its detach first", lambda: attach(model, processor, cmai=HALF))
    attach(model, processor, cmai=HALF).detach()


def test_images_and_placeholders_that_do_not_match(made):
    family, model, processor = made
    image, text = vlm.photo(64, 64), vlm.prompt(family)
    with attach(model, processor, vmtc=SOME) as handle:
        errors = (ValueError, IndexError, StopIteration)
        with pytest.raises(errors):
            handle.prepare(images=[[image]], text=["no placeholder"])
        with pytest.raises(errors):
            handle.prepare(images=[[image]], text=[vlm.prompt(family, images=2)])
        with pytest.raises(errors):
            handle.prepare(text=[text])


def test_what_prepare_says_of_placeholders(llava):
    model, processor = llava
    image = vlm.photo(64, 64)
    with attach(model, processor, vmtc=SOME) as handle:
        inputs = processor(images=image, text=vlm.prompt("llava"), return_tensors="pt")
        inputs["input_ids"] = inputs["input_ids"][:, 3:]  # as of another processor
        refused("need 64 placeholders.* has 62", lambda: handle.shrink(inputs))
        del inputs["pixel_values"]
        refused("62 image placeholders, but no image", lambda: handle.shrink(inputs))
        inputs["pixel_values"] = torch.zeros(1, 3, 64, 64)
    with attach(model, processor, cmai=HALF) as handle:
        refused("need 64 placeholders.* has 62", lambda: handle.shrink(inputs))


def test_more_tokens_than_there_are(made):
    family, model, processor = made
    with attach(model, processor, vmtc=VMTCConfig(num_primary=60, num_merged=30)) as handle:
        refused("prepare: .*60 \\+ 30; shares", lambda: handle.prepare(**one(family)))


def test_inputs_that_cmai_cannot_follow(llava):
    model, processor = llava
    inputs = processor(**one(), return_tensors="pt")
    cache = model(**inputs, use_cache=True)
    name = "cache" if "cache" in cache else "past_key_values"
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with attach(model, processor, cmai=HALF):
        refused("pass these, not inputs_embeds", lambda: model(inputs_embeds=embeds))
        more = {"input_ids": inputs["input_ids"][:, -2:], name: cache[name]}
        refused("tokens that CMAI has not seen", lambda: model(**more))
        text = model.model.language_model
        refused("whole model", lambda: text(inputs_embeds=embeds), RuntimeError)
        packed = torch.cat([torch.arange(5), torch.arange(5)])[None]
        call = {"input_ids": inputs["input_ids"][:, :10] * 0 + 9, "position_ids": packed}
        refused("packed", lambda: model(**call, use_cache=False), NotImplementedError)


def test_transformers_too_old(tmp_path):
    folder = tmp_path / "transformers-5.16.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.16.1\n")
    code = "import vmtc_kernels.integrations.transformers"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode and "needs transformers 5.17 or newer, this is 5.16.1" in result.stderr
