"""The `vmtc` command: `vmtc demo` draws what merging does to a photograph, `vmtc focus` what a text
token looks at in it, `vmtc explain-image` what a model with both reads of it; `vmtc info` reports.

Needs the extra ``demo``, imported on demand so that its absence can be said in one line.
"""

import importlib
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import torch

from . import _registry
from ._version import __version__
from .config import CMAIConfig, VMTCConfig

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table
    from typer import Typer

    from .patches import Tokens
    from .picture import Rebuilt

# what the commands import, by the extra that brings it
_DEMO = ("typer", "rich", "matplotlib", "PIL", "skimage")
_BENCH = ("typer", "rich", "matplotlib", "threadpoolctl", "pytest_benchmark")
_MAX_RUNS, _MAX_SECONDS = 50, 1.0
_PROMPT = "What is shown in this picture?"
_CREDIT = "Photograph: SpaceX, public domain, from scikit-image."


def main() -> None:
    """Entry point of the command."""
    bench = sys.argv[1:2] == ["bench"]
    try:
        for name in _BENCH if bench else _DEMO:
            importlib.import_module(name)
    except ImportError as error:
        extra = "bench" if bench else "demo"
        sys.stderr.write(f'vmtc needs {error.name}: pip install "vmtc-kernels[{extra}]"\n')
        raise SystemExit(2) from None
    if bench:
        # the other commands want an extra that it does without
        from .bench.app import app

        app(sys.argv[2:], prog_name="vmtc bench")
    application()(prog_name="vmtc")


def application() -> "Typer":
    """The typer application."""
    import typer

    from ._terminal import index, number
    from .patches import InputError

    app = typer.Typer(
        help="Fewer visual tokens for vision-language models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    option = typer.Option
    Photo = Annotated[
        Path | None, option(help="A photograph; else one that ships in scikit-image.")
    ]
    Prompt = Annotated[str, option(help="A question on the picture.")]
    Token = Annotated[
        str | None,
        option(
            help="Text token after the image: -1 for the last, -2, ..., or a piece of the text, of"
            " which the last token counts.",
            show_default="-1, where the answer starts",
        ),
    ]
    Layer = Annotated[
        int | None,
        option(
            help="Text layer, from 0, or from the end if negative. No source says which.",
            show_default="the middle one",
        ),
    ]
    Picture = Annotated[Path, option(help="The PNG to write.")]

    @app.command()
    def demo(
        image: Photo = None,
        primary: Annotated[int, option(min=0, help="Tokens kept as they are.")] = 128,
        merged: Annotated[int, option(min=0, help="Tokens that the others become.")] = 32,
        metric: Annotated[str, option(help="Distance: cosine or euclidean.")] = "cosine",
        out: Picture = Path("vmtc-demo.png"),
        model: Annotated[
            str | None, option(help="Folder or id of a CLIP model (extra 'transformers').")
        ] = None,
    ) -> None:
        """Merge the tokens of a photograph and draw what is left of it, beside baselines."""
        try:
            _demo(image, primary, merged, metric, out, model)
        except InputError as error:
            typer.echo(f"vmtc: {error}", err=True)
            raise typer.Exit(2) from None

    @app.command()
    def focus(
        image: Photo = None,
        model: Annotated[
            str | None, option(help="Folder or id of a LLaVA model (extra 'transformers').")
        ] = None,
        prompt: Prompt = _PROMPT,
        token: Token = None,
        layer: Layer = None,
        keep_ratio: Annotated[
            float | None,
            option(help="Share of the image tokens that stay.", show_default="0.5"),
        ] = None,
        threshold: Annotated[
            float | None,
            option(help="Instead: share of the highest focus score below which none stays."),
        ] = None,
        out: Picture = Path("vmtc-focus.png"),
    ) -> None:
        """Draw which parts of a photograph a text token focuses on, and which CMAI inhibits."""
        try:
            _focus(image, model, prompt, token, layer, (keep_ratio, threshold), out)
        except InputError as error:
            typer.echo(f"vmtc: {error}", err=True)
            raise typer.Exit(2) from None

    @app.command()
    def explain_image(
        image: Photo = None,
        model: Annotated[
            str | None, option(help="Folder or id of a model (extra 'transformers').")
        ] = None,
        prompt: Prompt = _PROMPT,
        primary: Annotated[str, option(help="Tokens kept: a count, or a share as 0.25.")] = "128",
        merged: Annotated[str, option(help="Tokens that the others become, likewise.")] = "32",
        metric: Annotated[str, option(help="Distance: cosine or euclidean.")] = "cosine",
        weighting: Annotated[str, option(help="Merge by score or uniform.")] = "score",
        placement: Annotated[
            str, option(help="before_projector, after_projector, or a vision layer.")
        ] = "before_projector",
        score_layer: Annotated[int, option(help="Vision layer that gives the importance.")] = -2,
        score_source: Annotated[str, option(help="auto, cls or received.")] = "auto",
        feature_layer: Annotated[
            str | None,
            option(help="What is clustered: a vision layer, or keys.", show_default="tokens"),
        ] = None,
        keep_ratio: Annotated[
            float | None, option(help="Inhibit too: share of image tokens that a text token keeps.")
        ] = None,
        token: Token = None,
        layer: Layer = None,
        out: Picture = Path("vmtc-explain.png"),
    ) -> None:
        """Draw which tokens of a photograph a vision-language model keeps and merges."""
        try:
            _explain_image(
                *(image, model, prompt, out, keep_ratio, token, layer),
                num_primary=number("primary", primary),
                num_merged=number("merged", merged),
                metric=metric,
                weighting=weighting,
                placement=index(placement),
                score_layer=score_layer,
                score_source=score_source,
                feature_layer=index(feature_layer),
            )
        except InputError as error:
            typer.echo(f"vmtc: {error}", err=True)
            raise typer.Exit(2) from None

    @app.command()
    def info() -> None:
        """Print versions, build flags, and which backends run here."""
        _info()

    # its suites come when it is called
    from .bench.app import app as bench

    app.add_typer(bench, name="bench")
    return app


def _demo(
    image: Path | None, primary: int, merged: int, metric: str, out: Path, model: str | None
) -> None:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    from ._terminal import check_out, checked, table
    from .picture import draw, make_demo

    console = Console(highlight=False)
    terminal = Console(stderr=True)
    silent = not terminal.is_terminal
    with Progress(console=terminal, transient=True, disable=silent) as progress:
        task = progress.add_task("options", total=5)

        def step(what: str) -> None:
            progress.update(task, description=what, advance=1)

        check_out(out)
        config = checked(VMTCConfig, num_primary=primary, num_merged=merged, metric=metric)
        step("features and importance")
        photo, patch, tokens = _tokens(image, model, config)
        checked(config.counts, tokens.features.shape[1])
        step("time per image")
        facts = _facts(photo, patch, tokens, config)
        step("rebuilding")
        demo = make_demo(photo, patch, tokens, config, "" if image else _CREDIT)
        step("drawing")
        draw(demo, out)
    console.print(table(facts))
    console.print(_errors(demo.rebuilt))
    console.print(Text(f"Picture: {out}"), soft_wrap=True)


def _focus(
    image: Path | None,
    model: str | None,
    prompt: str,
    token: str | None,
    layer: int | None,
    rule: tuple[float | None, float | None],
    out: Path,
) -> None:
    """rule: keep_ratio and threshold, at most one of them."""
    from rich.console import Console
    from rich.text import Text

    from ._terminal import check_out, checked, table
    from .patches import InputError, load_photo

    check_out(out)
    keep_ratio, threshold = (0.5, None) if rule == (None, None) else rule
    config = checked(CMAIConfig, keep_ratio=keep_ratio, threshold=threshold)
    if model is None:
        raise InputError("--model is needed: the folder or id of a LLaVA model")
    from .focus_picture import draw, summary
    from .llava import Llava, choose

    console, terminal = Console(highlight=False), Console(stderr=True)
    # what the terminal shows while a model loads and reads is gone afterwards
    with terminal.status("loading the model") as status:
        llava = Llava(model)
        photo = load_photo(image, llava.size)
        status.update("reading the photograph")
        focus = llava.focus(photo, prompt, config, layer)
        chosen = choose(focus.words, token)
        status.update("drawing")
        draw(focus, chosen, out, "" if image else _CREDIT)
    tokens, inhibited = focus.grid**2, focus.inhibited[chosen].sum()
    scores = focus.scores[chosen]
    facts = [
        ("text token", f"{focus.words[chosen]!r}, token {chosen - len(focus.words)} of the prompt"),
        ("image tokens", f"{inhibited} of {tokens} inhibited"),
        ("focus scores", f"{scores.min():.3g} to {scores.max():.3g}, sum {scores.sum():.3g}"),
        ("rule", summary(focus)),
        ("model", focus.model),
        ("backend", focus.backend),
    ]
    console.print(table(facts))
    console.print(Text(f"Picture: {out}"), soft_wrap=True)


def _explain_image(
    image: Path | None,
    model: str | None,
    prompt: str,
    out: Path,
    keep_ratio: float | None,
    token: str | None,
    layer: int | None,
    **settings: Any,
) -> None:
    """settings: those of `VMTCConfig`."""
    from rich.console import Console
    from rich.text import Text

    from ._terminal import check_out, checked, table
    from .patches import InputError

    check_out(out)
    config = checked(VMTCConfig, **settings)
    cmai = None if keep_ratio is None else checked(CMAIConfig, keep_ratio=keep_ratio)
    if cmai is None and (token, layer) != (None, None):
        raise InputError("--token and --layer need --keep-ratio: without it no token is inhibited")
    if model is None:
        raise InputError("--model is needed: the folder or id of a vision-language model")
    from .explain_picture import draw, facts
    from .explained import Explainer, photograph

    console, terminal = Console(highlight=False), Console(stderr=True)
    with terminal.status("reading the photograph") as status:
        photo = photograph(image)
        status.update("loading the model")
        explainer = Explainer.load(model)
        status.update("running the model")
        explained = explainer.explain(photo, prompt, config, cmai, layer=layer, token=token)
        status.update("drawing")
        draw(explained, out, "" if image else _CREDIT)
    seen = f"{image or 'rocket'}, {photo.width} x {photo.height} pixels"
    console.print(table([("image", seen), *facts(explained)]))
    console.print(Text(f"Picture: {out}"), soft_wrap=True)


def _tokens(
    image: Path | None, model: str | None, config: VMTCConfig
) -> tuple["np.ndarray", int, "Tokens"]:
    """The photograph, the side of its patches, and their features and importance."""
    from . import patches

    if model is None:
        photo = patches.load_photo(image)
        return photo, patches.CLIP_PATCH, patches.photo_tokens(photo)
    from .clip import ClipTower

    tower = ClipTower(model)
    photo = patches.load_photo(image, tower.size)
    return photo, tower.patch, tower.tokens(photo, config)


def _facts(
    photo: "np.ndarray", patch: int, tokens: "Tokens", config: VMTCConfig
) -> list[tuple[str, str]]:
    """What the first table says: token counts, time, backend and why."""
    from ._terminal import checked
    from .patches import split

    x, scores, features = split(photo, patch), tokens.scores, tokens.features
    count, size = x.shape[1:]
    primary, merged = config.counts(count)
    explanation = checked(
        _registry.explain, "merge_tokens", x, scores, primary, merged, features=features
    )
    runs = _times(lambda: config.merge(x, scores, features=features))
    work = f"{count} x {size} pixels clustered by {features.shape[2]} features"
    budget = primary + merged
    return [
        ("tokens", f"{count} → {budget} ({primary} primary + {merged} merged)"),
        ("time per image", f"{1e3 * median(runs):.2f} ms, median of {len(runs)}: {work}"),
        ("threads", str(torch.get_num_threads())),
        ("features, importance", tokens.source),
        ("backend", explanation.backend),
        *((f"not {name}", reason) for name, reason in explanation.reasons.items()),
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


def _errors(rebuilt: "list[Rebuilt]") -> "Table":
    from rich import box
    from rich.table import Table

    from .picture import decibels

    table = Table(box=box.SIMPLE)
    table.add_column("rebuilt from")
    for measure in ("tokens", "PSNR", "weighted by importance"):
        table.add_column(measure, justify="right")
    for each in rebuilt:
        errors = decibels(each.psnr), decibels(each.weighted)
        table.add_row(each.name, str(each.tokens), *errors)
    return table


def _info() -> None:
    from rich.console import Console

    from ._terminal import table

    console = Console(highlight=False)
    packages = [("vmtc_kernels", __version__), ("python", platform.python_version())]
    packages += [(name, _version(name)) for name in ("torch", "numpy", "triton", "transformers")]
    console.print(table(packages, "Versions"))
    cpu = [
        ("capability", torch.backends.cpu.get_cpu_capability()),
        ("threads", str(torch.get_num_threads())),
    ]
    console.print(table(cpu, "CPU"))
    backends = _registry.available_backends()
    console.print(table([(k, v or "runs here") for k, v in backends.items()], "Backends"))
    if _registry._C is not None:
        console.print(table(_registry._C.build_info().items(), "Build of the compiled module"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
