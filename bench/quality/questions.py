"""Questions on a scene in five families, each in the spirit of a benchmark and none of them it.

``open`` (VQAv2): colours, shapes, patterns, sizes, counts, lists; ``relations`` (GQA); ``reading``
(TextVQA); ``yes_no`` in pairs of which one is true (MME); ``choice`` with options that rotate
(MMBench).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from . import instructions
from .instructions import Instruction
from .wordings import CHOICES, LETTER_OF, OPENINGS, SENTENCES, VALUE_OF
from .world import (
    COLOURS,
    NUMBERS,
    PATTERNS,
    SHAPES,
    SIZES,
    TRAIN_WORDS,
    WORDS,
    Scene,
    Split,
    Thing,
)

FAMILIES = ("open", "relations", "reading", "yes_no", "choice")
_FAR = 26  # pixels between centres from which on one is left of, or above, the other
_NEAR = 8  # and below which it is not


@dataclass(frozen=True)
class Question:
    """``answer``: its items; ``rivals``: what else would be an answer, for the scoring; ``group``:
    questions of one group count as one, right if all are (pairs, rotations)."""

    family: str
    kind: str
    text: str
    answer: tuple[str, ...]
    rivals: frozenset[str]
    instructions: tuple[Instruction, ...] = ()
    group: int = 0

    @property
    def target(self) -> str:
        """The response that is right and follows the instructions."""
        return instructions.respond(self.answer, self.instructions)

    def understood(self, response: str) -> bool:
        """Whether the response has the right items in order and none of their rivals, whatever it
        looks like otherwise; said several times is said."""
        words = re.findall(r"[a-z]+", response.lower())
        found = [w for w in words if w in self.rivals]
        answer = [w.lower() for w in self.answer]
        return bool(found) and found == answer * (len(found) // len(answer))

    def followed(self, response: str, *, loosely: bool = False) -> list[bool]:
        """Of each instruction, whether the response follows it."""
        return [
            i.check_loosely(response) if loosely else i.check(response) for i in self.instructions
        ]


@dataclass
class _Maker:
    """What a kind of question needs: the scene, its split, and the draw."""

    scene: Scene
    rng: np.random.Generator
    # properties that single out a thing, by thing
    names: dict[Thing, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        things = self.scene.things
        for thing in things:
            candidates = {
                f"the {thing.shape}": [t for t in things if t.shape == thing.shape],
                f"the {thing.colour} object": [t for t in things if t.colour == thing.colour],
                f"the {thing.pattern} object": [t for t in things if t.pattern == thing.pattern],
                f"the {thing.colour} {thing.shape}": [
                    t for t in things if (t.colour, t.shape) == (thing.colour, thing.shape)
                ],
            }
            self.names[thing] = [name for name, them in candidates.items() if them == [thing]]

    @property
    def split(self) -> Split:
        return self.scene.split

    def pick(self, options: list) -> object:
        return options[self.rng.integers(len(options))] if options else None

    def name(self, thing: Thing, hidden: str = "") -> str | None:
        """A phrase that singles it out and does not tell its property ``hidden``."""
        tells = getattr(thing, hidden) if hidden else None
        return self.pick([n for n in self.names[thing] if tells not in n.split()])  # type: ignore[return-value]

    def thing(self, hidden: str = "") -> tuple[Thing, str] | None:
        """Any thing that can be singled out, and how."""
        for i in self.rng.permutation(len(self.scene.things)):
            thing = self.scene.things[i]
            name = self.name(thing, hidden)
            if name:
                return thing, name
        return None

    def sentence(self, kind: str, **parts: str) -> str:
        sentences = SENTENCES[kind][self.split == "test"]
        return str(self.pick(list(sentences))).format(**parts)


_Asked = tuple[str, str, tuple[str, ...], tuple[str, ...]]  # kind, text, answer, rivals
_VALUES: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "pattern": PATTERNS,
    "size": SIZES,
}
_YES_NO = ("yes", "no")


def _property(maker: _Maker) -> _Asked | None:
    kind = str(maker.pick(["colour", "colour", "shape", "shape", "pattern", "size"]))
    found = maker.thing(kind)
    if not found:
        return None
    thing, name = found
    return kind, maker.sentence(kind, a=name), (getattr(thing, kind),), _VALUES[kind]


def _count(maker: _Maker) -> _Asked:
    things = maker.scene.things
    kind = str(maker.pick(["object", "colour", "shape"]))
    if kind == "object":
        name, count = "objects", len(things)
    else:
        # mostly of what is there
        own = [getattr(t, kind) for t in things]
        value = str(maker.pick(own if maker.rng.random() < 0.75 else list(_VALUES[kind])))
        count = own.count(value)
        name = f"{value} objects" if kind == "colour" else f"{value}s".replace("sss", "sses")
    return "count", maker.sentence("count", a=name), (NUMBERS[count],), NUMBERS


def _list(maker: _Maker) -> _Asked | None:
    things = sorted(maker.scene.things, key=lambda t: t.x)
    if len(things) < 2 or any(b.x - a.x < 14 for a, b in pairwise(things)):
        return None
    return "list", maker.sentence("list"), tuple(t.colour for t in things), COLOURS


def _open(maker: _Maker) -> _Asked | None:
    return (_property, _property, _count, _list)[maker.rng.integers(4)](maker)


def _relations(maker: _Maker) -> _Asked | None:
    things = maker.scene.things
    if len(things) < 2:
        return None
    first, second = (things[i] for i in maker.rng.permutation(len(things))[:2])
    kind = str(maker.pick(["side", "height", "neighbour", "neighbour", "alike"]))
    if kind == "neighbour":
        return _neighbour(maker, second)
    if kind == "alike":
        p = str(maker.pick(["colour", "shape", "pattern"]))
        a, b = maker.name(first, p), maker.name(second, p)
        if not (a and b):
            return None
        same = getattr(first, p) == getattr(second, p)
        return kind, maker.sentence(kind, a=a, b=b, p=p), (_YES_NO[not same],), _YES_NO
    a, b = maker.name(first), maker.name(second)
    dx, dy = first.x - second.x, first.y - second.y
    if not (a and b) or abs(dx if kind == "side" else dy) < _FAR:
        return None
    if kind == "side":
        words, answer = ("left", "right"), "left" if dx < 0 else "right"
    else:
        words, answer = ("above", "below"), "above" if dy < 0 else "below"
    return kind, maker.sentence(kind, a=a, b=b), (answer,), words


def _neighbour(maker: _Maker, centre: Thing) -> _Asked | None:
    """The only thing on one side of another."""
    relation = str(maker.pick(["left of", "right of", "above", "below"]))
    sign = -1 if relation in ("left of", "above") else 1
    axis = "x" if relation in ("left of", "right of") else "y"
    others = [t for t in maker.scene.things if t is not centre]
    ahead = [sign * (getattr(t, axis) - getattr(centre, axis)) for t in others]
    if sum(d >= _FAR for d in ahead) != 1 or any(_NEAR < d < _FAR for d in ahead):
        return None
    thing = others[[d >= _FAR for d in ahead].index(True)]
    name, p = maker.name(centre), str(maker.pick(["colour", "shape"]))
    if not name:
        return None
    text = maker.sentence("neighbour", p=p, r=relation, b=name)
    return "neighbour", text, (getattr(thing, p),), _VALUES[p]


def _reading(maker: _Maker) -> _Asked | None:
    if not maker.scene.sign:
        return None
    return "read", maker.sentence("read"), (maker.scene.sign.word,), _ALL_WORDS


_ALL_WORDS = tuple(word.lower() for word in WORDS)


def _yes_no(maker: _Maker) -> list[_Asked]:
    """A question to say yes to and its twin to say no to."""
    kind = str(maker.pick(["is_there", "is_there", "is", "is", "says"]))
    pair: list[dict[str, str]]
    if kind == "says":
        if not maker.scene.sign:
            return []
        word = maker.scene.sign.word
        (other,) = _other_words(maker.rng, word, maker.split)
        pair = [{"p": word}, {"p": other}]
    elif kind == "is":
        p = str(maker.pick(["colour", "pattern", "size"]))
        found = maker.thing(p)
        if not found:
            return []
        thing, name = found
        other = str(maker.pick([v for v in _VALUES[p] if v != getattr(thing, p)]))
        pair = [{"a": name, "p": getattr(thing, p)}, {"a": name, "p": other}]
    else:
        things = maker.scene.things
        thing = things[maker.rng.integers(len(things))]
        there = {(t.shape, t.colour) for t in things}
        absent = [
            (s, c)
            for s in SHAPES
            for c in COLOURS
            if (s, c) not in there
            # half of the twins share the shape or the colour
            if maker.rng.random() < 0.3 or s == thing.shape or c == thing.colour
        ]
        shape, colour = absent[maker.rng.integers(len(absent))]
        pair = [
            {"a": f"{'an' if c == 'orange' else 'a'} {c} {s}"}
            for s, c in ((thing.shape, thing.colour), (shape, colour))
        ]
    return [
        (kind, maker.sentence(kind, **parts), (answer,), _YES_NO)
        for answer, parts in zip(_YES_NO, pair, strict=True)
    ]


def _other_words(rng: np.random.Generator, word: str, split: Split, count: int = 1) -> list[str]:
    """Words that have other letters at each place than this one: whether two words are the same is
    hard to learn for a model this small where they may differ in one letter."""
    words = TRAIN_WORDS if split == "train" else WORDS
    others = [w for w in words if all(a != b for a, b in zip(w, word, strict=True))]
    return [others[i] for i in rng.choice(len(others), count, replace=False)]


def _choice(maker: _Maker) -> list[_Asked]:
    """A question with three options, and twice again with the options moved on."""
    asked = (_property, _property, _count, _reading, _neighbour_of_any)[maker.rng.integers(5)](
        maker
    )
    if not asked:
        return []
    kind, text, (answer,), rivals = asked
    if kind == "read":
        others = _other_words(maker.rng, answer, maker.split, 2)
    else:
        left = [v for v in rivals if v != answer]
        others = [left[i] for i in maker.rng.permutation(len(left))[:2]]
    options = [answer, *others]
    start = int(maker.rng.integers(3))
    if len(options) < 3:
        options.append("none")
    sentence = str(maker.pick(list(CHOICES[maker.split == "test"])))
    turns = []
    for turn in range(3):
        moved = [options[(i + start + turn) % 3] for i in range(3)]
        whole = sentence.format(q=text, o=_listed(moved))
        turns.append((kind, whole, ("abc"[moved.index(answer)],), ("a", "b", "c")))
    return turns


def _listed(options: Sequence[str]) -> str:
    return " ".join(f"({letter}) {option}" for letter, option in zip("abcd", options, strict=False))


def _neighbour_of_any(maker: _Maker) -> _Asked | None:
    things = maker.scene.things
    return _neighbour(maker, things[maker.rng.integers(len(things))]) if len(things) > 1 else None


def _one(make: Callable[[_Maker], _Asked | None]) -> Callable[[_Maker], list[_Asked]]:
    def made(maker: _Maker) -> list[_Asked]:
        asked = make(maker)
        return [asked] if asked else []

    return made


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """What no test asks: a request for a description, of one thing or of all, and the answer.

    A language model that is to find a thing by one property and to tell another learns it from
    this, where each word hangs on those before it, far sooner than from short answers.
    """
    maker = _Maker(scene, rng)
    found = maker.thing() if rng.random() < 0.7 else None
    if found:
        return f"describe {found[1]}.", _described(found[0])
    things = sorted(scene.things, key=lambda t: t.x)
    return "describe all from left to right.", ", ".join(map(_described, things))


def letters(rng: np.random.Generator) -> tuple[str, str]:
    """What no test asks either and no picture tells: which letter has an option, or which option
    has a letter, and the answer.

    Multiple choice is two steps, from the picture to a value and from there to its letter; the
    second is hardly learned from questions that need both.
    """
    pool = _POOLS[rng.integers(len(_POOLS))]
    if pool is TRAIN_WORDS:
        first = pool[rng.integers(len(pool))]
        pool = [first, *_other_words(rng, first, "train", 3)]
    count = min((2, 3, 3, 3, 4)[rng.integers(5)], len(pool) + 1)
    values = [*(pool[i] for i in rng.permutation(len(pool))), "none"][:count]
    values = [values[i] for i in rng.permutation(count)]
    place = int(rng.integers(count))
    which = int(rng.integers(len(LETTER_OF) + len(VALUE_OF)))
    text = (*LETTER_OF, *VALUE_OF)[which].format(
        o=_listed(values), v=values[place], l="abcd"[place]
    )
    return text, "abcd"[place] if which < len(LETTER_OF) else values[place]


# what the options of such a request are, as in the questions; signs' words more often
_POOLS: tuple[Sequence[str], ...] = (
    *_VALUES.values(),
    *(COLOURS, SHAPES, NUMBERS, _YES_NO, ("left", "right"), ("above", "below")),
    *(TRAIN_WORDS,) * 4,
)


def _described(thing: Thing) -> str:
    return f"{thing.size} {thing.pattern} {thing.colour} {thing.shape}"


_MAKERS: dict[str, Callable[[_Maker], list[_Asked]]] = {
    "open": _one(_open),
    "relations": _one(_relations),
    "reading": _one(_reading),
    "yes_no": _yes_no,
    "choice": _choice,
}


def ask(
    scene: Scene, family: str, rng: np.random.Generator, group: int = 0, plain: float = 0.0
) -> list[Question]:
    """A question of a family, or those of a pair or rotation under the same instructions; none
    where the scene has nothing to ask for. plain: how often there is no instruction, whatever else
    would be drawn."""
    maker = _Maker(scene, rng)
    for _ in range(8):
        asked = _MAKERS[family](maker)
        if asked:
            break
    else:
        return []
    cased = "read" not in {kind for kind, *_ in asked} or family == "choice"
    told: tuple[Instruction, ...] = ()
    if not plain or rng.random() >= plain:
        told = instructions.sample(rng, scene.split, len(asked[0][2]), cased)
    opening = OPENINGS[scene.split == "test"]
    start = opening[rng.integers(len(opening))]
    rest = " ".join(["", *(instructions.wording(rng, scene.split, i) for i in told)])
    return [
        Question(family, kind, f"{start}{text}{rest}", answer, frozenset(rivals), told, group)
        for kind, text, answer, rivals in asked
    ]
