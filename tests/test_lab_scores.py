"""What the laboratory counts as following an instruction, as understanding, and how it sums up."""

import numpy as np
import pytest

from bench.quality import evaluate
from bench.quality.evaluate import MEASURES
from bench.quality.instructions import KINDS, Instruction, respond
from bench.quality.questions import Question
from bench.quality.world import COLOURS, SIDE

FOLLOWED = {
    Instruction("json", "answer"): (
        ['{"answer": "red"}', ' {"answer": ["red", "blue"]}\n', '{\n"answer": 2}'],
        [
            '{"result": "red"}',
            '{"answer": "red", "more": 1}',
            '["answer"]',
            "answer: red",
            '{"answer"',
        ],
    ),
    Instruction("bullets"): (
        ["* red", "- red\n- blue"],
        ["red", "*red", "* red\nblue", "* red\n\n* "],
    ),
    Instruction("words", "three"): (
        ["it is red", " it is  red\n"],
        ["red", "it is", "so it is red"],
    ),
    Instruction("twice"): (
        ["red; red", '"red; red"', "well: red; red", "red, blue; red, blue done", "RED; RED OVER"],
        ["red", "red; blue", "red red", "red, red", "well: red; well: red and"],
    ),
    Instruction("no_commas"): (["red blue", "red; blue"], ["red, blue", ","]),
    Instruction("quotes"): (['"red"', ' "red, blue" '], ["red", '"red', '""', "'red'", '"red".']),
    Instruction("upper"): (["RED", "IT IS RED!", "A"], ["Red", "red", "12", "RED x"]),
    Instruction("prefix", "well:"): (
        ["well: red", "WELL: RED"],
        ["red", "so well: red", "well red"],
    ),
    Instruction("suffix", "done"): (
        ["red done", "RED DONE.", "* red\n* done"],
        ["red", "done red"],
    ),
}


def test_each_kind_is_here():
    assert sorted(i.kind for i in FOLLOWED) == sorted(KINDS)


@pytest.mark.parametrize("instruction", FOLLOWED, ids=lambda i: i.kind)
def test_strictly(instruction):
    good, bad = FOLLOWED[instruction]
    for response in good:
        assert instruction.check(response) and instruction.check_loosely(response), response
    for response in (*bad, "", "\n"):
        assert not instruction.check(response), response


@pytest.mark.parametrize(
    ("instruction", "response"),
    [
        (Instruction("upper"), "sure, here it is:\nRED"),
        (Instruction("upper"), "RED\nhope this helps"),
        (Instruction("upper"), "so:\nRED\nbye"),
        (Instruction("quotes"), '**"red"**'),
        (Instruction("words", "three"), "* it is red"),
        (Instruction("no_commas"), "well, so:\nred blue"),
    ],
)
def test_loosely_the_first_line_the_last_or_asterisks_do_not_count(instruction, response):
    assert instruction.check_loosely(response)
    assert not instruction.check(response)


def test_loosely_is_not_always():
    for instruction, (_, bad) in FOLLOWED.items():
        assert not any(instruction.check_loosely(r) for r in bad[:2]), instruction


def test_responses_of_several_instructions():
    def said(items, *kinds):
        return respond(items, [Instruction(*k.split("=")) for k in kinds])

    assert said(["red"]) == "red"
    assert said(["red", "blue"]) == "red, blue"
    assert said(["red", "blue"], "no_commas", "upper") == "RED BLUE"
    assert said(["red", "blue"], "json=key") == '{"key": ["red", "blue"]}'
    assert said(["red"], "twice", "prefix=well:", "suffix=done") == "well: red; red done"
    assert said(["red"], "words=four", "quotes") == '"the answer is red"'
    assert said(["red", "blue"], "bullets", "suffix=over") == "* red\n* blue\n* over"


def question(*answer, family="open", rivals=COLOURS, told=(), group=0):
    return Question(family, "colour", "?", answer, frozenset(rivals), told, group)


@pytest.mark.parametrize(
    ("answer", "response", "understood"),
    [
        (("red",), "red", True),
        (("red",), "RED; RED", True),
        (("red",), '{"answer": "red"}', True),
        (("red",), "i think it is red", True),
        (("red",), "red or blue", False),
        (("red",), "blue", False),
        (("red",), "", False),
        (("red",), "reddish", False),
        (("red", "blue"), "red, blue", True),
        (("red", "blue"), "* red\n* blue", True),
        (("red", "blue"), "red blue; red blue", True),
        (("red", "blue"), "blue, red", False),
        (("red", "blue"), "red", False),
        (("red", "blue"), "red, blue, red", False),
        (("red", "red"), "red, red", True),
        (("red", "red"), "red", False),
    ],
)
def test_understood(answer, response, understood):
    assert question(*answer).understood(response) is understood


def test_a_word_is_read_in_any_case():
    read = question("SUN", family="reading", rivals=("sun", "sud"))
    assert read.understood("the answer is sun") and not read.understood("SUD")


def of_two_images(*questions):
    """Of two images, the questions by image."""
    return evaluate.Exam(np.zeros((2, SIDE, SIDE, 3), np.uint8), questions)


def test_counts_and_summary():
    told = (Instruction("upper"), Instruction("quotes"))
    yes_no, letters = ("yes", "no"), ("a", "b", "c")
    test = of_two_images(
        (0, question("red", told=told, group=0)),
        (0, question("yes", family="yes_no", rivals=yes_no, group=1)),
        (0, question("no", family="yes_no", rivals=yes_no, group=1)),
        *[(0, question(a, family="choice", rivals=letters, group=2)) for a in letters],
        (1, question("red", told=told[:1], group=3)),
        (1, question("blue", family="relations", group=4)),
        (1, question("SUN", family="reading", rivals=("sun",), group=5)),
        *[(1, question(a, family="choice", rivals=letters, group=6)) for a in letters],
    )
    said = ['"red"', "yes", "yes", "a", "b", "c", "text:\nRED", "blue", "sum", "a", "b", "b"]
    counted = evaluate.counts(test, said)
    by_name = {name: counted[:, i].tolist() for i, name in enumerate(MEASURES)}
    assert by_name == {
        "open": [[1, 1], [1, 1]],
        "relations": [[0, 0], [1, 1]],
        "reading": [[0, 0], [0, 1]],
        # one of two, and not both
        "yes_no": [[0.25, 1], [0, 0]],
        "choice": [[1, 1], [0, 1]],
        "strict": [[0, 1], [0, 1]],
        "loose": [[0, 1], [1, 1]],
        "each": [[1, 2], [0, 1]],
        "each_loosely": [[1, 2], [1, 1]],
    }
    result = evaluate.summary(counted)
    assert result["understanding"]["share"] == pytest.approx((1 + 1 + 0 + 0.25 + 0.5) / 5)
    assert result["loose"]["share"] == 0.5 and result["each"]["share"] == pytest.approx(
        1 / 3, abs=1e-4
    )


def test_intervals_are_of_images():
    rng = np.random.default_rng(0)
    hits = rng.random(400) < 0.7
    counted = np.zeros((400, len(MEASURES), 2))
    counted[..., 1] = 1
    # ten measures of one image agree: they are one observation and not ten
    counted[..., 0] = hits[:, None]
    result = evaluate.summary(counted)["understanding"]
    assert result["share"] == pytest.approx(hits.mean(), abs=1e-4)
    wide = 2 * 1.96 * (0.7 * 0.3 / 400) ** 0.5
    assert result["high"] - result["low"] == pytest.approx(wide, rel=0.15)
    # what differs on the same images alone is known better than each share
    other = counted.copy()
    other[:8, :, 0] = 0
    change = evaluate.summary(other, counted)["understanding"]["change"]
    assert change[0] == pytest.approx(-hits[:8].mean() * 8 / 400, abs=1e-4)
    assert change[1] < change[0] < change[2] <= 0 and change[2] - change[1] < wide / 2
