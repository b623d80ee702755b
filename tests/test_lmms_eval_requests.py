"""What `vmtc_hf` answers, request by request, against plain transformers."""

import pytest
import torch

pytest.importorskip("lmms_eval")

import lmms_task
import vlm
from lmms_eval.api.instance import Instance
from lmms_task import CMAI, ROWS, VMTC, asked, made, messages, texts

from vmtc_kernels import VMTCConfig
from vmtc_kernels.integrations.lmms_eval import _model

pytest_plugins = ("lmms_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread", "caches")


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_batches_have_the_answers_of_single_prompts(folders, plain, family):
    """Prompts with one image, two and none, of several sizes, padded together."""
    shares = {"num_primary": 0.25, "num_merged": 0.125, "keep_ratio": 0.5}
    vmtc = VMTCConfig(num_primary=0.25, num_merged=0.125)
    answers = [answer for answer, _ in plain(family, vmtc=vmtc, cmai=CMAI).answers()]
    assert len(set(answers)) > 4
    for size in (1, 4):
        model = made(folders(family), batch_size=size, **shares)
        assert texts(model.generate_until(asked(model))) == answers
        assert len(model.generate_until(asked(model, [2, 6]))) == 2  # a batch without images
    baseline = made(folders(family), batch_size=4)
    answers = [answer for answer, _ in plain(family).answers()]
    assert texts(baseline.generate_until(asked(baseline))) == answers


def test_requests_of_several_settings_and_tasks(folders, plain):
    model = made(folders("llava"), batch_size=4)
    long, short = asked(model), asked(model, options={"max_new_tokens": 2})
    model.task_dict["other"] = {"val": [([], "what colour is it?"), ([], "how many?")]}

    def louder(doc):
        return messages((doc[0], doc[1].upper()))

    metadata = {"task": "other", "doc_id": 1, "repeats": 1}
    arguments = ("unused", louder, {"max_new_tokens": 2}, 1, "other", "val")
    other = Instance("generate_until", arguments, idx=0, metadata=metadata)
    mixed = [request for pair in zip(long, short, strict=True) for request in pair]
    before = [dict(request.args[2]) for request in mixed]
    found = texts(model.generate_until([*mixed, other]))
    assert [dict(request.args[2]) for request in mixed] == before  # keys of lmms-eval's cache
    of = plain()
    assert found[0:-1:2] == [answer for answer, _ in of.answers()]
    assert found[1:-1:2] == [answer for answer, _ in of.answers(max_new_tokens=2)]
    inputs = of.inputs([], lmms_task.chat("llava", [], "HOW MANY?"), None)
    ids = of.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    ids = ids[0, inputs["input_ids"].shape[1] :]
    assert found[-1] == of.processor.decode(ids, skip_special_tokens=True)


def test_answers_end_where_the_task_says(folders, plain):
    model = made(folders("llava"), batch_size=4)
    options = {"max_new_tokens": 24, "temperature": 0}
    whole = texts(model.generate_until(asked(model, options=options)))
    assert whole == [answer for answer, _ in plain().answers(max_new_tokens=24)]
    end, other = whole[0][5:8], whole[1][9:11]
    requests = asked(model, options={**options, "until": [end, other, ""]})
    results = model.generate_until(requests)
    for before, result in zip(whole, results, strict=True):
        places = [before.find(each) for each in (end, other) if each in before]
        assert result.text == before[: min(places, default=len(before))]
    # no more is generated than that takes
    spent = results[0].token_counts.output_tokens
    assert 1 < spent < 24
    for count, there in ((spent, True), (spent - 1, False)):
        options = {"max_new_tokens": count, "temperature": 0}
        assert (end in texts(model.generate_until(asked(model, [0], options)))[0]) == there
    options = {"max_new_tokens": 24, "temperature": 0}
    assert results[0].text == whole[0][: whole[0].find(end)] and len(results[1].text) <= 9
    one = texts(model.generate_until(asked(model, [0], {**options, "until": end})))
    assert one == [whole[0][: whole[0].find(end)]]


@pytest.mark.parametrize(
    "until, ends",
    [
        (["\n\n"], []),  # what lmms-eval fills in where a task says nothing
        (["\n\n", "Q:"], ["\n\n", "Q:"]),
        (["", "Q:"], ["Q:"]),
        ("Q:", ["Q:"]),
        (None, []),
    ],
)
def test_texts_that_end_an_answer(until, ends):
    assert _model.generation_of({"until": until})[1] == ends


@pytest.mark.parametrize(
    "given, sampled",
    [
        ({}, None),
        ({"temperature": 0, "top_p": 0.9, "do_sample": True}, None),
        ({"temperature": 0.7, "do_sample": False}, None),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True, "image_aspect_ratio": "pad"}, {}),
    ],
)
def test_what_generate_is_told(given, sampled):
    options, ends = _model.generation_of({**given, "num_beams": 3})
    assert ends == [] and options.pop("num_beams") == 3 and options.pop("max_new_tokens") == 1024
    if sampled is None:
        assert options == {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    else:
        assert options == {"do_sample": True, **sampled}


def test_sampling_and_beams(folders, plain):
    model = made(folders("llava"), num_primary=12, num_merged=4)
    beams = asked(model, options={"max_new_tokens": lmms_task.NEW, "num_beams": 3})
    answers = [answer for answer, _ in plain(vmtc=VMTC).answers(num_beams=3)]
    assert texts(model.generate_until(beams)) == answers
    warm = {"max_new_tokens": 16, "temperature": 1.5}
    drawn = set()
    for seed in range(3):
        torch.manual_seed(seed)
        drawn.add(model.generate_until(asked(model, [0], warm))[0].text)
    assert len(drawn) > 1
    with pytest.raises(ValueError, match="one answer: use repeats"):
        model.generate_until(asked(model, options={"num_return_sequences": 2}))
    with pytest.raises(ValueError, match="best_of"):
        model.generate_until(asked(model, options={"best_of": 2}))


@pytest.mark.parametrize("row", ROWS)
def test_losses_are_those_of_plain_transformers(folders, plain, row):
    _, parts = ROWS[row]
    of = plain(**parts)
    continuations = [" a rocket", "two of them.", "<", *of.likeliest()]
    expected = of.losses(continuations)
    arguments = {"downsample": 2} if row == "spatial downsampling" else {}
    if "vmtc" in parts:
        arguments |= {"num_primary": 12, "num_merged": 4}
    if "cmai" in parts:
        arguments |= {"keep_ratio": 0.5}
    for size in (1, 5):
        model = made(folders("llava"), batch_size=size, **arguments)
        model.task_dict = {"local": {"test": lmms_task.QUESTIONS}}
        requests = []
        for number, (_, question) in enumerate(lmms_task.QUESTIONS):
            for more in continuations:

                def visual(doc):
                    return [vlm.photo(*photo) for photo in doc[0]] or None

                metadata = {"task": "local", "doc_id": number, "repeats": 1}
                place = (visual, number, "local", "test")
                requests.append(Instance("loglikelihood", (question, more, *place), 0, metadata))
        found = model.loglikelihood(requests)
        flat = [each for row in expected for each in row]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in flat], rel=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in flat]
        first = Instance("loglikelihood", ("how many?", lambda doc: doc[1], *place), 0, metadata)
        alone = Instance("loglikelihood", ("how many?", "how many?"), 0, metadata)
        (a, _), (b, _) = model.loglikelihood([first, alone])
        assert a == pytest.approx(b, rel=1e-4)  # of the last question, which has no photo
        with pytest.raises(ValueError, match="continuation is empty"):
            model.loglikelihood([Instance("loglikelihood", ("how many?", ""), 0, metadata)])
    assert any(greedy for _, greedy in flat)


def test_rounds_go_on_until_the_task_has_enough(folders, plain):
    model = made(folders("llava"))
    seen = []

    def rounds(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return messages(doc)
        seen.append((round_idx, tuple(previous_output), previous_round_info))
        if round_idx == 3:
            return None, True, previous_output, None
        question = f"{doc[1]} {len(previous_output[-1])}"
        return messages(([(64, 64, 7)], question)), False, previous_output, f"info {round_idx}"

    requests = asked(model, [0, 2], kind="generate_until_multi_round", ask=rounds)
    found = model.generate_until_multi_round(requests)
    assert [len(answers) for answers in found] == [3, 3] and all(type(a) is list for a in found)
    assert [(i, info) for i, _, info in seen[:3]] == [(1, None), (2, "info 1"), (3, "info 2")]
    assert seen[2][1] == tuple(found[0]) and seen[5][1] == tuple(found[1])
    question = f"{lmms_task.QUESTIONS[2][1]} {len(found[1][0])}"
    of = plain()
    inputs = of.inputs([(64, 64, 7)], lmms_task.chat("llava", [0], question), None)
    ids = of.model.generate(**inputs, max_new_tokens=lmms_task.NEW, do_sample=False)
    ids = ids[0, inputs["input_ids"].shape[1] :]
    assert found[1][1] == of.processor.decode(ids, skip_special_tokens=True)
    simple = _model.VmtcHfSimple(pretrained=folders("llava"), device="cpu")
    with pytest.raises(NotImplementedError, match="leave out --force_simple"):
        simple.generate_until_multi_round(requests)


def test_images_as_files_and_what_is_none(folders, plain, tmp_path):
    model = made(folders("llava"))
    vlm.photo(96, 64, 1).convert("RGBA").save(tmp_path / "photo.png")

    def ask(**part):
        text = {"type": "text", "text": lmms_task.QUESTIONS[0][1]}
        said = [{"role": "user", "content": [part, text]}]
        return texts(model.generate_until(asked(model, [0], ask=lambda doc: said)))

    assert ask(type="image", url=str(tmp_path / "photo.png")) == [plain().answers()[0][0]]
    with pytest.raises(NotImplementedError, match="the task has a video"):
        ask(type="video", url="film.mp4")
    with pytest.raises(TypeError, match="PIL image or a file's name, got dict"):
        ask(type="image", url={"bytes": b""})


def test_the_model_is_as_it_was_when_the_answers_are_there(folders):
    model = made(folders("llava"), num_primary=0.5, num_merged=32, keep_ratio=0.5)
    inner = model.model
    assert inner.vmtc_handle is model.handle
    model.clean()
    assert not hasattr(inner, "vmtc_handle") and not hasattr(model, "model")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner.modules())
