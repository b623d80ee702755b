"""VMTC in the encoder of a model of vLLM: hooks that score, merge, and pass on fewer tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...config import VMTCConfig
from .._merging import Merged, merge_rows
from ._encoders import Encoder, Images


@dataclass
class Run:
    """One encoding: what its hooks keep for one another."""

    images: Images
    configs: list[VMTCConfig]
    kept: dict[str, Any] = field(default_factory=dict)  # of the layer that scores
    features: Tensor | None = None  # [R, Df], what is clustered if not the tokens themselves
    merged: list[tuple[VMTCConfig, list[Merged]]] = field(default_factory=list)
    rows: Tensor | None = None  # i64 [M], ascending: the row of each token that is left
    lead: tuple[int, ...] = ()  # of the projector's output, had nothing been merged

    def shown(self) -> list[Tensor]:
        """bool ``[R]`` of each image: the placeholders that stay."""
        if self.rows is None:
            raise RuntimeError(
                "vmtc: images were encoded without their projector, which this version of vLLM"
                " should not do"
            )
        stays = torch.zeros(self.images.size, dtype=torch.bool, device=self.rows.device)
        stays[self.rows] = True
        rows = self.images.rows.to(stays.device)
        shown = stays[rows.clamp(min=0)] | (rows < 0)
        return list(shown.split(self.images.splits))


class Vision:
    """Compression in one model's encoder. ``config``: what the engine was given; an encoding may
    keep other numbers of tokens."""

    def __init__(self, encoder: Encoder, config: VMTCConfig) -> None:
        self.encoder, self.config = encoder, config
        self.cls = encoder.has_cls and config.score_source != "received"
        self.run: Run | None = None
        depth = encoder.depth
        attention = getattr(encoder.layers[config.score_layer % depth], encoder.attention)
        self._around(attention, before=self._keep_attention)
        self._around(getattr(attention, encoder.qkv), after=self._keep_projection)
        if isinstance(config.feature_layer, int):
            self._around(encoder.layers[config.feature_layer % depth], after=self._keep_features)
        if isinstance(config.placement, int):
            self._around(encoder.layers[config.placement % depth], after=self._shorten)
        self._around(encoder.projector, before=self._enter, after=self._leave)

    @contextmanager
    def encoding(self, images: Images, configs: list[VMTCConfig]) -> Iterator[Run]:
        """Of these images, each with its settings, by whatever the model runs within."""
        self.run = run = Run(images, configs)
        try:
            yield run
        finally:
            self.run = None

    def _keep_attention(self, run: Run, module: Any, args: Any, kwargs: Any) -> Any:
        run.kept.update(attention=module, kwargs=kwargs)
        return args

    def _keep_projection(self, run: Run, output: Any) -> Any:
        run.kept["qkv"] = _first(output)
        return output

    def _keep_features(self, run: Run, output: Any) -> Any:
        run.features = self.encoder.tokens_of(_first(output)).flatten(1)
        return output

    # where tokens become fewer: x is [R, D] by the projector's rows, tokens [M, D] what is left

    def _merge(self, run: Run, x: Tensor) -> Tensor:
        features = x if run.features is None else run.features
        if self.config.feature_layer == "keys":
            features = self.encoder.keys(run.kept)
        scores = self.encoder.scores(self.config, run.kept, self.cls)
        run.kept.clear()  # a layer's queries and keys are large
        tokens, rows = [], []
        for config, layout in run.images.layouts(run.configs):
            part, left, merged = merge_rows(layout.to(x.device), config, x, scores, features)
            tokens.append(part)
            rows.append(left)
            run.merged.append((config, merged))
        run.rows, order = torch.cat(rows).sort()
        return torch.cat(tokens)[order]

    def _shorten(self, run: Run, output: Any) -> Any:
        states = _first(output)
        tokens = self._merge(run, self.encoder.tokens_of(states).flatten(1))
        run.features = None
        states = self.encoder.sequence(states, tokens)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _enter(self, run: Run, module: Any, args: Any, kwargs: Any) -> Any:
        x, size = args[0], run.images.size
        # a projector takes [images, tokens, D], or patches [tokens * patches, 1, D]
        apart = self.encoder.patches == 1
        run.lead = (len(x), size // len(x)) if apart else (size,)
        if self.config.placement == "after_projector" or run.rows is not None:
            return args
        tokens = self._merge(run, x.reshape(size, -1))
        shape = (1, -1, x.shape[-1]) if apart else (-1, *x.shape[1:])
        return (tokens.reshape(shape), *args[1:])

    def _leave(self, run: Run, output: Tensor) -> Tensor:
        if run.rows is None:
            tokens = self._merge(run, output.reshape(run.images.size, -1))
        else:
            tokens = output.reshape(len(run.rows), -1)
        assert run.rows is not None
        # at their rows again, zeros elsewhere, so that the model packs and splits as ever
        empty = tokens.new_zeros(run.images.size, tokens.shape[-1])
        spread = empty.index_copy(0, run.rows, tokens)
        return spread.reshape(*run.lead, -1)

    def _around(self, module: Any, before: Any = None, after: Any = None) -> None:
        """Around a module's forward within an encoding. The calls of modules that vLLM may
        compile pass by torch's hooks."""
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if (run := self.run) is None:
                return inner(*args, **kwargs)
            if before is not None:
                args = before(run, module, args, kwargs)
            output = inner(*args, **kwargs)
            return output if after is None else after(run, output)

        module.forward = forward


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
