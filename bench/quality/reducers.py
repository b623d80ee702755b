"""Token reducers of the laboratory: each is put into the model, and is gone afterwards.

A row of a batch is ``<s>``, one image and text, without padding. What reduces before the projector
is a plain function as well, for training with it in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vmtc_kernels import CMAIConfig, VMTCConfig, select_random, select_strided, spatial_downsample
from vmtc_kernels.integrations.transformers import attach

from .. import merging
from ..llava_rivals import attention_row
from . import fastv
from .model import GRID

TOKENS = GRID**2  # of an image, none taken away


class Seen(NamedTuple):
    """x: ``[B, N, D]``, what the projector gets; scores: f32 ``[B, N]`` and keys: ``[B, N, d]``,
    which `Reducer.reduce` takes beside it, None if it needs none; output: the encoder's."""

    x: Tensor
    scores: Tensor | None
    keys: Tensor | None
    output: Any


@dataclass(frozen=True, kw_only=True)
class Reducer:
    """A way to fewer visual tokens, CMAI on top if ``cmai`` is given; ``name`` is for tables."""

    name: str
    cmai: CMAIConfig | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All of them, as JSON takes it."""
        return asdict(self)

    def counts(self, tokens: int) -> int:
        """How many ``<image>`` a prompt has at a budget of ``tokens``; 0 if it cannot be met."""
        return tokens if 0 < tokens <= TOKENS else 0

    def mean_tokens(self, tokens: int, layers: int = 6) -> float:
        """Visual tokens that one of the language model's ``layers`` sees, their mean."""
        return float(self.counts(tokens))

    @contextmanager
    def on(self, model: Any, processor: Any, tokens: int, seed: int = 0) -> Iterator[None]:
        """Inside, images are reduced to ``tokens``; afterwards the model is as before, bit for bit.

        Args:
            model, processor: a LLaVA of ``TOKENS`` visual tokens and what belongs to it.
            tokens: the budget; a prompt has `counts` of it for placeholders.
            seed: of what is drawn at random, the same places in every image.

        Raises:
            ValueError: a budget that the reducer cannot meet, or what `attach` refuses.
        """
        self._check(tokens)
        with ExitStack() as stack:
            self._enter(model, stack, tokens, seed)
            options = self._attached(tokens)
            if self.cmai is not None:
                options["cmai"] = self.cmai
            if options:
                stack.enter_context(attach(model, processor, **options))
            yield

    def see(self, model: Any, pixels: Tensor) -> Seen:
        """Run the encoder on pixels f32 ``[B, 3, H, W]``, in training too."""
        with ExitStack() as stack:
            kept = self._watch(model, stack)
            output = model.model.vision_tower(pixels, output_hidden_states=True, return_dict=True)
        x = output.hidden_states[model.config.vision_feature_layer][:, 1:]
        return Seen(x, *self._read(kept, x), output)

    def reduce(
        self, x: Tensor, scores: Tensor | None, keys: Tensor | None, tokens: int, seed: int = 0
    ) -> Tensor:
        """``[B, tokens, D]`` of what `see` gave, bit for bit as in the model.

        CMAI is no part of it. Differentiable in x, and in scores that are weights, the choice of
        tokens held fixed. Raises ValueError for a budget that cannot be met, and where tokens are
        not reduced right before the projector.
        """
        self._check(tokens)
        if self.counts(tokens) == x.shape[1]:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return self._reduce(x, scores, keys, tokens, seed)

    def _read(self, kept: _Watch | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        # a cast to fewer digits would make scores and similarities tie
        with torch.autocast(x.device.type, enabled=False):
            return self._signals(kept)

    def _check(self, tokens: int) -> None:
        if not self.counts(tokens):
            raise ValueError(f"{self.name} cannot reduce {TOKENS} tokens to {tokens}")

    # what reducers differ in

    def _attached(self, tokens: int) -> dict[str, Any]:
        """What `attach` is to do."""
        return {}

    def _enter(self, model: Any, stack: ExitStack, tokens: int, seed: int) -> None:
        """Change the model, and put on the stack what undoes it."""

    def _watch(self, model: Any, stack: ExitStack) -> _Watch | None:
        return None

    def _signals(self, kept: _Watch | None) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    def _reduce(self, x: Tensor, scores: Any, keys: Any, tokens: int, seed: int) -> Tensor:
        raise NotImplementedError


class _Watch:
    """Queries and keys of one layer of the encoder, and what another gives, as it runs."""

    def __init__(self, model: Any, stack: ExitStack, layer: int, other: int | None = None) -> None:
        tower = model.model.vision_tower
        layers = next(m for m in tower.modules() if isinstance(m, nn.ModuleList))
        self.heads = model.config.vision_config.num_attention_heads
        self.kept: dict[str, Tensor] = {}
        watched = {name: getattr(layers[layer].self_attn, name) for name in ("q_proj", "k_proj")}
        if other is not None:
            watched["other"] = layers[other]
        for name, module in watched.items():
            stack.callback(module.register_forward_hook(self._keep(name)).remove)

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.kept[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def pop(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """q, k: ``[B, H, 1 + N, d]``; the other layer's output ``[B, 1 + N, D]``."""
        q, k = (
            self.kept.pop(name).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj")
        )
        return q, k, self.kept.pop("other", None)


@dataclass(frozen=True, kw_only=True)
class Whole(Reducer):
    """All tokens."""

    def counts(self, tokens: int) -> int:
        return TOKENS if tokens == TOKENS else 0

    def _reduce(self, x: Tensor, scores: Any, keys: Any, tokens: int, seed: int) -> Tensor:
        return x


@dataclass(frozen=True, kw_only=True)
class Downsampling(Reducer):
    """Averages of square cells: of budgets those that a factor meets, or misses by a tenth at most
    (36 and 16 of 144; 16 for 17 too)."""

    def counts(self, tokens: int) -> int:
        count = self._cells(self._factor(tokens)) if super().counts(tokens) else 0
        return count if count >= 0.9 * tokens else 0

    @staticmethod
    def _cells(factor: int) -> int:
        return (-(-GRID // factor)) ** 2

    def _factor(self, tokens: int) -> int:
        return next(f for f in range(1, GRID + 1) if self._cells(f) <= tokens)

    def _attached(self, tokens: int) -> dict[str, Any]:
        factor = self._factor(tokens)
        return {"downsample": factor} if factor > 1 else {}

    def _reduce(self, x: Tensor, scores: Any, keys: Any, tokens: int, seed: int) -> Tensor:
        return spatial_downsample(x, (GRID, GRID), self._factor(tokens))


@dataclass(frozen=True, kw_only=True)
class VMTC(Reducer):
    """Ours: a ``share`` of the budget is merged tokens, the rest primary ones; the others are
    settings of `VMTCConfig`, written down here as its defaults follow from what is measured."""

    share: float = 0.5
    metric: str = "cosine"
    weighting: str = "score"
    iterations: int = 10
    score_layer: int = -2
    feature_layer: int | Literal["keys"] | None = None
    head_reduction: str = "mean"
    placement: int | str = "before_projector"

    def config(self, tokens: int) -> VMTCConfig:
        """At a budget."""
        merged = round(self.share * tokens)
        return VMTCConfig(
            num_primary=tokens - merged,
            num_merged=merged,
            metric=self.metric,
            weighting=self.weighting,
            iterations=self.iterations,
            score_layer=self.score_layer,
            feature_layer=self.feature_layer,
            head_reduction=self.head_reduction,
            placement=self.placement,
        )

    def _attached(self, tokens: int) -> dict[str, Any]:
        return {"vmtc": self.config(tokens)}

    def _watch(self, model: Any, stack: ExitStack) -> _Watch:
        other = self.feature_layer if isinstance(self.feature_layer, int) else None
        return _Watch(model, stack, self.score_layer, other)

    def _signals(self, kept: Any) -> tuple[Tensor, Tensor | None]:
        q, k, features = kept.pop()
        if self.feature_layer == "keys":
            features = k.transpose(1, 2).flatten(2)
        scores = self.config(TOKENS).importance(q, k)[:, 1:]
        return scores, None if features is None else features[:, 1:]

    def _reduce(self, x: Tensor, scores: Any, keys: Any, tokens: int, seed: int) -> Tensor:
        if self.placement != "before_projector":
            raise ValueError(f"{self.name}: placement {self.placement!r} is inside the model")
        few = self.config(tokens).merge(x, scores, features=keys)
        # in the order of their members of highest score, the first of equals
        order = scores.argsort(dim=1, descending=True, stable=True)
        ranks = torch.full((len(x), tokens + 1), x.shape[1], device=x.device)
        slot = torch.where(few.owner < 0, tokens, few.owner.long())  # one more for those dropped
        ranks = ranks.scatter_reduce(1, slot, order.argsort(1), "amin")[:, :tokens]
        index = order.gather(1, ranks).argsort(1)[..., None]
        return few.tokens.gather(1, index.expand(-1, -1, x.shape[2]))


@dataclass(frozen=True, kw_only=True)
class Hooked(Reducer):
    """What reduces in a hook on the projector."""

    def _enter(self, model: Any, stack: ExitStack, tokens: int, seed: int) -> None:
        kept = self._watch(model, stack)

        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = args
            return (self.reduce(x, *self._read(kept, x), tokens, seed),)

        projector = model.model.multi_modal_projector
        stack.callback(projector.register_forward_pre_hook(hook).remove)


@dataclass(frozen=True, kw_only=True)
class Random(Hooked):
    """Drawn by the seed, in their order."""

    def _reduce(self, x: Tensor, scores: Any, keys: Any, tokens: int, seed: int) -> Tensor:
        return select_random(x, tokens, seed=seed).tokens


@dataclass(frozen=True, kw_only=True)
class Strided(Hooked):
    """At even strides, in their order."""

    def _reduce(self, x: Tensor, scores: Any, keys: Any, tokens: int, seed: int) -> Tensor:
        return select_strided(x, tokens).tokens


@dataclass(frozen=True, kw_only=True)
class Rival(Hooked):
    """ToMe, VisionZip or PruMerge, by the name that it has in `merging`; scores and keys are those
    of the layer whose output LLaVA reads, the mean over heads."""

    method: str
    _METHODS: ClassVar[dict[str, merging.Reduction]] = {r.name: r for r in merging.REDUCTIONS}

    def __post_init__(self) -> None:
        if self.method not in self._METHODS:
            raise ValueError(f"method must be of {', '.join(self._METHODS)}, got {self.method!r}")

    def _watch(self, model: Any, stack: ExitStack) -> _Watch:
        # hidden state i is what layer i - 1 gives, from the end as from the start
        index = model.config.vision_feature_layer
        return _Watch(model, stack, index if index < 0 else index - 1)

    def _signals(self, kept: Any) -> tuple[Tensor, Tensor]:
        q, k, _ = kept.pop()
        scores = attention_row(q[:, :, :1], k, q.shape[3] ** -0.5)[:, 1:]
        return scores, k[:, :, 1:].float().mean(1)

    def _reduce(self, x: Tensor, scores: Any, keys: Any, tokens: int, seed: int) -> Tensor:
        return self._METHODS[self.method].reduce(x, scores, keys, tokens)


@dataclass(frozen=True, kw_only=True)
class FastV(Reducer):
    """All tokens in the first layers of the language model, ``tokens`` from there on: see
    `fastv.prune`. Its budget is that of the later layers; `mean_tokens` counts all."""

    def __post_init__(self) -> None:
        if self.cmai is not None:
            raise ValueError("FastV drops tokens of which CMAI keeps account: use one of them")

    def counts(self, tokens: int) -> int:
        return TOKENS if super().counts(tokens) else 0

    def mean_tokens(self, tokens: int, layers: int = 6) -> float:
        return (fastv.LAYER * TOKENS + (layers - fastv.LAYER) * tokens) / layers

    def _enter(self, model: Any, stack: ExitStack, tokens: int, seed: int) -> None:
        fastv.prune(model, tokens, stack)

    def reduce(
        self, x: Tensor, scores: Tensor | None, keys: Tensor | None, tokens: int, seed: int = 0
    ) -> Tensor:
        raise ValueError(f"{self.name} drops tokens inside the language model")


# of the settings that each has unless told otherwise
NAMED: dict[str, Callable[..., Reducer]] = {
    "none": partial(Whole, name="none"),
    "downsampling": partial(Downsampling, name="downsampling"),
    "random": partial(Random, name="random"),
    "strided": partial(Strided, name="strided"),
    "VMTC": partial(VMTC, name="VMTC"),
    **{r.name: partial(Rival, name=r.name, method=r.name) for r in merging.REDUCTIONS},
    "FastV": partial(FastV, name="FastV"),
}
