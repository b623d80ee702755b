"""What the commands and the example do when no model is given: the laboratory's answers."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vmtc_kernels import CMAIConfig, VMTCConfig, cli, commands, picture
from vmtc_kernels.laboratory import (
    LAB,
    LAB_NOTE,
    LAB_QUESTION,
    LAB_SCENE,
    MERGED,
    PRIMARY,
    is_lab,
    name_of,
)
from vmtc_kernels.patches import InputError

transformers = pytest.importorskip("transformers")

import vlm  # noqa: E402

from vmtc_kernels.answers import LONGEST, answers, inhibits  # noqa: E402
from vmtc_kernels.integrations.transformers import attach  # noqa: E402

ROOT = Path(__file__).parents[1]
BUDGET = VMTCConfig(num_primary=float(PRIMARY), num_merged=float(MERGED))
HALF = CMAIConfig(keep_ratio=0.5)
TOY = r"the laboratory's toy \(\d\.\d M parameters\)"


@pytest.fixture(autouse=True)
def quick(monkeypatch, same_start):
    monkeypatch.setattr(commands, "_MAX_SECONDS", 0.0)
    torch.set_num_threads(1)


@pytest.fixture
def vmtc(monkeypatch, capsys, tmp_path):
    """Run a command, which writes a.png, in this process: what it says, in one line, and stderr."""

    def run(command, *arguments):
        line = ["vmtc", command, "--out", tmp_path / "a.png", *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, line)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        assert not exit_.value.code, err
        with Image.open(tmp_path / "a.png") as image:
            assert image.format == "PNG" and image.width == 2000
        return " ".join(out.split())

    return run


@pytest.fixture(scope="module")
def lab():
    model = transformers.AutoModelForImageTextToText.from_pretrained(LAB)
    return model.eval(), transformers.AutoProcessor.from_pretrained(LAB)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return vlm.save("llava", tmp_path_factory.mktemp("models") / "tiny-llava")


def direct(lab, question=LAB_QUESTION, image=LAB_SCENE, **parts):
    """Image tokens and the answer, by the public functions alone."""
    model, processor = lab
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    with Image.open(image) as file:
        picture = file.convert("RGB")
    options = {"images": picture, "text": text, "text_kwargs": {"add_special_tokens": False}}
    if parts:
        with attach(model, processor, **parts) as handle:
            inputs = handle.prepare(**options)
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST)[0]
    else:
        inputs = processor(**options, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST)[0]
    new = ids[inputs["input_ids"].shape[1] :]
    answer = processor.tokenizer.decode(new, skip_special_tokens=True)
    return (inputs["input_ids"] == model.config.image_token_id).sum().item(), answer


def shown(answer):
    return re.escape(" ".join(answer.split()))


def test_the_folder_is_whole(lab):
    model, processor = lab
    with Image.open(LAB_SCENE) as scene:
        assert scene.mode == "RGB" and scene.size == (model.config.vision_config.image_size,) * 2
    assert BUDGET.counts(144) == (20, 20) and BUDGET.counts(576) == (80, 80)
    weights = (LAB / "model.safetensors").stat().st_size
    assert weights < 20 * 2**20 and processor.chat_template
    assert all(part.dtype == torch.float32 for part in model.parameters())
    assert not [path for path in LAB.iterdir() if path.is_dir()], "package-data takes files alone"


def test_demo_ends_with_the_answers_before_and_after(vmtc, lab):
    text = vmtc("demo")
    (before, plain), (after, merged) = direct(lab), direct(lab, vmtc=BUDGET)
    assert (before, after) == (144, 40)
    assert re.search(f"model {TOY} tokens 144 → 40 ", text)
    assert "144 → 40 (20 primary + 20 merged)" in text and "answers none" not in text
    assert re.search(rf"layer -2 of {TOY}, attention of \[CLS\]", text)
    time = r"[\d.]+ m?s"
    end = (
        re.escape(f"a.png Question on the laboratory's scene: {LAB_QUESTION} ")
        + r"model image tokens time answer ─+ "
        + rf"unmodified 144 {time} {shown(plain)} with VMTC 40 {time} {shown(merged)}$"
    )
    assert re.search(end, text), text


def test_demo_draws_the_tokens_that_the_answer_was_given_on(vmtc, lab, monkeypatch, tmp_path):
    made, draw = [], picture.draw
    monkeypatch.setattr(picture, "draw", lambda demo, out: (made.append(demo), draw(demo, out)))
    vmtc("demo", "--primary", 20, "--merged", "0.1")
    model, processor = lab
    config = VMTCConfig(num_primary=20, num_merged=0.1)
    with attach(model, processor, vmtc=config, record=True) as handle, torch.no_grad():
        with Image.open(LAB_SCENE) as scene:
            inputs = handle.prepare(images=scene, text="<image>?")
        model(**inputs)
    (units,) = handle.last.merged["image"]
    expected = torch.full((144,), -9)
    expected[units.rows[0]] = units.owner[0].long()
    assert made[0].grid == 12 and made[0].patch == 16
    assert torch.equal(made[0].owner.long(), expected)


def test_demo_asks_what_it_is_told(vmtc, lab, tmp_path):
    photo = tmp_path / "photo.png"
    vlm.photo(90, 90).resize((192, 192)).save(photo)
    question = "is there a [red] ring?"
    text = vmtc("demo", "--image", photo, "--question", question, "--primary", 9, "--merged", 0)
    assert f"Question on {photo}: {question}" in text and text.endswith(LAB_NOTE)
    assert "drawn shapes and words of its own world" in LAB_NOTE and "toy" in LAB_NOTE
    count, answer = direct(lab, question, photo, vmtc=VMTCConfig(num_primary=9, num_merged=0))
    assert count == 9 and re.search(rf"with VMTC 9 [\d.]+ m?s {shown(answer)} The lab", text)


def test_demo_with_another_llava(vmtc, tiny):
    text = vmtc("demo", "--model", tiny)
    assert "model tiny-llava tokens 64 → 18 (9 primary + 9 merged)" in text
    assert "Question on rocket: What is shown in this picture?" in text
    assert "unmodified 64 " in text and "with VMTC 18 " in text and "toy" not in text


def test_focus_answers_under_the_same_rule(vmtc, lab):
    text = vmtc("focus", "--keep-ratio", 0.3)
    plain, inhibited = direct(lab), direct(lab, cmai=CMAIConfig(keep_ratio=0.3))
    rows = (
        f"prompt {re.escape(LAB_QUESTION)} answer, unmodified {shown(plain[1])}"
        f" answer, with CMAI {shown(inhibited[1])} text token "
    )
    assert re.search(rows, text), text
    # 30% of 144 rounded up
    assert "100 of 144 inhibited" in text and re.search(f"model {TOY} backend", text)
    assert LAB_NOTE not in text
    text = vmtc("focus", "--keep-ratio", 1, "--image", LAB_SCENE)
    assert "0 of 144 inhibited" in text and "with CMAI" not in text and LAB_NOTE not in text


def test_explain_image_answers_with_both(vmtc, lab, tmp_path):
    text = vmtc("explain-image", "--keep-ratio", 0.5, "--primary", 16)
    config = VMTCConfig(num_primary=16, num_merged=float(MERGED))
    runs = [direct(lab), direct(lab, vmtc=config), direct(lab, vmtc=config, cmai=HALF)]
    names = ("unmodified", "with VMTC", "with VMTC and CMAI")
    rows = " ".join(
        f"answer, {name} {shown(run[1])}" for name, run in zip(names, runs, strict=True)
    )
    head = f"laboratory's scene, 192 x 192 pixels prompt {re.escape(LAB_QUESTION)} "
    assert re.search(f"{head}{rows} seen as", text), text
    assert "144 → 36 (16 primary + 20 merged)" in text and re.search(f"model {TOY} backend", text)
    vlm.photo(80, 60).save(tmp_path / "b.png")
    assert LAB_NOTE in vmtc("explain-image", "--image", tmp_path / "b.png")


def test_what_is_given_when_nothing_is(tmp_path):
    asked = commands.given(None, None, None)
    assert (asked.model, asked.image, asked.question) == (str(LAB), LAB_SCENE, LAB_QUESTION)
    assert "CC0" in asked.credit and asked.note == ""
    # by its path it is the same model, and so is the scene
    assert commands.given(f"{LAB}/", Path(f"{LAB}/../lab/scene.png"), None) == asked._replace(
        model=f"{LAB}/"
    )
    photo = commands.given(None, Path("a.png"), "why?")
    assert (photo.question, photo.credit, photo.note) == ("why?", "", LAB_NOTE)
    for model in ("none", "org/other"):
        other = commands.given(model, None, None)
        assert other.image is None and "SpaceX" in other.credit and other.note == ""
        assert other.question != LAB_QUESTION and other.picture == "rocket"
    assert is_lab(LAB) and not is_lab("lab") and name_of("org/other/", 5) == "other"
    assert name_of(str(LAB), 5_650_000) == "the laboratory's toy (5.7 M parameters)"


@pytest.mark.parametrize(
    "rule, expected",
    [
        ({"keep_ratio": 0.5}, True),
        ({"keep_ratio": 1.0}, False),
        ({"keep_ratio": None, "threshold": 0.1}, True),
        ({"keep_ratio": None, "threshold": 0.0}, False),
    ],
)
def test_inhibits(rule, expected):
    assert inhibits(CMAIConfig(**rule)) is expected


def test_answers_are_greedy_and_say_where_they_were_cut(monkeypatch):
    model, processor = vlm.make("llava")
    made = (model, processor, "tiny", vlm.photo(64, 64), "what colour is it?")
    generate, results = model.generate, []
    monkeypatch.setattr(
        model, "generate", lambda **options: results.append(generate(**options)) or results[-1]
    )
    settings = model.generation_config
    # nothing ends it
    settings.eos_token_id = None
    whole = list(answers(*made, BUDGET, HALF))
    assert [each.how for each in whole] == ["unmodified", "VMTC", "VMTC and CMAI"]
    assert [each.image_tokens for each in whole] == [64, 18, 18]
    assert all(each.text.endswith("…") and each.seconds > 0 for each in whole)
    assert getattr(model, "vmtc_handle", None) is None
    settings.do_sample, settings.temperature, settings.num_beams = True, 9.0, 2
    again = list(answers(*made, BUDGET, HALF, warm=True))
    assert [each[:3] for each in again] == [each[:3] for each in whole]
    # the first token ends it, wherever among several that do
    settings.eos_token_id = [2, results[0][0, -LONGEST].item()]
    ended = next(answers(*made))
    assert results[-1].shape[1] == results[0].shape[1] - LONGEST + 1
    assert not ended.text.endswith("…") and whole[0].text.startswith(ended.text)
    with pytest.raises(InputError, match="--prompt must not contain <image>"):
        next(answers(*made[:4], "<image>"))
    with pytest.raises(InputError, match=r"^tiny cannot answer: "):
        next(answers(*made[:3], None, "what?"))


def test_the_example_answers(monkeypatch, capsys, lab, tmp_path):
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples/llava.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr("sys.argv", ["llava.py", "--tokens", str(LONGEST)])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    runs = [direct(lab), direct(lab, vmtc=BUDGET), direct(lab, vmtc=BUDGET, cmai=HALF)]
    assert lines[1::2] == [f"    {answer!r}" for _, answer in runs]
    other = len(lab[1].tokenizer(LAB_QUESTION)["input_ids"]) + 2
    names = ("unmodified", "VMTC", "VMTC and CMAI")
    assert [line.split(" in the")[0] for line in lines[::2]] == [
        f"{name}: {count + other} tokens" for name, (count, _) in zip(names, runs, strict=True)
    ]


def test_answers_are_printable():
    from vmtc_kernels._terminal import answer_rows
    from vmtc_kernels.answers import Answer

    found = [Answer("VMTC", 1, "a\n[b] \x1b[31m\x07\té", 0.1)]
    assert answer_rows(found) == [("answer, with VMTC", "a\n[b] �[31m��é")]
