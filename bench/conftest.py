"""Options of ``pytest bench/``, the run that its tests share, and what its file holds besides."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vmtc bench")
    group.addoption("--bench-suite", action="append", default=[], help="all, if none is named")
    group.addoption("--bench-only", default="", help="of the set-ups, those with this text")
    group.addoption("--bench-quick", action="store_true", help="few samples")
    group.addoption("--bench-sweeps", action="store_true", help="also over each size")
    group.addoption("--bench-device", default="", help="cpu or cuda, the current GPU")
    group.addoption("--bench-eager", action="store_true", help="on a GPU call by call")
    group.addoption("--bench-threads", type=int, default=0, help="as many as torch takes")
    group.addoption("--bench-size", default="", help="of the model of llava")


class Run:
    """What is timed, each set-up once, when the first of its tests asks for it."""

    def __init__(self, config: pytest.Config) -> None:
        from .options import Options

        option = config.getoption
        try:
            self.options = Options(
                suites=tuple(option("--bench-suite")),
                only=option("--bench-only"),
                quick=option("--bench-quick"),
                sweeps=option("--bench-sweeps"),
                device=option("--bench-device"),
                eager=option("--bench-eager"),
                threads=option("--bench-threads"),
                size=option("--bench-size"),
            ).checked()
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        self.planned = {each.label: each for each in self.options.plan()}
        self.selected: dict[str, set[str]] = {}
        self.environment: dict[str, Any] | None = None
        self._results: dict[str, dict[str, Any]] = {}

    @property
    def results(self) -> list[dict[str, Any]]:
        return list(self._results.values())

    def result(self, label: str) -> dict[str, Any]:
        if self.environment is None:
            self.meter = self.options.meter()
            self.environment = self.options.describe(self.meter)
        if label not in self._results:
            found = self.planned[label].run(
                self.options.effort(self.planned[label]),
                self.meter,
                only=self.selected.get(label),
            )
            self._results[label] = asdict(found)
        return self._results[label]


RUN = pytest.StashKey[Run]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUN] = Run(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"setup", "provider"} <= set(metafunc.fixturenames):
        names = [
            (label, provider.name)
            for label, planned in metafunc.config.stash[RUN].planned.items()
            for provider in planned.case.providers
        ]
        metafunc.parametrize(("setup", "provider"), names, ids=["-".join(name) for name in names])


def pytest_collection_finish(session: pytest.Session) -> None:
    selected = session.config.stash[RUN].selected
    for item in session.items:
        params = getattr(item, "callspec", None)
        if params and {"setup", "provider"} <= set(params.params):
            selected.setdefault(params.params["setup"], set()).add(params.params["provider"])


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Run:
    return pytestconfig.stash[RUN]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    from .record import machine

    environment = config.stash[RUN].environment
    # no name of the computer
    machine_info.pop("node", None)
    if environment:
        machine_info |= machine(environment)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    run = config.stash[RUN]
    for benchmark in output_json["benchmarks"]:
        # the samples are below, with what else was measured
        benchmark["stats"].pop("data", None)
    output_json["vmtc"] = {"environment": run.environment, "results": run.results}
