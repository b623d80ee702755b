"""The file of a run: what pytest-benchmark's tools read, and under ``vmtc`` all that was measured.

``vmtc`` holds ``environment`` (see `environment.describe`) and ``results``: of each set-up the
fields of `runner.Result`, or ``suite``, ``params``, ``axis`` and the ``error`` that stopped it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# pytest-benchmark's version of its format, the last one that changed a field
FORMAT = "4.0.0"


@dataclass(frozen=True)
class Run:
    path: Path
    environment: dict[str, Any]
    results: list[dict[str, Any]]


def read(path: Path) -> Run:
    """Raises ValueError for a file that is none of a run."""
    try:
        found = json.loads(path.read_text())["vmtc"]
        return Run(path, found["environment"], found["results"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no file of a benchmark: {error!r}") from None


def write(path: Path, environment: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """All at once: who is stopped while writing leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(contents(environment, results), indent=1) + "\n")
    new.replace(path)


def contents(environment: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "machine_info": machine(environment),
        "commit_info": {"id": environment["commit"], "dirty": environment["dirty"]},
        "datetime": environment["date"],
        "version": FORMAT,
        "benchmarks": [
            _benchmark(result, row)
            for result in results
            for row in result.get("rows", [])
            if row["ms"]
        ],
        "vmtc": {"environment": environment, "results": results},
    }


def machine(environment: dict[str, Any]) -> dict[str, Any]:
    """Of the environment what tells machines apart."""
    names = ("system", "cpu", "cpu_capability", "cores", "threads", "device")
    gpu = {"gpu": environment["gpu"]["name"]} if "gpu" in environment else {}
    return {**{name: environment[name] for name in names}, **gpu}


def label(suite: str, params: dict[str, Any]) -> str:
    """A set-up in a line: ``merge data=blobs D=1024``."""
    return " ".join([suite, *(f"{key}={value}" for key, value in params.items())])


def _benchmark(result: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """What pytest-benchmark keeps of a provider: seconds of a call, all its images together."""
    from pytest_benchmark.stats import Stats

    stats = Stats()
    for sample in row["samples_ms"]:
        stats.update(sample * result["images"] / 1e3)
    group = label(result["suite"], result["params"])
    name = f"test_provider[{group}-{row['name']}]"
    return {
        "group": group,
        "name": name,
        "fullname": f"bench/test_suites.py::{name}",
        "params": None,
        "param": None,
        "extra_info": {key: row[key] for key in ("kind", "scope", "detail")},
        "options": {},
        "stats": {**stats.as_dict(), "iterations": row["calls_per_sample"]},
    }
