"""CMAI as an attention implementation, with a state that lives in the cache of keys and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.continuous_batching import PagedAttentionCache

from ...config import CMAIConfig
from ...focus_attention import FocusAttention
from ._attached import Attached
from ._families import Family
from ._paged import IMAGE, TEXT, PagedFocus, Step

# transformers has one table of attention functions for the whole process; parts of some names,
# "sdpa" for one, mean something to it
KEY = "vmtc_focus"


class State:
    """What CMAI has to know of the tokens in a cache: one more layer, without keys and values.

    As a layer it goes where the cache goes: it is reordered, expanded and selected with it. What
    lies beyond the cache's length, after a crop for example, no token sees before it is written.

    ``modality``: u8 ``[B, P]``, P positions at least as many as there are keys; ``text_image``:
    of each layer that inhibits, f32 ``[B, M, P, I]``, once there is an image.
    """

    # what transformers asks of any layer of a cache
    keys = values = None
    supports_early_init = is_sliding = False
    is_initialized = is_compileable = is_croppable = True

    def __init__(self, modality: Tensor) -> None:
        self.modality = modality
        self.text_image: dict[int, Tensor] = {}
        self.num_image = 0

    @property
    def batch_size(self) -> int:
        return len(self.modality)

    def get_max_length(self) -> int:
        return -1  # no limit

    def reset(self) -> None: ...

    def crop(self, tokens_to_remove: int) -> None: ...

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices.to(x.device)])

    def _each(self, change: Any) -> None:
        with torch.inference_mode(False):
            self.modality = change(self.modality)
            self.text_image = {layer: change(x) for layer, x in self.text_image.items()}

    def reserve(self, positions: int, num_image: int) -> None:
        """Room for as many positions and image tokens."""
        self.num_image = max(self.num_image, num_image)
        more = max(positions - self.modality.shape[1], 0)
        grow = {layer: self.num_image - x.shape[3] for layer, x in self.text_image.items()}
        if not more and not any(grow.values()):
            return
        with torch.inference_mode(False):
            self.modality = pad(self.modality, (0, more))
            for layer, x in self.text_image.items():
                self.text_image[layer] = pad(x, (0, grow[layer], 0, more))


class Pass(NamedTuple):
    """One pass of the language model: positions, i32 ``[B, Lq]``, are those of its tokens; keeps:
    whether there may be another pass that goes on from it."""

    state: State
    positions: Tensor
    keeps: bool


class Focus(Attached):
    """Inhibition in a model's language model, from `attach` until `detach`."""

    def __init__(
        self, family: Family, config: CMAIConfig, recorded: dict[int, FocusAttention] | None
    ) -> None:
        self.family, self.config, self.recorded = family, config, recorded
        text = family.text.config
        self.implementation = _check(family)
        layers = text.num_hidden_layers
        self.layers = [i for i in range(layers) if config.applies(i, layers)]
        _register()
        family.model.set_attn_implementation({"text_config": KEY})
        self.attentions = [layer.self_attn for layer in family.text.layers]
        for index in self.layers:
            self.attentions[index].vmtc_focus = self
        self.paged = PagedFocus(family, config, self.layers, KEY, recorded is not None)
        self.hooks = [
            family.core.register_forward_pre_hook(self._see, with_kwargs=True),
            family.text.register_forward_pre_hook(self._begin, with_kwargs=True),
            family.text.register_forward_hook(self._end, with_kwargs=True),
        ]

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for index in self.layers:
            del self.attentions[index].vmtc_focus
        self.family.model.set_attn_implementation({"text_config": self.implementation})

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the model's inputs to its language model, which gets all keywords but these."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError(
                "CMAI needs input_ids, which say what is an image: pass these, not inputs_embeds"
            )
        return args, {**kwargs, KEY: (ids, kwargs.get("attention_mask"))}

    def _begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Note who the new tokens are, before the first layer runs."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        paged = isinstance(cache, PagedAttentionCache)
        self.paged.hold(module.config._attn_implementation, paged)
        if module.config._attn_implementation != KEY:
            raise RuntimeError(
                "CMAI was attached, but the attention implementation is now"
                f" {module.config._attn_implementation!r}: call detach, then attach again"
            )
        if KEY not in kwargs:
            raise RuntimeError("CMAI needs a pass of the whole model, not of its language model")
        ids, mask = kwargs[KEY]
        if isinstance(mask, dict):  # of each kind of layer, of which there is one
            mask = mask["full_attention"]
        if paged:
            return args, {**kwargs, KEY: self.paged.begin(cache, ids, kwargs)}
        _check_not_packed(mask, cache, kwargs.get("position_ids"))
        past = 0 if cache is None else cache.get_seq_length()
        place = torch.arange(ids.shape[1], device=ids.device) + past
        modality = torch.full_like(ids, TEXT, dtype=torch.uint8)
        if ids.shape[1] > 1:
            for token in self.family.tokens.values():
                modality.masked_fill_(ids == token, IMAGE)
            modality *= _real(mask, place)

        state = _state_of(cache)
        if state is None:
            _check_cache(cache, past)
            # a cache that is filled in inference mode may go on outside of it
            with torch.inference_mode(False):
                state = State(torch.zeros(len(ids), 0, dtype=torch.uint8, device=ids.device))
        keeps = kwargs.get("use_cache") is not False
        room = cache.get_max_length() if cache is not None and cache.layers else -1
        if room < 0:
            room = ids.shape[1] + past
            if room > state.modality.shape[1] and keeps:
                room += room // 4 + 64  # not anew for each token
        state.reserve(room, 0)
        state.modality.scatter_(1, place.expand_as(ids), modality)
        if ids.shape[1] > 1:
            # what lies beyond, after a crop for example, is of no token
            inside = torch.arange(state.modality.shape[1], device=ids.device) <= place[-1]
            images = ((state.modality == IMAGE) & inside).sum(1)
            state.reserve(0, int(images.max()) if len(images) else 0)
            _check_causal(mask, state.modality, place)
        if self.recorded is not None:
            self.recorded.clear()
        # keywords that the language model does not know go through to its attention
        passing = Pass(state, place.to(torch.int32).expand_as(ids), keeps)
        return args, {**kwargs, KEY: passing}

    def _end(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = getattr(output, "cache", None)
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        passing = kwargs[KEY]
        if isinstance(passing, Step):
            passing.focus.end(passing)
        elif cache is not None and _state_of(cache) is None:
            cache.layers.append(passing.state)

    def attend(
        self, passing: Pass, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None
    ) -> Tensor:
        """``[B, Lq, H, dv]``, as transformers wants it."""
        state, kind = passing.state, q.device.type
        if torch.is_autocast_enabled(kind):
            q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
        if passing.keeps and layer not in state.text_image:
            state.text_image[layer] = self._text_image(state, q)
        result = self.config.attention(
            q,
            k,
            v,
            state.modality[:, : k.shape[2]].to(k.device),
            state.num_image,
            scale=scale,
            text_image=state.text_image.get(layer),
            query_positions=passing.positions.to(q.device),
            return_scores=self.recorded is not None,
            return_mask=self.recorded is not None,
        )
        if isinstance(result, FocusAttention):
            assert self.recorded is not None
            # the output of a training step would keep its graph
            self.recorded[layer] = result._replace(out=result.out.detach())
            result = result.out
        return result.transpose(1, 2).contiguous()

    def _text_image(self, state: State, q: Tensor) -> Tensor:
        sizes = len(state.modality), q.shape[1], state.modality.shape[1], state.num_image
        with torch.inference_mode(False):
            empty = self.config.text_image(*sizes, device=q.device)
            return empty.double() if q.dtype == torch.float64 else empty


def _register() -> None:
    stock = AttentionInterface()["sdpa"]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        focus, passing = getattr(module, "vmtc_focus", None), kwargs.pop(KEY, None)
        if passing is None:
            raise RuntimeError("CMAI needs a pass of the whole model, by its __call__")
        if isinstance(passing, Step):
            return passing.focus.attend(passing, module, query, key, value, kwargs), None
        if focus is None or not passing.state.num_image:
            return stock(module, query, key, value, *args, **kwargs)
        if kwargs.get("dropout"):
            raise ValueError("CMAI has no attention dropout: set attention_dropout to 0")
        scale = kwargs.get("scaling")
        return focus.attend(passing, module.layer_idx, query, key, value, scale), None

    AttentionInterface.register(KEY, attend)
    # without a mask function of the same name layers that do not inhibit would have no mask
    AttentionMaskInterface.register(KEY, AttentionMaskInterface()["sdpa"])


def _state_of(cache: Any) -> State | None:
    layers = getattr(cache, "layers", None)
    return layers[-1] if layers and isinstance(layers[-1], State) else None


def _real(mask: Tensor | None, place: Tensor) -> Tensor:
    """u8, which of the new tokens are not padding: ``[B, Lq]``, or what expands to it."""
    if mask is None:
        return torch.ones(1, 1, dtype=torch.uint8, device=place.device)
    if mask.dim() == 4:  # a token that is not padding sees itself
        mask = mask if mask.dtype == torch.bool else mask == 0
        return mask[:, 0].gather(2, place[None, :, None].expand(len(mask), -1, 1))[..., 0].byte()
    return mask[:, place].bool().byte()


def _check_causal(mask: Tensor | None, modality: Tensor, place: Tensor) -> None:
    """That a mask of all pairs is what transformers makes of padding alone."""
    if mask is None or mask.dim() != 4:
        return
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
    keys = torch.arange(seen.shape[2], device=seen.device)
    real = modality[:, : seen.shape[2]] > 0
    expected = (keys <= place[:, None]) & real[:, None]
    asked = real.gather(1, place.expand(len(real), -1))[..., None]
    if bool(((seen != expected) & asked).any()):
        raise NotImplementedError(
            "CMAI knows no attention but causal attention to all tokens that are not padding: pass"
            " a mask of two dimensions, or attach without cmai"
        )


def _check_not_packed(mask: Tensor | None, cache: Any, positions: Tensor | None) -> None:
    """Several sequences in a row, which transformers tells by their positions."""
    if mask is not None or cache is not None or positions is None:
        return
    positions = positions[0] if positions.dim() == 3 else positions
    if bool((positions.diff(dim=-1) < 0).any()):
        raise NotImplementedError(
            "CMAI cannot tell the sequences of a packed row apart: pass them as rows, padded, with"
            " an attention_mask"
        )


def _check_cache(cache: Any, past: Any) -> None:
    if cache is None:
        return
    if not hasattr(cache, "layers"):
        raise NotImplementedError(
            f"CMAI cannot follow a cache of type {type(cache).__name__}: use a DynamicCache or a"
            " StaticCache, or attach without cmai"
        )
    if getattr(cache, "offloading", False):
        raise NotImplementedError("CMAI cannot follow an offloaded cache: use another one")
    if int(past):
        raise ValueError(
            "the cache holds tokens that CMAI has not seen: fill a new cache after attach"
        )


def _check(family: Family) -> str:
    """The attention implementation to come back to."""
    config = family.text.config
    implementation: str = config._attn_implementation
    if implementation != "sdpa":
        raise ValueError(
            "attach: CMAI replaces the language model's attention 'sdpa', and cannot replace"
            f" {implementation!r}: load the model with attn_implementation='sdpa'"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or getattr(config, "sliding_window", None):
        raise ValueError(
            "attach: CMAI needs full attention in every layer, the language model has"
            f" {', '.join(sorted(kinds)) or 'a sliding window'}: attach without cmai"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError("attach: CMAI has no softcapping of logits: attach without cmai")
    return implementation
