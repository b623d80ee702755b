"""VMTC in the vision part of a model: hooks that score, merge and pass on fewer tokens."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._layout import Layout, Reduction
from .._merging import Merged, merge_alike, merge_rows
from ._attached import Attached
from ._checks import (
    check_gradients,
    check_placement,
    check_rerun,
    layer_of,
    scores_by_cls,
)
from ._families import Family


@dataclass
class Run:
    """One encoding: what its hooks keep for one another."""

    layout: Layout
    kept: dict[str, Any] = field(default_factory=dict)  # of the layer that scores
    features: Tensor | None = None  # [R, Df], what is clustered if not the tokens themselves
    merged: list[Merged] = field(default_factory=list)
    rows: Tensor | None = None  # i64 [M], ascending: the row of each token that is left
    lead: tuple[int, ...] = ()  # of the projector's output, had nothing been merged


class Vision(Attached):
    """Compression of a model's images, from `attach` until `detach`.

    `encoded` is told of each encoding: its modality and its `Run`.
    """

    def __init__(self, family: Family, config: Reduction, encoded: Any) -> None:
        self.family, self.encoded = family, encoded
        self.config: Any = config  # VMTCConfig, unless a subclass has another
        self.local = threading.local()  # several threads may encode at a time
        self.hooks: list[Any] = []
        self.originals: dict[str, Any] = {}
        self.path: list[str] = []  # modules of the encoder that must not be compiled by themselves
        self._watch_encoder()
        self._pre_hook(family.projector, self._enter)
        self._hook(family.projector, self._leave)
        for other in family.side_projectors:
            self._hook(other, self._leave_aside)
        for modality, name in family.methods.items():
            self._wrap(modality, name)

    def _watch_encoder(self) -> None:
        """Hooks for scores and features, and where tokens are merged inside the encoder."""
        family, config = self.family, self.config
        self.cls = scores_by_cls(family, config)
        depth = len(family.layers)
        self.score_layer = layer_of("score_layer", config.score_layer, depth)

        # all that may be refused comes before the first hook
        features = config.feature_layer
        if isinstance(features, int):
            features = layer_of("feature_layer", features, depth)
        placement = config.placement
        if isinstance(placement, int):
            placement = layer_of("placement", placement, depth)
            last = features if isinstance(features, int) else self.score_layer
            check_placement(family, placement, max(last, self.score_layer))

        attention = getattr(family.layers[self.score_layer], family.attention)
        # the encoder's modules around that layer
        inner = next(name for name, m in family.core.named_modules() if m is attention)
        self.path = [inner[:i] for i, letter in enumerate(inner + ".") if letter == "."]
        self._watch(attention)
        if isinstance(features, int):
            self._hook(family.layers[features], self._keep_features)
        if isinstance(placement, int):
            self._hook(family.layers[placement], self._shorten)
            for later in family.layers[placement + 1 :]:
                self._pre_hook(later, self._continue, with_kwargs=True)
            if family.regrouped is not None:
                self._pre_hook(family.regrouped, self._regroup)

    @property
    def run(self) -> Run | None:
        return getattr(self.local, "run", None)

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for name in self.originals:
            delattr(self.family.core, name)

    def _hook(self, module: Any, hook: Any) -> None:
        self.hooks.append(module.register_forward_hook(hook))

    def _pre_hook(self, module: Any, hook: Any, **options: Any) -> None:
        self.hooks.append(module.register_forward_pre_hook(hook, **options))

    def _wrap(self, modality: str, name: str) -> None:
        original = getattr(self.family.core, name)
        signature = inspect.signature(original)

        # compiled code does not see that of layers of the same class one has hooks
        @torch.compiler.disable
        def encode(*args: Any, **kwargs: Any) -> Any:
            if self.run is not None:  # one method calls another
                return original(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            self._check_call(given)
            # arguments by the names that a processor gives them
            images, grid = given.get("pixel_values"), given.get("image_grid_thw")
            inputs = {f"{modality}_grid_thw": grid, **given, "pixel_values": images}
            self.local.run = run = Run(self.family.layout(modality, inputs))
            as_dict = kwargs.pop("return_dict", None)
            try:
                output = original(*args, **kwargs, return_dict=True)
                self._select(run, output)
            finally:
                self.local.run = None
            self.encoded(modality, run, output)
            return output.to_tuple() if as_dict is False else output

        self.originals[name] = original
        setattr(self.family.core, name, functools.wraps(original)(encode))

    def _check_call(self, given: Mapping[str, Any]) -> None:
        for name in self.path:
            module = self.family.core.get_submodule(name)
            if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
                raise NotImplementedError(
                    f"{name} was compiled by itself, which leaves out hooks: compile the model or"
                    " its language model instead"
                )
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            own = getattr(self.family.model.config, name, None)
            if given.get(name) not in (None, own):
                raise ValueError(
                    f"{name}={given[name]} is not what the model had when it was attached, {own}:"
                    " set it in the model's configuration before attach"
                )
        check_rerun(self.family, self.config)

    # what the hooks keep

    def _watch(self, attention: Any) -> None:
        def keep(name: str) -> Any:
            def hook(module: Any, args: Any, output: Tensor) -> None:
                if self.run is not None:
                    self.run.kept[name] = output

            return hook

        projections = {name: getattr(attention, name) for name in self.family.projections}
        for name, module in projections.items():
            self._hook(module, keep(name))

        def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if self.run is None:
                return
            for name, watched in projections.items():
                if getattr(module, name) is not watched:
                    raise RuntimeError(
                        f"{name} of the vision layer that scores was replaced after attach (by an"
                        " adapter, for example): attach to the model when it is complete"
                    )
            self.run.kept.update(attention=module, kwargs=kwargs)

        self._pre_hook(attention, enter, with_kwargs=True)

    def _keep_features(self, module: Any, args: Any, output: Any) -> None:
        if self.run is not None:
            self.run.features = self.family.tokens_of(_states(output)).flatten(1)

    # where tokens become fewer: x is [R, D] by the projector's rows, tokens [M, D] what is left

    def _merge(self, run: Run, x: Tensor) -> Tensor:
        run.layout = layout = run.layout.to(x.device)
        features = x if run.features is None else run.features
        if self.config.feature_layer == "keys":
            features = self.family.keys(run.kept)
        scores = self.family.scores(self.config, run.kept, self.cls)
        check_gradients(run.kept, x)
        run.kept.clear()  # a layer's queries and keys are large
        tokens, run.rows, run.merged = merge_rows(layout, self.config, x, scores, features)
        return tokens

    def _spread(self, run: Run, tokens: Tensor) -> Tensor:
        """``[R, D]``: the tokens at their rows, zeros elsewhere."""
        assert run.rows is not None
        empty = tokens.new_zeros(run.layout.size, tokens.shape[-1])
        return empty.index_copy(0, run.rows, tokens)

    def _shorten(self, module: Any, args: Any, output: Any) -> Any:
        if (run := self.run) is None:
            return None
        states = _states(output)
        tokens = self._merge(run, self.family.tokens_of(states).flatten(1))
        run.features = None
        states = self.family.sequence(states, tokens)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _continue(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if (run := self.run) is None:
            return None
        assert run.rows is not None
        return self.family.shortened(run.rows, args, kwargs)

    def _regroup(self, module: Any, args: tuple[Any, ...]) -> Any:
        if (run := self.run) is None:
            return None
        assert run.rows is not None
        tokens = args[0].reshape(len(run.rows), -1)
        return (self.family.grid_of(self._spread(run, tokens)), *args[1:])

    def _enter(self, module: Any, args: tuple[Any, ...]) -> Any:
        if (run := self.run) is None:
            return None
        x, size = args[0], run.layout.size
        # one projector takes [images, tokens, D], another [patches, D]
        run.lead = (len(x), -1) if x.dim() == 3 else (size,)
        if self.config.placement == "after_projector":
            return None
        if run.rows is None:
            tokens = self._merge(run, x.reshape(size, -1))
        elif self.family.regrouped is not None:
            tokens = x.reshape(size, -1)[run.rows]
        else:
            return None
        return (tokens.reshape(*[1] * (x.dim() - 2), -1, x.shape[-1]), *args[1:])

    def _leave(self, module: Any, args: Any, output: Tensor) -> Any:
        if (run := self.run) is None:
            return None
        if run.rows is None:
            tokens = self._merge(run, output.reshape(run.layout.size, -1))
        else:
            tokens = output.reshape(len(run.rows), -1)
        return self._spread(run, tokens).reshape(*run.lead, output.shape[-1])

    def _leave_aside(self, module: Any, args: Any, output: Tensor) -> Any:
        """Another projector: of tokens that are merged already or will be, when owners are known"""
        if (run := self.run) is None or len(output) == run.layout.size:
            return None
        return self._spread(run, output)

    def _select(self, run: Run, output: Any) -> None:
        """Leave the tokens that are shown in what the model's method returns."""
        if run.rows is None:
            raise RuntimeError(
                f"{self.family.model_type} encoded images without its projector: this version of"
                " transformers is not supported"
            )
        stays = torch.zeros(run.layout.size, dtype=torch.bool, device=run.layout.rows.device)
        stays[run.rows] = True
        shown = run.layout.shown(stays)
        output.pooler_output = _choose(output.pooler_output, shown)
        # features of earlier layers, where there are any, of layers before the merge as they were
        for i, aside in enumerate(getattr(output, "deepstack_features", None) or ()):
            whole = aside if isinstance(aside, Tensor) else torch.cat(list(aside))
            if not self.family.merged_aside(i, self.config):
                rows = run.layout.rows
                whole = merge_alike(run.merged, self.config, whole[rows.argsort()])[rows]
            if isinstance(aside, Tensor):
                output.deepstack_features[i] = whole[shown]
            else:
                images = whole.split([len(image) for image in aside])
                output.deepstack_features[i] = _choose(images, shown)


def _choose(images: Any, shown: Tensor) -> Any:
    """Of features of all placeholders, image by image, those that are shown."""
    if isinstance(images, Tensor):  # [images, tokens, D], which all lose as many
        return images.flatten(0, -2)[shown].unflatten(0, (len(images), -1))
    sizes = [image.numel() // image.shape[-1] for image in images]
    parts = [
        image.reshape(-1, image.shape[-1])[part]
        for image, part in zip(images, shown.split(sizes), strict=True)
    ]
    return type(images)(parts)


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
