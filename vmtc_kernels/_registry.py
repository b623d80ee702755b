"""Schemas, backends and the choice between them: the only file that loads kernels.

Every operator is one row of ``OPERATORS``. `define` registers its schema, its fake and its autograd
formula, and one kernel for all devices: check the arguments, choose a backend, call it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

# in the order in which the dispatcher tries them; of cuda and triton an operator may prefer either
BACKENDS = ("cuda", "triton", "cpu", "reference")
GPU = ("cuda", "triton")
LEAST_CAPABILITY = {"cuda": (7, 5), "triton": (8, 0)}

_library = torch.library.Library("vmtc", "DEF")
# the compiled kernels attach to namespaces of their own: one dispatch key holds one kernel only,
# and float64 or a forced backend must be able to go past the compiled one
_cpu_library = torch.library.Library("vmtc_cpu", "DEF")
_cuda_library = torch.library.Library("vmtc_cuda", "DEF")

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


# what _C was built with; in an emulated build the CUDA kernels run on CPU tensors, thread by thread
_build = "none" if _C is None else _C.build_info()["build"]
_emulated = _build == "emulated"
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"

_triton_error = ""
_triton_operators: set[str] = set()
try:
    _folder = importlib.import_module("vmtc_kernels.triton_kernels").__path__
    _triton_operators = {module.name for module in pkgutil.iter_modules(_folder)}
except ImportError as error:
    # a checkout that is not installed: the folder has another place there
    _triton_error = str(error)


@functools.cache
def _missing(backend: str) -> str | None:
    """Why a backend is not installed here at all, None if it is.

    Asked for at the first call: it looks for a GPU, which importing the package must not do.
    """
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_missing()
    if _C is None:
        return f"the compiled module does not load: {_C_error}"
    if backend == "cpu" or _emulated:
        return None
    if _build != "cuda":
        return f"the compiled module was built without CUDA (VMTC_BUILD={_build})"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _triton_missing() -> str | None:
    if _triton_error:
        return f"its kernels are not installed: {_triton_error}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 6):
        return f"it needs triton 3.6 or newer, found {version}"
    if _interpreted or torch.cuda.is_available():
        return None
    return "torch finds no CUDA device (with TRITON_INTERPRET=1 it runs on CPU tensors)"


@dataclass
class Operator:
    """One operator: its implementations by backend, and what the dispatcher must know of them."""

    name: str
    check: Callable[..., None]
    implementations: dict[str, Callable[..., Any]] = field(default_factory=dict)
    prefer: Callable[..., tuple[str, str]] | None = None
    refuse: Callable[..., str | None] | None = None
    # backends that failed to compile for this operator, and how
    broken: dict[str, str] = field(default_factory=dict)


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
    autograd: Callable[..., Any] | None = None,
    mutates: str | None = None,
    prefer: Callable[..., tuple[str, str]] | None = None,
    refuse: Callable[..., str | None] | None = None,
) -> Any:
    """Register operator ``vmtc::name`` and return its overload.

    schema: arguments and results as torch schema text, without the name.
    setup_context, backward: the formula of the gradient, of an operator that mutates nothing.
    autograd: what to call instead where a gradient may be asked for; with neither, the results are
        constants to autograd.
    mutates: the argument that is written.
    check: raises on bad arguments; runs before any backend and before the fake.
    prefer: (compute capability, *arguments) -> which of cuda and triton goes first, and why.
    refuse: (backend, *arguments) -> why its kernel cannot take them, or None.
    """
    op = OPERATORS[name] = Operator(name, check, {"reference": reference}, prefer, refuse)

    _library.define(name + schema)
    if torch._C._dispatch_has_kernel(f"vmtc_cpu::{name}"):
        _cpu_library.define(name + schema)
        op.implementations["cpu"] = getattr(torch.ops.vmtc_cpu, name).default
    if torch._C._dispatch_has_kernel(f"vmtc_cuda::{name}"):
        _cuda_library.define(name + schema.replace(") ->", ", *, int stream=0) ->", 1))
        op.implementations["cuda"] = functools.partial(
            _on_current_stream, getattr(torch.ops.vmtc_cuda, name).default
        )
    if name in _triton_operators:
        op.implementations["triton"] = functools.partial(_call_triton, name)

    overload = getattr(torch.ops.vmtc, name).default
    written = [a.name for a in overload._schema.arguments].index(mutates) if mutates else None

    @_without_autocast
    def run(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        if written is not None and len(args) > written and args[written] is not None:
            torch.autograd.graph.increment_version(args[written])
        backend = _choose(op, args, kwargs)
        try:
            return op.implementations[backend](*args, **kwargs)
        except Exception as error:
            if backend != "triton" or not _failed_to_compile(error):
                raise
            op.broken["triton"] = f"its kernel does not compile: {_first_line(error)}"
            # the next backend; raises where triton was forced
            backend = _choose(op, args, kwargs)
        return op.implementations[backend](*args, **kwargs)

    def checked_fake(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vmtc::{name}", checked_fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"vmtc::{name}", _without_autocast(backward), setup_context=setup_context, lib=_library
        )
    else:
        _library.impl(name, _constant_or(autograd, overload), "Autograd", with_keyset=True)
    return overload


def _constant_or(autograd: Callable[..., Any] | None, overload: Any) -> Callable[..., Any]:
    """The kernel of the Autograd key: ``autograd`` where a gradient may be asked for."""

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            autograd is not None
            and torch.is_grad_enabled()
            and any(isinstance(value, torch.Tensor) and value.requires_grad for value in args)
        ):
            return autograd(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    return kernel


def _on_current_stream(overload: Any, *args: Any, **kwargs: Any) -> Any:
    device = next(value for value in args if isinstance(value, torch.Tensor)).device
    stream = 0 if _emulated else torch.cuda.current_stream(device).cuda_stream
    return overload(*args, stream=stream, **kwargs)


def _call_triton(name: str, *args: Any, **kwargs: Any) -> Any:
    # imported when first called: importing triton takes a second
    module = importlib.import_module(f"vmtc_kernels.triton_kernels.{name}")
    return getattr(module, name)(*args, **kwargs)


def _failed_to_compile(error: Exception) -> bool:
    """Errors of triton's own; of its passes and of a missing C compiler it says RuntimeError."""
    of_triton = type(error).__module__.partition(".")[0] == "triton"
    interpreted = type(error).__name__ == "InterpreterError"
    said = ("PassManager::run failed", "Failed to find C compiler")
    return (of_triton and not interpreted) or any(text in str(error) for text in said)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


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
    return {name: _missing(name) for name in BACKENDS}


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
    order, why = _order(operator, args, kwargs)
    reasons = {}
    for backend in order:
        if backend != chosen:
            refusal = _refusal(operator, backend, args, kwargs)
            passed_over = f"{forced} is forced" if forced else f"{chosen} comes first"
            if not forced and backend in GPU and chosen in GPU and why:
                passed_over += f": {why}"
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
    order, _ = _order(op, args, kwargs)
    return next(name for name in order if not _refusal(op, name, args, kwargs))


def _order(op: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[str], str]:
    """The backends in the order in which this call tries them, and why cuda or triton is first."""
    capability = _capability_of(args, kwargs)
    if capability is None:
        # an interpreter or emulator is there to be asked for by name
        return sorted(BACKENDS, key=lambda name: name in GPU and (_interpreted or _emulated)), ""
    if op.prefer is None:
        return list(BACKENDS), ""
    first, why = op.prefer(capability, *args, **kwargs)
    return sorted(BACKENDS, key=lambda name: name != first), why


def _forced_name() -> str | None:
    if _forced is not None:
        return _forced
    name = os.environ.get("VMTC_BACKEND")
    return _known(name, "VMTC_BACKEND") if name else None


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: backend must be one of {list(BACKENDS)}, got {name!r}")
    return name


def _capability_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Compute capability of the GPU that holds the tensors, None where they are elsewhere."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.device.type == "cuda":
            return torch.cuda.get_device_capability(value.device)
    return None


def _refusal(
    op: Operator, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Why a backend cannot run this call, or None."""
    missing = _missing(backend)
    if missing or backend == "reference":
        return missing
    if backend not in op.implementations:
        return f"{op.name} has no {backend} kernel"
    if backend in op.broken:
        return op.broken[backend]
    on_cpu = {"cpu": True, "triton": _interpreted, "cuda": _emulated}[backend]
    wanted = "cpu" if on_cpu else "cuda"
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            if value.device.type != wanted:
                return (
                    f"the {backend} kernel takes {wanted.upper()} tensors, got one on"
                    f" {value.device}"
                )
            if value.dtype == torch.float64:
                return f"the {backend} kernel takes float32, float16 and bfloat16, got float64"
    capability = _capability_of(args, kwargs)
    least = LEAST_CAPABILITY.get(backend)
    if capability and least and capability < least:
        return (
            f"the {backend} kernel needs compute capability {least[0]}.{least[1]},"
            f" this GPU has {capability[0]}.{capability[1]}"
        )
    return op.refuse(backend, *args, **kwargs) if op.refuse else None
