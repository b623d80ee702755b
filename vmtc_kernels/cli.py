"""The `vmtc` command: `vmtc demo` asks a model about a picture before and after merging, and draws
what is left of it, `vmtc focus` what a text token looks at in it, `vmtc explain-image` what a model
with both reads of it; `vmtc info` reports.

Needs the extra ``demo``, imported on demand so that its absence can be said in one line.
"""

import importlib
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch

from . import _registry
from ._version import __version__
from .laboratory import MERGED, PRIMARY

if TYPE_CHECKING:
    from typer import Typer

# what the commands import, by the extra that brings it
_DEMO = ("typer", "rich", "matplotlib", "PIL", "skimage", "transformers")
_BENCH = ("typer", "rich", "matplotlib", "threadpoolctl", "pytest_benchmark")


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

    from . import commands
    from ._terminal import index

    app = typer.Typer(
        help="Fewer visual tokens for vision-language models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    option = typer.Option
    toy = "the laboratory's toy"
    Photo = Annotated[
        Path | None,
        option(help="A photograph.", show_default="the toy's scene, or scikit-image's rocket"),
    ]
    Model = Annotated[str | None, option(help="Folder or id of a model.", show_default=toy)]
    Question = Annotated[
        str | None,
        option(help="A question on the picture.", show_default="one that fits the picture"),
    ]
    Primary = Annotated[str, option(help="Tokens kept: a count, or a share as 0.25.")]
    Merged = Annotated[str, option(help="Tokens that the others become, likewise.")]
    Metric = Annotated[str, option(help="Distance: cosine or euclidean.")]
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
        question: Question = None,
        primary: Primary = PRIMARY,
        merged: Merged = MERGED,
        metric: Metric = "cosine",
        out: Picture = Path("vmtc-demo.png"),
        model: Annotated[
            str | None,
            option(
                help="Folder or id of a LLaVA model, or of a CLIP model, which answers nothing;"
                " none for descriptors of pixels.",
                show_default=toy,
            ),
        ] = None,
    ) -> None:
        """Merge the tokens of a picture, draw what is left, and ask a model before and after."""
        with _errors_in_a_line():
            commands.demo(image, question, primary, merged, metric, out, model)

    @app.command()
    def focus(
        image: Photo = None,
        model: Annotated[
            str | None, option(help="Folder or id of a LLaVA model.", show_default=toy)
        ] = None,
        prompt: Question = None,
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
        """Draw which parts of a picture a text token focuses on, and which CMAI inhibits."""
        with _errors_in_a_line():
            commands.focus(image, model, prompt, token, layer, (keep_ratio, threshold), out)

    @app.command()
    def explain_image(
        image: Photo = None,
        model: Model = None,
        prompt: Question = None,
        primary: Primary = PRIMARY,
        merged: Merged = MERGED,
        metric: Metric = "cosine",
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
        """Draw which tokens of a picture a vision-language model keeps and merges."""
        with _errors_in_a_line():
            commands.explain_image(
                *(image, model, prompt, out, keep_ratio, token, layer),
                primary=primary,
                merged=merged,
                metric=metric,
                weighting=weighting,
                placement=index(placement),
                score_layer=score_layer,
                score_source=score_source,
                feature_layer=index(feature_layer),
            )

    @app.command()
    def info() -> None:
        """Print versions, build flags, and which backends run here."""
        _info()

    # its suites come when it is called
    from .bench.app import app as bench

    app.add_typer(bench, name="bench")
    return app


@contextmanager
def _errors_in_a_line() -> Iterator[None]:
    """What the user can mend, and exit code 2."""
    import typer

    from .patches import InputError

    try:
        yield
    except InputError as error:
        typer.echo(f"vmtc: {error}", err=True)
        raise typer.Exit(2) from None


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
