"""What `vmtc demo`, `vmtc focus` and `vmtc explain-image` do; needs the extra ``demo``."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from . import _registry, checkpoints
from . import laboratory as lab
from ._terminal import answer_rows, answered, check_out, checked, number, table
from .answers import Answer, answers
from .config import CMAIConfig, VMTCConfig
from .patches import CLIP_PATCH, InputError, Tokens, load_photo, photo_tokens, split

if TYPE_CHECKING:
    import numpy as np

    from .picture import Rebuilt

_MAX_RUNS, _MAX_SECONDS = 50, 1.0
_QUESTION = "What is shown in this picture?"
_CREDIT = "Photograph: SpaceX, public domain, from scikit-image."
# of what is printed while a command runs
_STEPS = 6


class Given(NamedTuple):
    """What is asked: model, picture (None: the one of scikit-image), question, and whose picture it
    is. ``note``: what the user should know of the answers."""

    model: str
    image: Path | None
    question: str
    credit: str
    note: str

    @property
    def picture(self) -> str:
        if self.image == lab.LAB_SCENE:
            return "the laboratory's scene"
        return str(self.image or "rocket")


def given(model: str | None, image: Path | None, question: str | None) -> Given:
    """The laboratory's model for none, and for it the scene and the question that it understands"""
    model = str(lab.LAB) if model is None else model
    toy = lab.is_lab(model)
    scene = image is not None and image.resolve() == lab.LAB_SCENE.resolve()
    if image is None and toy:
        image, scene = lab.LAB_SCENE, True
    return Given(
        model,
        lab.LAB_SCENE if scene else image,
        question if question is not None else lab.LAB_QUESTION if toy else _QUESTION,
        _CREDIT if image is None else lab.LAB_CREDIT if scene else "",
        lab.LAB_NOTE if toy and not scene else "",
    )


def demo(
    image: Path | None,
    question: str | None,
    primary: str,
    merged: str,
    metric: str,
    out: Path,
    model: str | None,
) -> None:
    console, terminal = Console(highlight=False), Console(stderr=True)
    silent = not terminal.is_terminal
    with Progress(console=terminal, transient=True, disable=silent) as progress:
        task = progress.add_task("options", total=_STEPS)

        def step(what: str) -> None:
            progress.update(task, description=what, advance=1)

        check_out(out)
        config = checked(VMTCConfig, **_budget(primary, merged), metric=metric)
        asked = given(model, image, question)
        step("features and importance")
        seen = _seen(asked, config)
        checked(config.counts, seen.tokens.features.shape[1])
        step("time per image")
        facts = _facts(seen, config)
        step("rebuilding")
        # matplotlib takes a second to import
        from .picture import draw, make_demo

        made = make_demo(seen.photo, seen.patch, seen.tokens, config, asked.credit)
        step("drawing")
        draw(made, out)
        step("answers")
        found = list(seen.answers(asked.question, config))
    console.print(table(facts))
    console.print(_errors(made.rebuilt))
    console.print(Text(f"Picture: {out}"), soft_wrap=True)
    if found:
        console.print()
        console.print(Text(f"Question on {asked.picture}: {asked.question}"), soft_wrap=True)
        console.print(answered(found))
        _print_note(console, asked)


def focus(
    image: Path | None,
    model: str | None,
    prompt: str | None,
    token: str | None,
    layer: int | None,
    rule: tuple[float | None, float | None],
    out: Path,
) -> None:
    """rule: keep_ratio and threshold, at most one of them."""
    check_out(out)
    keep_ratio, threshold = (0.5, None) if rule == (None, None) else rule
    config = checked(CMAIConfig, keep_ratio=keep_ratio, threshold=threshold)
    asked = given(model, image, prompt)
    from .focus_picture import draw, summary
    from .llava import Llava, choose

    console, terminal = Console(highlight=False), Console(stderr=True)
    # what the terminal shows while a model loads and reads is gone afterwards
    with terminal.status("loading the model") as status:
        llava = Llava(asked.model)
        photo = load_photo(asked.image, llava.size)
        status.update("reading the photograph")
        seen = llava.focus(photo, asked.question, config, layer)
        chosen = choose(seen.words, token)
        status.update("drawing")
        draw(seen, chosen, out, asked.credit)
        status.update("answering")
        found = answer_rows(llava.answers(photo, asked.question, config))
    tokens, inhibited = seen.grid**2, seen.inhibited[chosen].sum()
    scores = seen.scores[chosen]
    place = chosen - len(seen.words)
    facts = [
        ("prompt", asked.question),
        *found,
        ("text token", f"{seen.words[chosen]!r}, token {place} of the prompt"),
        ("image tokens", f"{inhibited} of {tokens} inhibited"),
        ("focus scores", f"{scores.min():.3g} to {scores.max():.3g}, sum {scores.sum():.3g}"),
        ("rule", summary(seen)),
        ("model", seen.model),
        ("backend", seen.backend),
    ]
    console.print(table(facts))
    _print_note(console, asked)
    console.print(Text(f"Picture: {out}"), soft_wrap=True)


def explain_image(
    image: Path | None,
    model: str | None,
    prompt: str | None,
    out: Path,
    keep_ratio: float | None,
    token: str | None,
    layer: int | None,
    *,
    primary: str,
    merged: str,
    **settings: Any,
) -> None:
    """settings: others of `VMTCConfig`."""
    check_out(out)
    config = checked(VMTCConfig, **_budget(primary, merged), **settings)
    cmai = None if keep_ratio is None else checked(CMAIConfig, keep_ratio=keep_ratio)
    if cmai is None and (token, layer) != (None, None):
        raise InputError("--token and --layer need --keep-ratio: without it no token is inhibited")
    asked = given(model, image, prompt)
    from .explain_picture import draw, facts
    from .explained import Explainer, photograph

    console, terminal = Console(highlight=False), Console(stderr=True)
    with terminal.status("reading the photograph") as status:
        photo = photograph(asked.image)
        status.update("loading the model")
        explainer = Explainer.load(asked.model)
        status.update("running the model")
        explained = explainer.explain(photo, asked.question, config, cmai, layer=layer, token=token)
        status.update("drawing")
        draw(explained, out, asked.credit)
        status.update("answering")
        found = answer_rows(explainer.answers(photo, asked.question, config, cmai))
    seen = f"{asked.picture}, {photo.width} x {photo.height} pixels"
    rows = [("image", seen), ("prompt", asked.question), *found, *facts(explained)]
    console.print(table(rows))
    _print_note(console, asked)
    console.print(Text(f"Picture: {out}"), soft_wrap=True)


def _budget(primary: str, merged: str) -> dict[str, int | float]:
    return {"num_primary": number("primary", primary), "num_merged": number("merged", merged)}


class _Seen(NamedTuple):
    """A photograph, the side of its patches, their features and importance; a model to ask."""

    photo: "np.ndarray"
    patch: int
    tokens: Tokens
    model: Any = None
    processor: Any = None
    name: str = ""

    def answers(self, question: str, config: VMTCConfig) -> Iterable[Answer]:
        if self.model is None:
            return ()
        from PIL import Image

        image = Image.fromarray(self.photo)
        return answers(
            *(self.model, self.processor, self.name, image, question), vmtc=config, warm=True
        )


def _seen(asked: Given, config: VMTCConfig) -> _Seen:
    if asked.model == "none":
        photo = load_photo(asked.image)
        return _Seen(photo, CLIP_PATCH, photo_tokens(photo))
    from .clip import ClipTower

    model = processor = None
    if checkpoints.type_of(asked.model) == "llava":
        model, processor = checkpoints.load(asked.model, ["llava"], "a LLaVA model")
        tower = ClipTower.of(model, checkpoints.name_of(asked.model, model))
    else:
        tower = ClipTower.load(asked.model)
    photo = load_photo(asked.image, tower.size)
    with checkpoints.refusals(f"{tower.name} cannot run"):
        tokens = tower.tokens(photo, config)
    return _Seen(photo, tower.patch, tokens, model, processor, tower.name)


def _facts(seen: _Seen, config: VMTCConfig) -> list[tuple[str, str]]:
    """What the first table says: token counts, time, backend and why."""
    x, scores, features = split(seen.photo, seen.patch), seen.tokens.scores, seen.tokens.features
    count, size = x.shape[1:]
    primary, merged = config.counts(count)
    explanation = checked(
        _registry.explain, "merge_tokens", x, scores, primary, merged, features=features
    )
    runs = _times(lambda: config.merge(x, scores, features=features))
    work = f"{count} x {size} pixels clustered by {features.shape[2]} features"
    budget = primary + merged
    mute = f"none: {'a vision tower has no words' if seen.name else 'no model is asked'}"
    return [
        ("model", seen.name or "none"),
        ("tokens", f"{count} → {budget} ({primary} primary + {merged} merged)"),
        ("time per image", f"{1e3 * median(runs):.2f} ms, median of {len(runs)}: {work}"),
        ("threads", str(torch.get_num_threads())),
        ("features, importance", seen.tokens.source),
        ("backend", explanation.backend),
        *((f"not {name}", reason) for name, reason in explanation.reasons.items()),
        *([("answers", mute)] if seen.model is None else []),
    ]


def _times(call: Callable[[], Any]) -> list[float]:
    """Seconds of each run after a warm-up: at least 3 runs, then until a second is over."""
    call()
    runs: list[float] = []
    while len(runs) < 3 or (len(runs) < _MAX_RUNS and sum(runs) < _MAX_SECONDS):
        start = time.perf_counter()
        call()
        runs.append(time.perf_counter() - start)
    return runs


def _errors(rebuilt: "list[Rebuilt]") -> Table:
    from .picture import decibels

    made = Table(box=box.SIMPLE)
    made.add_column("rebuilt from")
    for measure in ("tokens", "PSNR", "weighted by importance"):
        made.add_column(measure, justify="right")
    for each in rebuilt:
        errors = decibels(each.psnr), decibels(each.weighted)
        made.add_row(each.name, str(each.tokens), *errors)
    return made


def _print_note(console: Console, asked: Given) -> None:
    if asked.note:
        console.print(Text(asked.note), soft_wrap=True)
