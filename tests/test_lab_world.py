"""The laboratory's scenes and questions: they are true, and the test is not the training."""

import re
from collections import Counter

import numpy as np
import pytest

from bench.quality import instructions, questions, world
from bench.quality.draw import PHOTOGRAPHS, draw
from bench.quality.questions import FAMILIES, ask
from bench.quality.world import COLOURS, NUMBERS, PATTERNS, SHAPES, SIZES, sample

SPLITS = ("train", "test")


def asked(split, scenes=400, seed=5):
    """(scene, question) of every family on some scenes."""
    for i in range(scenes):
        scene, rng = sample(split, (seed, i)), np.random.default_rng((seed, i))
        for family in FAMILIES:
            for question in ask(scene, family, rng):
                yield scene, question


def named(scene, phrase):
    """The one thing that a phrase singles out."""
    words = phrase.split()
    assert words[0] == "the"
    things = [
        t
        for t in scene.things
        if all(w in (t.shape, t.colour, t.pattern, "object") for w in words[1:])
    ]
    assert len(things) == 1, (phrase, scene)
    return things[0]


NAME = r"(the (?:(?:\w+ )?(?:circle|square|triangle|star|cross|ring)|\w+ object))"
PROPERTY = r"(?:what|which|name|tell|is|how).*"


def truth(scene, kind, text):
    """The answer by reading the question again, from the scene alone."""
    things = scene.things
    names = re.findall(NAME, text)
    if kind in ("colour", "shape", "pattern", "size"):
        return getattr(named(scene, names[-1]), kind)
    if kind == "count":
        what = re.search(r"(?:many|count the) (\w+(?: objects)?)", text)[1]
        word = what.removesuffix(" objects")
        if word == "objects":
            return NUMBERS[len(things)]
        if word in COLOURS:
            return NUMBERS[sum(t.colour == word for t in things)]
        shape = word.removesuffix("es") if word == "crosses" else word.removesuffix("s")
        assert shape in SHAPES, text
        return NUMBERS[sum(t.shape == shape for t in things)]
    if kind in ("side", "height"):
        # one wording names the other thing first
        a, b = names[::-1] if text.startswith("on which side") else names
        a, b = named(scene, a), named(scene, b)
        if text.startswith("above or below"):
            a, b = b, a
        if kind == "side":
            return "left" if a.x < b.x else "right"
        return "above" if a.y < b.y else "below"
    if kind == "neighbour":
        centre = named(scene, names[-1])
        where = re.search(r"left of|right of|above|below", text)[0]
        ahead = {
            "left of": lambda t: centre.x - t.x,
            "right of": lambda t: t.x - centre.x,
            "above": lambda t: centre.y - t.y,
            "below": lambda t: t.y - centre.y,
        }[where]
        there = [t for t in things if ahead(t) > 8]
        assert len(there) == 1 and ahead(there[0]) >= 26, text
        return getattr(there[0], re.search(r"colour|shape", text)[0])
    if kind == "alike":
        p = re.search(r"(colour|shape|pattern)(?=\?| of)", text)[1]
        a, b = (getattr(named(scene, n), p) for n in names)
        return "yes" if a == b else "no"
    if kind == "is_there":
        colour, shape = re.search(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text).groups()
        return "yes" if any((t.colour, t.shape) == (colour, shape) for t in things) else "no"
    if kind == "is":
        thing = named(scene, names[0])
        value = text.rstrip("?").split()[-1]
        assert value in (*COLOURS, *PATTERNS, *SIZES)
        return "yes" if value in (thing.colour, thing.pattern, thing.size) else "no"
    if kind == "says":
        return "yes" if re.search('"([A-Z]+)"', text)[1] == scene.sign.word else "no"
    assert kind == "read"
    return scene.sign.word


def bare(question):
    """The question without opening and instructions, and its options."""
    sentences = [s for pair in questions._OPENINGS for s in pair if s]
    text = question.text
    for opening in sorted(sentences, key=len, reverse=True):
        text = text.removeprefix(opening)
    end = text.index("?" if "?" in text.split(".")[0] else ".")
    options = dict(re.findall(r"\(([abc])\) (\w+)", text))
    return text[: end + 1], options


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true(split):
    kinds = Counter()
    for scene, question in asked(split):
        text, options = bare(question)
        kinds[question.family, question.kind] += 1
        if question.kind == "list":
            expected = tuple(t.colour for t in sorted(scene.things, key=lambda t: t.x))
        elif options:
            value = truth(scene, question.kind, text)
            expected = tuple(letter for letter, option in options.items() if option == value)
            assert len(set(options.values())) == 3
        else:
            expected = (truth(scene, question.kind, text),)
        assert question.answer == expected, question
    assert len(kinds) == 21 and min(kinds.values()) >= 5, kinds


@pytest.mark.parametrize("split", SPLITS)
def test_targets_are_understood_and_follow_all(split):
    lengths = Counter()
    for _, question in asked(split, scenes=300):
        target, told = question.target, question.instructions
        lengths[len(told)] += 1
        assert question.understood(target), (question, target)
        assert all(question.followed(target)), (question, target)
        assert all(question.followed(target, loosely=True))
        # and no instruction is followed by itself: the bare answer breaks each
        plain = ", ".join(question.answer)
        assert not any(question.followed(plain)), (question, plain)
    assert set(lengths) == {0, 1, 2, 3}


def test_pairs_and_rotations_differ_in_the_answer_alone():
    for _, question in asked("test", scenes=60):
        assert question.family in FAMILIES
    for i in range(80):
        scene, rng = sample("test", (3, i)), np.random.default_rng(i)
        pair, turns = ask(scene, "yes_no", rng), ask(scene, "choice", rng)
        assert [q.answer for q in pair] == [("yes",), ("no",)] or not pair
        if turns:
            assert sorted(q.answer[0] for q in turns) == ["a", "b", "c"]
            assert len({q.text.split(" (a)")[0] for q in turns}) == 1
        for group in (pair, turns):
            assert len({q.instructions for q in group}) <= 1


def test_the_test_is_not_the_training():
    told = {split: list(asked(split, scenes=500)) for split in SPLITS}
    pairs = {
        split: {(t.shape, t.colour) for scene, _ in told[split] for t in scene.things}
        for split in SPLITS
    }
    assert not pairs["train"] & world.HELD_OUT and pairs["test"] >= world.HELD_OUT
    assert {shape for shape, _ in world.HELD_OUT} == set(SHAPES)
    assert len({colour for _, colour in world.HELD_OUT}) == 3
    for scene, _ in told["test"]:
        assert any((t.shape, t.colour) in world.HELD_OUT for t in scene.things)
    for shape, colour in world.HELD_OUT:
        assert not any(re.search(rf"{colour} {shape}\b", q.text) for _, q in told["train"])
    words = {split: {scene.sign.word for scene, _ in told[split] if scene.sign} for split in SPLITS}
    assert not words["train"] & words["test"] and min(map(len, words.values())) > 50
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["test"])
    together = {
        split: {
            frozenset((a.kind, b.kind))
            for _, q in told[split]
            for a in q.instructions
            for b in q.instructions
            if a is not b
        }
        for split in SPLITS
    }
    assert not together["train"] & instructions.HELD_OUT
    assert together["test"] >= instructions.HELD_OUT


def test_no_sentence_of_the_test_is_one_of_the_training():
    for sentences in (*questions._SENTENCES.values(), *instructions._WORDINGS.values()):
        train, test = sentences
        assert train and test and not set(train) & set(test)


def test_scenes_are_those_of_their_seed():
    for split in SPLITS:
        first, again, other = (sample(split, (2, i)) for i in (1, 1, 3))
        assert first == again != other
        assert np.array_equal(draw(first), draw(again))
        assert not np.array_equal(draw(first), draw(other))
    assert sample("train", (2, 1)) != sample("test", (2, 1))


def test_things_are_where_the_scene_says():
    # the middle of a plain object has its colour
    seen = Counter()
    for i in range(120):
        scene = sample("train", (8, i))
        pixels = draw(scene).astype(int)
        assert pixels.shape == (world.SIDE, world.SIDE, 3)
        for t in scene.things:
            half = t.diameter // 2
            assert half <= t.x <= world.SIDE - half and half <= t.y <= world.SIDE - half
            if t.pattern == "plain" and t.shape != "ring":
                red, green, blue = pixels[t.y, t.x]
                expected = {
                    "red": red > green + 90 and red > blue + 90,
                    "green": green > red + 60 and green > blue + 40,
                    "blue": blue > red + 90 and blue > green + 60,
                    "yellow": red > 200 and green > 180 and blue < 120,
                    "purple": blue > green + 60 and red > green + 40,
                    "orange": red > 200 and 90 < green < 180 and blue < 90,
                }
                assert expected[t.colour], (t, red, green, blue)
                seen[t.colour] += 1
        boxes = [(t.x, t.y, t.diameter, t.diameter) for t in scene.things]
        if scene.sign:
            boxes.append((scene.sign.x, scene.sign.y, *scene.sign.box))
        for i, (x, y, w, h) in enumerate(boxes):
            for a, b, c, d in boxes[:i]:
                assert 2 * abs(x - a) >= w + c or 2 * abs(y - b) >= h + d
    assert len(seen) == len(COLOURS)


def test_a_sign_is_dark_on_light_or_light_on_dark():
    for i in range(40):
        scene = sample("test", (9, i))
        if not scene.sign:
            continue
        sign = scene.sign
        width, height = sign.box
        left, top = sign.x - width // 2, sign.y - height // 2
        plate = draw(scene)[top + 1 : top + height - 1, left + 1 : left + width - 1].mean(-1)
        background = np.median(plate)
        assert background < 60 if sign.dark else background > 200
        ink = plate > 128 if sign.dark else plate < 128
        # each letter has some, and none reaches over the plate's edge
        for letter in range(3):
            start = 3 + sign.step * letter
            assert ink[:, start : start + sign.step].mean() > 0.1
        assert ink[:, 0].mean() == ink[:, -1].mean() == 0
