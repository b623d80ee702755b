"""``python -m bench.missing``: which packages the GPU run needs and does not find, and why."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import version

# module: (package, what it is for)
NEEDED = {
    "torch": ("torch", "everything"),
    "numpy": ("numpy", "the tests"),
    "setuptools": ("setuptools>=77", "the build"),
    "ninja": ("ninja", "the build"),
    "pytest": ("pytest", "the tests"),
    "hypothesis": ("hypothesis", "the tests: without it none runs"),
    "typer": ("typer", "the benchmark"),
    "rich": ("rich", "the benchmark"),
    "threadpoolctl": ("threadpoolctl", "the benchmark"),
    "pytest_benchmark": ("pytest-benchmark", "the benchmark's file"),
}
USEFUL = {
    "triton": ("triton", "the backend triton"),
    "sklearn": ("scikit-learn", "a test of kmeans against it"),
    "xdist": ("pytest-xdist", "tests side by side"),
    "flash_kmeans": ("flash-kmeans==0.3.1", "a rival in the benchmark"),
    "tqdm": ("tqdm", "flash-kmeans, which imports it"),
    "transformers": ("transformers>=5.17", "the benchmark of a whole model"),
    "flash_colsum": ("flash-colsum==0.1.0", "a rival in the benchmark"),
}


def report(is_there: Callable[[str], bool]) -> tuple[list[str], bool]:
    """Lines, and whether everything needed is there."""
    lines = []
    complete = True
    for packages, word in ((NEEDED, "MISSING, needed"), (USEFUL, "missing, can do without")):
        for module, (package, purpose) in packages.items():
            if not is_there(module):
                lines.append(f"{word}: {package}, for {purpose}")
                complete = complete and packages is USEFUL
    return lines or ["no package is missing"], complete


def is_there(module: str) -> bool:
    if importlib.util.find_spec(module) is None:
        return False
    # an older one does not understand our pyproject.toml
    return module != "setuptools" or int(version("setuptools").partition(".")[0]) >= 77


def main() -> None:
    lines, complete = report(is_there)
    print("\n".join(lines))
    sys.exit(not complete)


if __name__ == "__main__":
    main()
