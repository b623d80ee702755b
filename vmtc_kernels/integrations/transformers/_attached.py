"""What `attach` puts into a model."""

from __future__ import annotations

from typing import Any, NoReturn


class Attached:
    """A part that belongs to one model, and would in a copy of it still work on the first."""

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError(
            "a model with a handle, or a part of it, cannot be copied (adapters with"
            " modules_to_save do that): call detach first, then attach to the complete model"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model with a handle cannot be pickled: call detach first")
