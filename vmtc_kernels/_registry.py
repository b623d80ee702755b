"""Schemas, backends and the choice between them: the only file that loads kernels.

Every operator is one row of ``OPERATORS``. `define` registers its schema, its fake and its autograd
formula, and one kernel for all devices: check the arguments, choose a backend, call it.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

# in the order in which the dispatcher tries them
BACKENDS = ("cuda", "triton", "cpu", "reference")

_library = torch.library.Library("vmtc", "DEF")
# the compiled kernels attach to a namespace of their own: one dispatch key holds one kernel only,
# and float64 or a forced backend must be able to go past the compiled one
_compiled_library = torch.library.Library("vmtc_cpu", "DEF")

_C: ModuleType | None = None
_C_error = ""
_capability = torch.backends.cpu.get_cpu_capability()
if platform.machine() in ("x86_64", "AMD64") and _capability not in ("AVX2", "AVX512"):
    # compiled for AVX2: on a lesser processor even loading it could end the process
    _C_error = f"it needs AVX2, and ATen reports {_capability} for this processor"
else:
    try:
        _C = importlib.import_module("vmtc_kernels._C")
    except ImportError as error:
        _C_error = str(error)


# why a backend is not installed here at all, None if it is
_MISSING: dict[str, str | None] = {
    "cuda": "this version has no cuda kernels",
    "triton": "this version has no triton kernels",
    "cpu": f"the compiled module does not load: {_C_error}" if _C is None else None,
    "reference": None,
}


@dataclass
class Operator:
    """One operator: its implementations by backend, and what the dispatcher must know of them."""

    name: str
    check: Callable[..., None]
    implementations: dict[str, Callable[..., Any]] = field(default_factory=dict)


OPERATORS: dict[str, Operator] = {}


@dataclass(frozen=True)
class Explanation:
    """Which backend runs an operator on given arguments, and why each other one does not.

    ``backend`` is the name of the one that runs; ``reasons`` maps every other name to a sentence.
    """

    op: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, BACKENDS))
        lines = [f"{self.op}: {self.backend}"]
        lines += [f"  {name:<{width}}  {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


class BackendError(RuntimeError):
    """A backend was forced that cannot run the call; the message holds the reason."""


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    check: Callable[..., None],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register operator ``vmtc::name`` and return its overload.

    schema: arguments and results as torch schema text, without the name.
    check: raises on bad arguments; runs before any backend and before the fake.
    """
    op = OPERATORS[name] = Operator(name, check, {"reference": reference})

    _library.define(name + schema)
    if _C is not None:
        _compiled_library.define(name + schema)
        op.implementations["cpu"] = getattr(torch.ops.vmtc_cpu, name).default

    @_without_autocast
    def run(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return op.implementations[_choose(op, args, kwargs)](*args, **kwargs)

    def checked_fake(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vmtc::{name}", checked_fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"vmtc::{name}", _without_autocast(backward), setup_context=setup_context, lib=_library
        )
    return getattr(torch.ops.vmtc, name).default


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """function, computing in the types it chose also where autocast would lower them."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # bad arguments may hold no tensor; a backward formula has its context among them
        tensor = next((value for value in args if isinstance(value, torch.Tensor)), None)
        if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
            return function(*args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


# what use_backend forced, for the whole process; None is automatic
_forced: str | None = None


class use_backend:
    """Force every operator onto one backend: ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Takes effect at once and for the whole process; as a context manager it restores the former
    choice on exit. ``None`` returns to the automatic choice. Stronger than ``VMTC_BACKEND``.
    A call that the forced backend cannot run raises `BackendError` with the reason.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            _known(name, "use_backend")
        self._former, _forced = _forced, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._former


def available_backends() -> dict[str, str | None]:
    """Every backend with None if it is installed here, else the sentence that says why not."""
    return dict(_MISSING)


def explain(op: str | Any, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run ``op`` on these arguments, and why each other would not.

    op: an operator's name, public function or ``torch.ops.vmtc`` entry. The arguments are checked
    as in a call; nothing is computed.
    """
    text = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    name = text.removeprefix("vmtc::").removesuffix(".default")
    if name not in OPERATORS:
        raise ValueError(f"explain: op must be one of {sorted(OPERATORS)}, got {text!r}")
    operator = OPERATORS[name]
    operator.check(*args, **kwargs)
    chosen = _choose(operator, args, kwargs)
    forced = _forced_name()
    reasons = {}
    for backend in BACKENDS:
        if backend != chosen:
            refusal = _refusal(operator, backend, args, kwargs)
            passed_over = f"{forced} is forced" if forced else f"{chosen} comes first"
            reasons[backend] = refusal or f"can run, but {passed_over}"
    return Explanation(name, chosen, reasons)


def _choose(op: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    forced = _forced_name()
    if forced:
        refusal = _refusal(op, forced, args, kwargs)
        if refusal:
            raise BackendError(
                f"{op.name}: backend {forced!r} was forced but cannot run: {refusal}"
            )
        return forced
    return next(name for name in BACKENDS if not _refusal(op, name, args, kwargs))


def _forced_name() -> str | None:
    if _forced is not None:
        return _forced
    name = os.environ.get("VMTC_BACKEND")
    return _known(name, "VMTC_BACKEND") if name else None


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: backend must be one of {list(BACKENDS)}, got {name!r}")
    return name


def _refusal(
    op: Operator, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Why a backend cannot run this call, or None."""
    missing = _MISSING[backend]
    if missing or backend == "reference":
        return missing
    if backend not in op.implementations:
        return f"{op.name} has no {backend} kernel"
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                return f"the cpu kernel takes CPU tensors, got one on {value.device}"
            if value.dtype == torch.float64:
                return "the cpu kernel takes float32, float16 and bfloat16, got float64"
    return None
