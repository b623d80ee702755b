"""Output instructions that a program verifies, strictly and loosely as IFEval does.

An answer is a list of items, most often one. Each instruction says how the answer must look; up to
three that do not contradict each other are put to a question. Some pairs are put together in the
test alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .world import Split

KINDS = (
    *("json", "bullets", "words", "twice", "no_commas", "quotes", "upper", "prefix", "suffix"),
)
# what each takes beside its kind
_VALUES: dict[str, tuple[str, ...]] = {
    "json": ("answer", "result", "reply", "value"),
    "words": ("three", "four", "five"),
    "prefix": ("well:", "sure:", "result:"),
    "suffix": ("done", "over", "thanks"),
}
_SENTENCES = {"three": "it is", "four": "the answer is", "five": "i think it is"}
_COUNTS = {"three": 3, "four": 4, "five": 5}
_TOGETHER = {
    frozenset((kind, other))
    for kind, others in {
        "bullets": ("upper", "suffix"),
        "words": ("quotes", "upper"),
        "twice": ("no_commas", "quotes", "upper", "prefix", "suffix"),
        "no_commas": ("quotes", "upper", "prefix", "suffix"),
        "quotes": ("upper",),
        "upper": ("prefix", "suffix"),
        "prefix": ("suffix",),
    }.items()
    for other in others
}
# shares of none to three; the forms are learned long before the answers
_NUMBERS: dict[Split, tuple[float, ...]] = {
    "train": (0.5, 0.25, 0.15, 0.1),
    "test": (0.25, 0.35, 0.25, 0.15),
}
# asked for together in the test alone
HELD_OUT = {frozenset(("twice", "suffix")), frozenset(("quotes", "upper"))}

_WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # kind: those of the training, those of the test
    "json": (
        (
            'reply in json with the key "{}".',
            'give json with the key "{}".',
            'write json with "{}" as the key.',
            'use json: the key is "{}".',
            'make it json with one key, "{}".',
            'put the answer in json under the key "{}".',
            'under the key "{}", give the answer as json.',
            'reply with a json object whose key is "{}".',
        ),
        ('answer in json, the key is "{}".', 'the answer must be json with key "{}".'),
    ),
    "bullets": (
        (
            "use a bullet list.",
            "reply as a bullet list.",
            "make it a list with bullets.",
            "write it as a bullet list.",
            "list the answer with bullets.",
            "bullets, please: one to each item.",
            "put each item behind a bullet.",
            "the reply must be a bullet list.",
        ),
        ("give the answer as a bullet list.",),
    ),
    "words": (
        (
            "use exactly {} words.",
            "reply with {} words.",
            "write exactly {} words.",
            "say it in {} words.",
            "let the reply be {} words long.",
            "the reply must have exactly {} words.",
            "{} words, no more and no less.",
            "make it exactly {} words.",
            "use {} words for the answer.",
            "in exactly {} words, please.",
        ),
        ("answer with exactly {} words.",),
    ),
    "twice": (
        (
            "say it twice.",
            "give the answer twice.",
            "repeat the answer: twice in all.",
            "write it two times.",
            "give it two times over.",
            "twice, please.",
            "say the answer and say it again.",
            "the reply must have the answer twice.",
            "let me read the answer twice.",
            "put the answer down twice.",
        ),
        ("write the answer twice.",),
    ),
    "no_commas": (
        (
            "do not use commas.",
            "use no commas.",
            "no commas in the answer.",
            "leave out all commas.",
            "write it without commas.",
            "commas must not be used.",
            "there must be no comma in the reply.",
            "do it with no comma at all.",
        ),
        ("reply with no commas.",),
    ),
    "quotes": (
        (
            "put it in quotes.",
            "write the answer in quotes.",
            "use quotes around the answer.",
            "put the reply between quotes.",
            "the answer must be in quotes.",
            "quotes must stand around the reply.",
            "begin and end with quotes.",
            "give the answer between quotes.",
            "wrap it in quotes.",
        ),
        ("put quotes around the answer.",),
    ),
    "upper": (
        (
            "use capital letters.",
            "reply in upper case.",
            "write all in capital letters.",
            "use upper case letters only.",
            "write the answer in capitals.",
            "the answer must be in upper case.",
            "only capital letters, please.",
            "put it all in upper case letters.",
            "capital letters must be used.",
            "make every letter a capital.",
        ),
        ("give the answer in upper case letters.",),
    ),
    "prefix": (
        (
            'start with "{}".',
            'begin the answer with "{}".',
            'the first word must be "{}".',
            'put "{}" first.',
            'let the reply begin with "{}".',
            '"{}" must stand at the start.',
            'write "{}" before the answer.',
            'the reply must start with the word "{}".',
        ),
        ('the answer must start with "{}".',),
    ),
    "suffix": (
        (
            'end with "{}".',
            'the last word must be "{}".',
            'finish the answer with "{}".',
            'put "{}" last.',
            'let the reply end with "{}".',
            '"{}" must stand at the end.',
            'write "{}" after the answer.',
            'close the answer with "{}".',
            'the reply must end with the word "{}".',
            'say "{}" at the end.',
        ),
        ('the answer must end with "{}".',),
    ),
}


@dataclass(frozen=True)
class Instruction:
    """``value``: the key, the count, or the words at the start or end."""

    kind: str
    value: str = ""

    def check(self, response: str) -> bool:
        """Whether a response follows it to the letter."""
        return _check(self.kind, self.value, response)

    def check_loosely(self, response: str) -> bool:
        """Whether it does without its asterisks, its first or its last line, or some of these."""
        lines = response.split("\n")
        forms = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1]))]
        forms.append("\n".join(lines[1:-1]).strip())
        return any(self.check(text) for form in forms for text in (form, form.replace("*", "")))


def _check(kind: str, value: str, response: str) -> bool:
    text = response.strip()
    if not text:
        return False
    if kind == "json":
        try:
            parsed = json.loads(text)
        except ValueError:
            return False
        return isinstance(parsed, dict) and list(parsed) == [value]
    if kind == "bullets":
        return all(re.match(r"[*-] \S", line) for line in text.split("\n"))
    if kind == "words":
        return len(text.split()) == _COUNTS[value]
    if kind == "twice":
        halves = re.fullmatch(r"(.+); (.+)", _stripped(text), re.DOTALL)
        return bool(halves) and halves[1] == halves[2]
    if kind == "no_commas":
        return "," not in text
    if kind == "quotes":
        return len(text) > 2 and text[0] == text[-1] == '"'
    if kind == "upper":
        return text == text.upper() != text.lower()
    if kind == "prefix":
        return text.lower().startswith(value)
    return text.lower().rstrip('."').endswith(value)


def _stripped(text: str) -> str:
    """Without quotes, and without the words that may have to stand at the start or at the end."""
    text = text.strip('"')
    for start in _VALUES["prefix"]:
        if text.lower().startswith(start):
            text = text[len(start) :]
    for end in _VALUES["suffix"]:
        if text.lower().endswith(end):
            text = text[: -len(end)]
    return text.strip()


def respond(items: Sequence[str], instructions: Sequence[Instruction]) -> str:
    """The response that follows all: what the model is trained to say."""
    given = {i.kind: i.value for i in instructions}
    if "json" in given:
        return json.dumps({given["json"]: items[0] if len(items) == 1 else list(items)})
    if "bullets" in given:
        text = "\n".join(f"* {item}" for item in items)
    else:
        text = (" " if "no_commas" in given else ", ").join(items)
        if "words" in given:
            text = f"{_SENTENCES[given['words']]} {text}"
        if "twice" in given:
            text = f"{text}; {text}"
    if "prefix" in given:
        text = f"{given['prefix']} {text}"
    if "suffix" in given:
        text = f"{text}\n* {given['suffix']}" if "bullets" in given else f"{text} {given['suffix']}"
    if "quotes" in given:
        text = f'"{text}"'
    return text.upper() if "upper" in given else text


def sample(
    rng: np.random.Generator, split: Split, items: int, cased: bool
) -> tuple[Instruction, ...]:
    """None to three, for an answer of so many items; cased: whether its case is free."""
    wanted = int(rng.choice(4, p=_NUMBERS[split]))
    kinds: list[str] = []
    for kind in rng.permutation(KINDS):
        if len(kinds) == wanted:
            break
        if (kind == "upper" and not cased) or (kind == "words" and items > 1):
            continue
        # no_commas would be followed by itself where there is one item
        if kind == "no_commas" and items == 1:
            continue
        pairs = [frozenset((kind, other)) for other in kinds]
        if all(p in _TOGETHER and (split == "test" or p not in HELD_OUT) for p in pairs):
            kinds.append(str(kind))
    return tuple(
        Instruction(kind, str(rng.choice(_VALUES[kind])) if kind in _VALUES else "")
        for kind in kinds
    )


def wording(rng: np.random.Generator, split: Split, instruction: Instruction) -> str:
    """One of the split's sentences for it."""
    sentences = _WORDINGS[instruction.kind][split == "test"]
    return str(sentences[rng.integers(len(sentences))]).format(instruction.value)
