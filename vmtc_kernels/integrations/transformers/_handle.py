"""`attach`: fewer visual tokens in an unmodified model, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers.models.auto import processing_auto

from ...config import CMAIConfig, VMTCConfig
from ...focus_attention import FocusAttention
from .._merging import Merged
from ._attached import Attached
from ._downsample import Downsampled, Downsampling
from ._families import Family, family_of
from ._focus import Focus
from ._paged_rotary import PagedRotary
from ._prompt import Padding, shrink
from ._requests import Requests
from ._rotary import RotaryPositions
from ._vision import Run, Vision


@dataclass
class Last:
    """What the last encoding and the last forward pass did, where `attach` was told to record.

    ``merged``: by modality, the units of same size together (`Merged`: owners, scores, sizes, and
    the token whose place each slot takes); ``focus``: by layer, scores and masks
    (`FocusAttention`) of the layers that inhibit.
    """

    merged: dict[str, list[Merged]] = field(default_factory=dict)
    focus: dict[int, FocusAttention] = field(default_factory=dict)


def attach(
    model: Any,
    processor: Any,
    *,
    vmtc: VMTCConfig | None = None,
    cmai: CMAIConfig | None = None,
    downsample: int | None = None,
    record: bool = False,
) -> Handle:
    """Let a vision-language model read fewer visual tokens, and inhibit text-image pairs.

    The model itself is not changed: it gets hooks, an attention implementation for its language
    model (CMAI) and wrappers of the methods that encode images (VMTC). In the prompt the tokens
    that are left stay in the order, and with rotary positions of the place, that they had; a merged
    token takes the place of its member of highest score. The vision encoder keeps the attention
    implementation that it has.

    Args:
        model: a model of transformers that generates text, of a supported family (another one is
            an error that names them), on any device and of any dtype that the operators take.
        processor: the model's.
        vmtc: how visual tokens are merged; None for all of them. Counts and shares are of a unit:
            an image, a tile of one (LLaVA-NeXT, Idefics3, SmolVLM), a frame of a video.
        cmai: which pairs of text and image tokens are inhibited; None for none.
        downsample: instead of ``vmtc``, the baseline that it is compared with: `spatial_downsample`
            by this factor, before the projector, where images or tiles are square grids (LLaVA-1.5,
            Idefics3, SmolVLM).
        record: keep what is done in `Handle.last`; CMAI then stores all scores and is slower.

    Returns:
        `Handle`, whose ``prepare`` makes inputs for ``generate`` and ``forward``.

    Raises:
        ImportError: transformers is too old.
        ValueError: a model, processor or setting that does not go together, and what to do.

    Source: VMTC and CMAI, arXiv 2411.15453; the order and positions of the tokens are ours.
    """
    return Handle(model, processor, vmtc, cmai, downsample, record)


class Handle(Attached):
    """What `attach` did to a model. `detach` undoes it, as does the end of a ``with`` block.

    ``model``, ``processor``, ``vmtc``, ``cmai``, ``downsample``: as given; ``last``: see `Last`;
    ``unit_tokens``: tokens of an image, or of a tile, as the model has them without compression;
    None where they depend on the image (Qwen).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        vmtc: VMTCConfig | None,
        cmai: CMAIConfig | None,
        downsample: int | None,
        record: bool,
    ) -> None:
        if vmtc is None and cmai is None and downsample is None:
            raise ValueError(
                "attach: neither vmtc, cmai nor downsample is given: there is nothing to do"
            )
        if vmtc is not None and downsample is not None:
            raise ValueError("attach: vmtc and downsample are both given: choose one of them")
        # of a model with adapters, the one that has them
        family = family_of(model.get_base_model() if hasattr(model, "get_base_model") else model)
        _check_processor(family, processor)
        if getattr(family.model, "vmtc_handle", None) is not None:
            raise ValueError("attach: this model has a handle already: call its detach first")
        self.model, self.processor, self.vmtc, self.cmai = model, processor, vmtc, cmai
        self.downsample, self.unit_tokens = downsample, family.unit_tokens
        self._reduction = vmtc if downsample is None else Downsampling(downsample)
        self.last = Last()
        self._family, self._record = family, record
        self._parts: list[Any] = []
        self._requests: Requests | None = None
        try:
            self._rotary: RotaryPositions | None = None
            if isinstance(self._reduction, Downsampling):
                self._parts.append(Downsampled(family, self._reduction, self._encoded))
            elif self._reduction is not None:
                self._parts.append(Vision(family, self._reduction, self._encoded))
                if hasattr(family.core, "get_rope_index"):
                    self._rotary = RotaryPositions(family)
                    self._parts.append(self._rotary)
            self._requests = Requests(family, self._reduction, self._rotary)
            self._parts.append(self._requests)
            if hasattr(family.core, "get_rope_index"):
                self._parts.append(PagedRotary(family, self._requests))
            if cmai is not None:
                self._parts.append(Focus(family, cmai, self.last.focus if record else None))
        except BaseException:
            self.detach()
            raise
        family.model.vmtc_handle = self

    def prepare(
        self, images: Any = None, text: Any = None, videos: Any = None, **options: Any
    ) -> Any:
        """The processor's output with as many placeholders as there will be tokens.

        Args:
            images, text, videos, options: as the processor takes them, ``text`` one prompt or
                several, with a placeholder for each image. Tensors are of torch, and several
                prompts are padded, unless ``options`` say otherwise.

        Returns:
            The processor's `BatchFeature`, on the model's device and pixels in its dtype, for
            ``generate(**inputs)`` or ``model(**inputs)``.

        Raises:
            ValueError: placeholders and images that do not match, or an image with fewer tokens
                than are asked for.
        """
        options.setdefault("return_tensors", "pt")
        if options["return_tensors"] != "pt":
            raise ValueError("prepare: return_tensors must be 'pt', as the model takes tensors")
        if isinstance(text, list | tuple):
            options.setdefault("padding", True)
        given = {"images": images, "videos": videos}
        given = {name: value for name, value in given.items() if value is not None}
        made = self.processor(text=text, **given, **options)
        how = {**options, **options.get("text_kwargs", {})}
        return self.shrink(
            made,
            padding_side=how.get("padding_side"),
            length=how["max_length"] if how.get("padding") == "max_length" else 0,
            pad_to_multiple_of=how.get("pad_to_multiple_of") or 1,
        )

    def shrink(
        self,
        inputs: Mapping[str, Any],
        *,
        padding_side: str | None = None,
        length: int = 0,
        pad_to_multiple_of: int = 1,
    ) -> Any:
        """`prepare` for inputs that the processor has made, those of a chat template for example.

        Args:
            inputs: of tensors; what has the shape of ids, labels for example, loses the same
                places.
            padding_side: ``"left"`` or ``"right"``; that of the padding in ``inputs`` if None, or
                the tokenizer's.
            length, pad_to_multiple_of: rows are padded to the longest, to at least ``length``
                tokens, and to a multiple.

        Returns:
            A `BatchFeature` on the model's device, pixels in its dtype.

        Raises:
            ValueError: as in `prepare`.
        """
        tokenizer = self.processor.tokenizer
        empty = tokenizer.pad_token_id
        values = {"input_ids": tokenizer.eos_token_id if empty is None else empty, "labels": -100}
        padding = Padding(values, padding_side, length, pad_to_multiple_of)
        shrunk = transformers.BatchFeature(dict(inputs))
        shrink(shrunk, self._family, self._reduction, padding, tokenizer.padding_side)
        shrunk = shrunk.to(_device(self.model))
        for name, value in shrunk.items():
            # other numbers, the seconds between frames for example, would lose digits
            if name.startswith("pixel_values") and value.is_floating_point():
                shrunk[name] = value.to(self._family.model.dtype)
        return shrunk

    def request(self, images: Any = None, text: Any = None, **options: Any) -> list[int]:
        """A prompt for continuous batching, which takes no images: ids that stand for them too.

        The images are encoded, and compressed, now. Their tokens become virtual ids, beyond the
        vocabulary and of this handle alone, which the embedding turns into what was encoded. The
        same image has the same ids, so that requests which start alike share the cache, and it is
        not encoded twice; the room for it is taken until `release`. May be called from several
        threads, and while `ContinuousBatchingManager` runs. CMAI keeps, beside a cache of N tokens
        and for each layer that inhibits, N times as many f32 numbers as a request has image tokens:
        leave memory for them, by ``ContinuousBatchingConfig.max_memory_percent``.

        Args:
            images: those of this prompt, or None.
            text: one prompt, with a placeholder for each image.
            options: as the processor takes them.

        Returns:
            ids for ``model.generate_batch([ids, ...])`` or ``manager.add_request(ids)``; a
            tokenizer does not know the virtual ones, which come back in ``prompt_ids``.

        Raises:
            ValueError: as in `prepare`, or several prompts.
            NotImplementedError: videos.
            RuntimeError: no room, see `release` and `reserve`.
        """
        given = {} if images is None else {"images": images}
        options.setdefault("return_tensors", "pt")
        inputs = self.processor(text=text, **given, **options)
        assert self._requests is not None
        return self._requests.ids_of(inputs, self.shrink)

    def release(self, ids: list[int]) -> None:
        """The request with these ids, those of `request`, is finished: its images may make room.

        Until there is need for the room a later request with the same image finds it.

        Raises:
            ValueError: the ids were released before.
        """
        assert self._requests is not None
        self._requests.release(ids)

    def reserve(self, image_tokens: int) -> None:
        """Room for images of unfinished requests; 16384 tokens, unless this is called first.

        Memory: ``image_tokens`` embeddings of the language model.

        Raises:
            RuntimeError: there was a request already, or continuous batching has run.
        """
        assert self._requests is not None
        self._requests.reserve(image_tokens)

    def detach(self) -> None:
        """The model as it was. Inputs that were prepared fit it no longer.

        A manager of continuous batching that the model keeps is destroyed.

        Raises:
            RuntimeError: continuous batching runs; nothing was changed.
        """
        if self._requests is not None:
            self._requests.finish()
        for part in reversed(self._parts):
            part.detach()
        self._parts.clear()
        if getattr(self._family.model, "vmtc_handle", None) is self:
            del self._family.model.vmtc_handle

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def _encoded(self, modality: str, run: Run, output: Any) -> None:
        if self._rotary is not None:
            assert run.rows is not None
            self._rotary.encoded(modality, run.layout, run.rows, output)
        if self._record:
            # the scores of a training step would keep its graph
            detached = [units._replace(scores=units.scores.detach()) for units in run.merged]
            self.last.merged[modality] = detached


def _device(model: Any) -> Any:
    """Where inputs go; the weights of an offloaded model are nowhere until they are used."""
    if model.device.type != "meta":
        return model.device
    return getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu"


def _check_processor(family: Family, processor: Any) -> None:
    kind = family.model_type
    names: Any = processing_auto
    expected = names.PROCESSOR_MAPPING_NAMES.get(kind)
    if expected not in {base.__name__ for base in type(processor).__mro__}:
        raise ValueError(
            f"attach: a model of type {kind!r} needs {expected}, got {type(processor).__name__}:"
            " load the processor from where the model is from"
        )
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if token != family.tokens["image"]:
        raise ValueError(
            f"attach: the processor's image token is {token}, the model's"
            f" {family.tokens['image']}: load the processor from where the model is from"
        )
