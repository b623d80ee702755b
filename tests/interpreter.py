"""Makes Triton's interpreter usable for whole test lists."""

from __future__ import annotations

from typing import Any

import numpy as np


def patch_language_once() -> None:
    """Spare every call of a function inside a kernel a new patch of the whole language.

    The interpreter patches triton.language when a kernel starts, and again in each function that
    the kernel calls, `tl.sum` among them, a millisecond each. Those of the standard library need it
    once, since that patch is never taken back.
    """
    from triton.runtime import interpreter

    done: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self.fn.__globals__
        if "tl" not in names and id(names) not in done:
            interpreter._patch_lang(self.fn)
            done.add(id(names))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call


def sort_by_numpy() -> None:
    """Spare tl.sort its network of exchanges, each a loop over elements in the interpreter."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def sort(x: tl.tensor) -> tl.tensor:
        return tl.tensor(TensorHandle(np.sort(x.handle.data), x.handle.dtype), x.type)

    tl.sort = sort
