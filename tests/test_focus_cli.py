"""The command `vmtc focus`, its errors, and the LLaVA model behind it."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vmtc_kernels import CMAIConfig, cli
from vmtc_kernels.patches import InputError, load_photo

transformers = pytest.importorskip("transformers")

SIZE, PATCH, LAYERS = 64, 8, 3
PROMPT = "What colour is the rocket?"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def make_processor(crop=SIZE, strategy="default", template=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = bytes_, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<image>"],
        initial_alphabet=bytes_.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([PROMPT, "USER: the colour of a rocket ASSISTANT:"] * 20, trainer)
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": crop}, crop_size={"height": crop, "width": crop}
    )
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=template,
    )


def save_llava(folder, dtype=torch.float32, **options):
    """A randomly initialised LLaVA: 8 x 8 patches, 3 text layers, 4 heads that share 2 of keys."""
    processor = make_processor(**options)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = {**small, "num_hidden_layers": 2, "image_size": SIZE, "patch_size": PATCH}
    text = {**small, "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "vocab_size": 300}
    # larger weights than the default, so that attention is far from uniform
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, initializer_factor=6.0),
        text_config=transformers.LlamaConfig(**text, initializer_range=0.3),
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy=options.get("strategy", "default"),
    )
    model = transformers.LlavaForConditionalGeneration(config).to(dtype)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava") / "tiny-llava")


@pytest.fixture
def llava(folder):
    from vmtc_kernels.llava import Llava

    return Llava(str(folder))


@pytest.fixture
def vmtc(monkeypatch, capsys, same_start):
    """Run `vmtc focus` in this process: exit code, stdout, stderr."""
    torch.set_num_threads(1)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vmtc", "focus", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run


def photo():
    return load_photo(None, SIZE)


def test_the_command_writes_the_picture_and_the_table(vmtc, folder, tmp_path):
    out = tmp_path / "a.png"
    arguments = ("--model", folder, "--prompt", PROMPT, "--token", "colour", "--out", out)
    code, stdout, stderr = vmtc(*arguments)
    assert code == 0, stderr
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width == 2000
    text = " ".join(stdout.split())
    assert "text token ' colour'" in text and "image tokens 32 of 64 inhibited" in text
    assert "In layer 1 of 3 (counted from 0), a text token keeps the 50%" in text
    assert "model tiny-llava" in text and "backend" in text and f"Picture: {out}" in stdout
    assert f"prompt {PROMPT}" in text
    assert "answer, unmodified" in text and "answer, with CMAI" in text


def test_options(vmtc, folder, tmp_path):
    image, out = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(np.arange(90 * 70 * 3, dtype=np.uint8).reshape(90, 70, 3)).save(image)
    arguments = ("--model", folder, "--image", image, "--out", out, "--layer", -1)
    code, stdout, stderr = vmtc(*arguments, "--token", -2, "--keep-ratio", 0.25)
    assert code == 0 and out.exists(), stderr
    text = " ".join(stdout.split())
    assert "token -2 of the prompt" in text and "48 of 64 inhibited" in text
    assert "In layer 2 of 3" in text and "the 25% of image tokens" in text
    code, stdout, _ = vmtc(*arguments, "--threshold", 0)
    text = " ".join(stdout.split())
    assert code == 0 and "token -1 of the prompt" in text and "image tokens 0 of 64" in text
    # a threshold of 0 inhibits nothing
    assert "answer, unmodified" in text and "with CMAI" not in text


@pytest.mark.parametrize("layer", [None, 0, -1])
def test_scores_are_those_of_eager_attention(llava, folder, layer):
    focus = llava.focus(photo(), PROMPT, CMAIConfig(keep_ratio=0.25), layer)
    index = {None: 1, 0: 0, -1: 2}[layer]
    assert focus.layer == index and focus.layers == LAYERS and focus.grid == SIZE // PATCH

    eager = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    )
    text = f"USER: <image>\n{PROMPT} ASSISTANT:"
    inputs = make_processor()(images=Image.fromarray(photo()), text=text, return_tensors="pt")
    with torch.no_grad():
        attention = eager(**inputs, output_attentions=True).attentions[index][0].double().mean(0)
    is_image = inputs["input_ids"][0] == eager.config.image_token_id
    to_image, to_text = attention[:, is_image], attention[:, ~is_image]
    expected = to_text / to_text.sum(1, keepdim=True) @ to_image[~is_image]
    after = slice(int(is_image.nonzero()[-1]) + 1, None)
    np.testing.assert_allclose(focus.scores, expected[after], rtol=1e-4, atol=1e-7)
    assert (focus.inhibited.sum(1) == 48).all()
    kept = np.where(focus.inhibited, np.inf, focus.scores).min(1)
    assert (np.where(focus.inhibited, focus.scores, -np.inf).max(1) <= kept).all()


def test_words_are_the_text_after_the_image(llava):
    prompt = "Où est la fusée 火箭?\n Là."
    focus = llava.focus(photo(), prompt, CMAIConfig())
    assert "".join(focus.words) == f"\n{prompt} ASSISTANT:"
    assert len(focus.words) == len(focus.scores) == len(focus.inhibited)


def test_the_chat_template_of_the_processor_is_used(tmp_path):
    from vmtc_kernels.llava import Llava

    llava = Llava(str(save_llava(tmp_path / "chat", template=TEMPLATE)))
    focus = llava.focus(photo(), PROMPT, CMAIConfig())
    assert "".join(focus.words) == f"{PROMPT}<answer>"
    ids = llava._inputs(photo(), PROMPT)["input_ids"][0].tolist()
    assert ids[0] == 0 and ids.count(0) == 1


def test_the_model_sees_the_pixels_that_are_drawn(llava):
    pixels = llava._inputs(photo(), PROMPT)["pixel_values"][0].permute(1, 2, 0)
    images = llava.processor.image_processor
    shown = (pixels * torch.tensor(images.image_std) + torch.tensor(images.image_mean)) * 255
    np.testing.assert_allclose(shown, photo(), atol=1e-3)


def test_only_the_text_layers_of_this_model_are_changed(llava, folder):
    stock = transformers.AttentionInterface()["sdpa"]
    before = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    inputs = llava._inputs(photo(), PROMPT)
    with torch.no_grad():
        expected = before(**inputs).logits
        assert torch.equal(llava.model(**inputs).logits, expected)
        llava.focus(photo(), PROMPT, CMAIConfig())
        assert torch.equal(before(**inputs).logits, expected)
    assert transformers.AttentionInterface()["sdpa"] is stock
    assert before.config.text_config._attn_implementation == "sdpa"
    assert llava.model.config.text_config._attn_implementation == "sdpa"
    assert llava.model.config.vision_config._attn_implementation == "sdpa"
    assert not any("vmtc_kept" in vars(module) for module in llava.model.modules())


def test_a_model_that_cmai_refuses_is_drawn_and_says_why(vmtc, folder, tmp_path):
    import json

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, stdout, stderr = vmtc("--model", tmp_path, "--out", tmp_path / "a.png")
    text = " ".join(stdout.split())
    assert code == 0 and (tmp_path / "a.png").exists(), stderr
    assert "answer, unmodified" in text and "no answer CMAI needs full attention in every" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    from vmtc_kernels.llava import Llava

    llava = Llava(str(save_llava(tmp_path / "half", dtype)))
    assert llava.model.dtype == dtype
    focus = llava.focus(photo(), PROMPT, CMAIConfig())
    assert np.isfinite(focus.scores).all() and (focus.inhibited.sum(1) == 32).all()


WORDS = ["\n", "What", " col", "our", " is", "", " it", "?"]


@pytest.mark.parametrize(
    "token, expected",
    [(None, 7), ("-1", 7), ("-8", 0), ("colour", 3), ("What", 1), ("i", 6), ("is", 4), ("\n", 0)],
)
def test_choose(token, expected):
    from vmtc_kernels.llava import choose

    assert choose(WORDS, token) == expected


@pytest.mark.parametrize("token", ["-9", "-0", "3", "", "Colour"])
def test_choose_refuses_what_is_not_there(token):
    from vmtc_kernels.llava import choose

    with pytest.raises(InputError, match="--token"):
        choose(WORDS, token)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image", "gone.png"], "no such image: gone.png"),
        (["--out", "a.jpg"], "--out must end in .png, got a.jpg"),
        (["--keep-ratio", "2"], "keep_ratio must be in (0, 1], got 2"),
        (["--threshold", "1"], "threshold must be in [0, 1), got 1"),
        (["--keep-ratio", "0.5", "--threshold", "0.5"], "exactly one of keep_ratio and threshold"),
        (["--layer", "3"], "tiny-llava has 3 text layers, none is layer 3"),
        (["--token", "cow"], "--token 'cow' is not in the text after the image, '\\nWhat is"),
        (["--token", "-99"], "--token -99: the image is followed by"),
        (["--prompt", "<image> and <image>?"], "--prompt must not contain <image>: there is one"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    vmtc, folder, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = vmtc("--model", folder, *arguments)
    assert code == 2 and stdout == ""
    (line,) = stderr.splitlines()
    assert line.startswith("vmtc: ") and message in line and "CMAIConfig" not in line
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused_in_one_line(vmtc, tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    bert = transformers.BertConfig(**small, num_hidden_layers=1, vocab_size=9)
    bert.save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    save_llava(tmp_path / "crop", crop=48)
    save_llava(tmp_path / "full", strategy="full")
    for name, message in (
        ("bert", "--model must be a LLaVA model"),
        ("empty", f"cannot load {tmp_path / 'empty'}: Unrecognized model"),
        ("crop", "crop must read an image as one of 64 pixels, its processor makes [1, 3, 48, 48]"),
        ("full", "full must read one image as one block of 64 tokens, got 65 in all"),
    ):
        code, _, stderr = vmtc("--model", tmp_path / name, "--out", tmp_path / "a.png")
        (line,) = [line for line in stderr.splitlines() if line.startswith("vmtc: ")]
        assert code == 2 and message in line and "Traceback" not in stderr


def test_a_model_that_lacks_weights_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    from vmtc_kernels.llava import Llava

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.2" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights: .*layers\.2"):
        Llava(str(tmp_path))
