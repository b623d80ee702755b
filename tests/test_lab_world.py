"""The laboratory's scenes and questions: they are true, and the test is not the training."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest

from bench.quality import instructions, world
from bench.quality.draw import PHOTOGRAPHS, draw
from bench.quality.questions import FAMILIES, ask, letters
from bench.quality.wordings import CHOICES, LETTER_OF, OPENINGS, SENTENCES, VALUE_OF
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


NAME = r"(the (?:(?:\w+ )?(?:circle|square|triangle|star|cross|ring)\b|\w+ object\b))"
# before the thing that another is compared with
REFERENCE = rf"(?:(?:of|from|above|below|compared with|look at) ){NAME}"
OPTIONS = r"\(([abcd])\) (\w+)"
# what the reading below understands in a question beside its names and values; it must not have
# any word that turns an answer round
KNOWN = set(
    re.findall(
        "[a-z]+",
        """
        a above alike all also among an and answer answers are as at be below by called can choose
        color colour colours compared comparing count do does each every find first for from give go
        going has have how in is it its left leftmost letter lies list look looking many me name
        number object objects of on one or order painted pattern picture placed reach read right s
        same say says see seen shape shared show shown shows side sign size something start starting
        tell that the there they thing this to true what when where whether which with word would
        written you
        """,
    )
)


def one(pattern, text):
    """What a pattern finds in a text, which has it once or again and again."""
    found = set(re.findall(pattern, text))
    assert len(found) == 1, (pattern, text)
    return found.pop()


def truth(scene, kind, text):
    """The answer by reading the question again, from the scene alone."""
    things = scene.things
    names = re.findall(NAME, text)
    rest = re.sub(NAME, "", text)
    words = set(re.findall("[a-z]+", rest.replace("yes or no", "")))
    shapes = {f"{shape}{end}" for shape in SHAPES for end in ("", "s", "es")}
    unknown = words - KNOWN - shapes - {*COLOURS, *PATTERNS, *SIZES}
    assert not unknown, (unknown, text)
    if kind in ("colour", "shape", "pattern", "size"):
        assert len(names) == 1, text
        value = rest.replace("color", "colour")
        if kind == "pattern" and "pattern" not in value:
            assert "plain, striped or dotted" in value
        elif kind == "size" and "size" not in value:
            assert "small or large" in value
        else:
            assert one(r"colour|shape|pattern|size", value) == kind
        return getattr(named(scene, names[0]), kind)
    if kind == "count":
        assert re.search(r"how many|number of|\bcount\b", text), text
        word = one(rf"\b(?:(?:{'|'.join(COLOURS)}) )?objects\b|\b(?:{'|'.join(SHAPES)})e?s\b", text)
        word = word.removesuffix(" objects")
        if word == "objects":
            return NUMBERS[len(things)]
        if word in COLOURS:
            return NUMBERS[sum(t.colour == word for t in things)]
        shape = word.removesuffix("es") if word == "crosses" else word.removesuffix("s")
        assert shape in SHAPES, text
        return NUMBERS[sum(t.shape == shape for t in things)]
    if kind == "list":
        assert re.search(r"from left to right|the leftmost first|start at the left", text), text
        assert "colour" in text
        return tuple(t.colour for t in sorted(things, key=lambda t: t.x))
    if kind in ("side", "height"):
        b = one(REFERENCE, text)
        assert len(names) == 2 and len(set(names)) == 2, text
        a, b = named(scene, names[names[0] == b]), named(scene, b)
        if kind == "side":
            assert re.search(r"left .*right|side", rest) and not re.search("right .*left", rest)
            return "left" if a.x < b.x else "right"
        assert re.search("above .*below", rest) and not re.search("below .*above", rest), text
        return "above" if a.y < b.y else "below"
    if kind == "neighbour":
        assert len(names) == 1
        centre = named(scene, names[0])
        where = one(rf"(left of|right of|above|below) (?:it\b|{NAME})", text)[0]
        ahead = {
            "left of": lambda t: centre.x - t.x,
            "right of": lambda t: t.x - centre.x,
            "above": lambda t: centre.y - t.y,
            "below": lambda t: t.y - centre.y,
        }[where]
        there = [t for t in things if ahead(t) > 8]
        assert len(there) == 1 and ahead(there[0]) >= 26, text
        return getattr(there[0], one(r"colour|shape", rest))
    if kind == "alike":
        assert re.search(r"\bsame\b|\balike\b|\bshared\b|\balso\b|have the \w+ of", rest), text
        a, b = (getattr(named(scene, n), one("colour|shape|pattern", rest)) for n in names)
        return "yes" if a == b else "no"
    if kind == "is_there":
        assert re.search(r"\b(?:there|see|seen|picture|objects)\b", text), text
        colour, shape = one(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text)
        return "yes" if any((t.colour, t.shape) == (colour, shape) for t in things) else "no"
    if kind == "is":
        assert len(names) == 1, text
        thing = named(scene, names[0])
        value = one(rf"\b(?:{'|'.join((*COLOURS, *PATTERNS, *SIZES))})\b", rest)
        return "yes" if value in (thing.colour, thing.pattern, thing.size) else "no"
    if kind == "says":
        assert re.search(r"\bsign\b", text), text
        return "yes" if one('"([A-Z]+)"', text) == scene.sign.word else "no"
    assert kind == "read" and re.search(r"\b(?:sign|read|says)\b", text), text
    return scene.sign.word


def bare(question, split):
    """The question without opening and instructions, and its options."""
    part = split == "test"
    text = question.text
    starts = [o for o in OPENINGS[part] if text.startswith(o)]
    text = text.removeprefix(max(starts, key=len))
    for told in reversed(question.instructions):
        ends = [f" {s.format(told.value)}" for s in instructions._WORDINGS[told.kind][part]]
        text = text.removesuffix(max((e for e in ends if text.endswith(e)), key=len))
    options = re.findall(OPTIONS, text)
    assert [letter for letter, _ in options] == (["a", "b", "c"] if options else [])
    return re.sub(rf"(?:{OPTIONS} ?)+", "", text), dict(options)


def pattern(sentence, **parts):
    """Of what a sentence may become."""
    text = re.escape(sentence)
    for part in re.findall(r"\\\{(\w)\\\}", text):
        text = text.replace(rf"\{{{part}\}}", parts.get(part, "(.+)"), 1)
    return text


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true(split):
    kinds, said, shown = Counter(), set(), set()
    part = split == "test"
    forms = {kind: {s: pattern(s) for s in each[part]} for kind, each in SENTENCES.items()}
    listed = rf"(?:{OPTIONS} ?)+"
    frames = {s: pattern(s, o=listed) for s in CHOICES[part]}
    for scene, question in asked(split, scenes=800 if split == "train" else 400):
        text, options = bare(question, split)
        kinds[question.family, question.kind] += 1
        expected = truth(scene, question.kind, text)
        if options:
            expected = tuple(letter for letter, option in options.items() if option == expected)
            assert len(set(options.values())) == 3
            shown |= {s for s, form in frames.items() if re.search(form, question.text)}
        else:
            expected = expected if question.kind == "list" else (expected,)
            used = {s for s, form in forms[question.kind].items() if re.fullmatch(form, text)}
            assert used, question
            said |= {(question.kind, s) for s in used}
        assert question.answer == expected, question
    assert len(kinds) == 21 and min(kinds.values()) >= 5, kinds
    # each sentence has been read
    assert said == {(kind, s) for kind, each in forms.items() for s in each}
    assert shown == set(frames)


def test_letters_are_those_of_the_options():
    said, counts, values, words = Counter(), Counter(), Counter(), set()
    for i in range(3000):
        text, answer = letters(np.random.default_rng(i))
        listed = re.search(r"\(a\) \w+(?: \([b-d]\) \w+)+", text)[0]
        options = dict(re.findall(OPTIONS, listed))
        assert list(options) == list("abcd"[: len(options)])
        assert len(set(options.values())) == len(options)
        counts[len(options)] += 1
        rest = text.replace(listed, "")
        if "(" in rest:
            assert answer == options[one(r"\(([abcd])\)", rest)], text
            said["value"] += 1
        else:
            value = one(rf"\b(?:{'|'.join(options.values())})\b", rest)
            assert options[answer] == value, text
            said[answer] += 1
        values[answer] += 1
        words |= {o for o in options.values() if o.isupper()}
    assert set(counts) == {2, 3, 4} and min(counts.values()) > 300
    assert set(said) == {"value", *"abcd"} and min(said.values()) > 50
    assert set(values) >= {*COLOURS, *SHAPES, *PATTERNS, *SIZES, *NUMBERS, "left", "above", "none"}
    assert len(words) > 100 and not words & set(world._TEST_WORDS)
    assert text == letters(np.random.default_rng(i))[0]


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
    for i in range(160):
        scene, rng = sample(SPLITS[i % 2], (3, i)), np.random.default_rng(i)
        pair, turns = ask(scene, "yes_no", rng), ask(scene, "choice", rng)
        assert [q.answer for q in pair] == [("yes",), ("no",)] or not pair
        if turns:
            assert sorted(q.answer[0] for q in turns) == ["a", "b", "c"]
            assert len({re.sub(OPTIONS, "", q.text) for q in turns}) == 1
        for group in (pair, turns):
            # a word and what it is not have no letter at the same place
            word = scene.sign.word if scene.sign else ""
            others = {w for q in group for w in re.findall(r"\b[A-Z]{3}\b", q.text)} - {word}
            assert not any(a == b for w in others for a, b in zip(w, word, strict=False))
            assert len({q.instructions for q in group}) <= 1


def test_the_test_is_not_the_training():
    told = {split: list(asked(split, scenes=500)) for split in SPLITS}
    kinds = {
        split: {(t.shape, t.colour, t.pattern) for scene, _ in told[split] for t in scene.things}
        for split in SPLITS
    }
    assert not kinds["train"] & world.HELD_OUT and kinds["test"] >= world.HELD_OUT
    # all else is seen, so that no two properties tell the third
    assert kinds["train"] | world.HELD_OUT == set(product(SHAPES, COLOURS, PATTERNS))
    for values, place in ((SHAPES, 0), (COLOURS, 1)):
        lacks = Counter((kind[place], kind[2]) for kind in world.HELD_OUT)
        assert lacks == Counter(product(values, PATTERNS))
    for scene, _ in told["test"]:
        assert any((t.shape, t.colour, t.pattern) in world.HELD_OUT for t in scene.things)
    words = {split: {scene.sign.word for scene, _ in told[split] if scene.sign} for split in SPLITS}
    assert not words["train"] & words["test"] and min(map(len, words.values())) > 50
    # what is only written in the training's questions neither
    written = {w for _, q in told["train"] for w in re.findall(r"\b[A-Z]{3}\b", q.text)}
    assert len(written) > 50 and not written & set(world._TEST_WORDS)
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
    def plain(sentence):
        return " ".join(re.findall(r"\w+|\{\w?\}", sentence))

    both = (*SENTENCES.values(), *instructions._WORDINGS.values())
    train, test = ([s for pair in both for s in pair[part]] for part in (0, 1))
    assert all(len(set(own)) == len(own) >= 8 and other for own, other in both)
    assert not {plain(s) for s in train} & {plain(s) for s in test}
    for said in (*train, *OPENINGS[0], *CHOICES[0], *LETTER_OF, *VALUE_OF):
        assert not any(s in said for s in test), said
        # nor does an opening make one of it
        assert not any(plain(o + said) == plain(s) for o in OPENINGS[0] for s in test), said


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
