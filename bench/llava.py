"""A LLaVA-1.5 of random weights, its prompts, and how one of several variants of it is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vmtc_kernels import CMAIConfig, VMTCConfig

from .case import Kind

PATCH = 14
PAD, IMAGE, WORDS = 0, 1, 2  # ids of the vocabulary; words are all others


@dataclass(frozen=True)
class Size:
    """A model's sizes: encoder and language model as (features, layers, heads, features of the
    MLP), pixels a side of its images, entries of its vocabulary."""

    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    image: int
    vocabulary: int

    @property
    def grid(self) -> int:
        """Visual tokens of an image."""
        return (self.image // PATCH) ** 2

    @property
    def parameters(self) -> int:
        """Weights of encoder, projector and language model."""
        width, layers, _, inner = self.vision
        block = 4 * width * (width + 1) + 2 * width * inner + inner + width + 4 * width
        encoder = layers * block + 3 * PATCH**2 * width + (self.grid + 2) * width + 4 * width
        features, depth, _, gated = self.text
        projector = features * (width + features + 2)
        language = depth * (4 * features**2 + 3 * features * gated + 2 * features) + features
        return encoder + projector + language + 2 * features * self.vocabulary

    def flops(self, tokens: int, words: int) -> dict[str, int]:
        """Of one image with ``tokens`` visual tokens left before the projector, up to the first
        new token: two for each product and sum, causal attention by its triangle."""
        width, layers, _, inner = self.vision
        places = self.grid + 1
        per_place = 2 * (4 * width**2 + 2 * width * inner) + 4 * places * width
        patches = 2 * self.grid * 3 * PATCH**2 * width
        features, depth, _, gated = self.text
        length = tokens + words
        linear = 2 * length * (4 * features**2 + 3 * features * gated)
        return {
            "encoder": layers * places * per_place + patches,
            "projector": 2 * tokens * features * (width + features),
            "language": depth * (linear + 2 * features * length * (length + 1))
            + 2 * features * self.vocabulary,
        }


SIZES = {
    "7b": Size((1024, 24, 16, 4096), (4096, 32, 32, 11008), 336, 32064),
    # the encoder's share of the work is about that of the 7B
    "small": Size((256, 3, 4, 1024), (768, 8, 12, 2048), 336, 2048),
    "tiny": Size((32, 3, 4, 64), (32, 3, 4, 64), 168, 64),
}


def build(size: Size, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its processor, the same ones at each call."""
    try:
        import transformers
        from tokenizers import Tokenizer, models
    except ImportError as error:
        raise ImportError(
            f"the suite llava needs transformers ({error}): pip install 'transformers>=5.17'"
        ) from error

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({"<pad>": PAD, "<image>": IMAGE, "<unk>": WORDS}, unk_token="<unk>")
        ),
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(), tokenizer, PATCH, "default"
    )
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **dict(zip(names, size.vision, strict=True)),
            image_size=size.image,
            patch_size=PATCH,
            # with the default all patches get nearly the same attention, which no encoder gives
            initializer_factor=4.0,
        ),
        text_config=transformers.LlamaConfig(
            **dict(zip(names, size.text, strict=True)),
            vocab_size=size.vocabulary,
            # 0.02 of the 7B; a narrower model would attend to all tokens alike
            initializer_range=1.28 / size.text[0] ** 0.5,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=PAD,
        ),
        image_token_index=IMAGE,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval(), processor


@dataclass(frozen=True)
class Prompt:
    """``before`` words, an image, ``after`` words, alike in shape in each of ``batch`` rows."""

    batch: int
    before: int
    after: int

    @property
    def words(self) -> int:
        return self.before + self.after

    def inputs(self, size: Size, tokens: int) -> dict[str, Tensor]:
        """With ``tokens`` placeholders; images are smooth with some noise."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.words)
        text = torch.randint(WORDS, size.vocabulary, shape, generator=generator)
        coarse = torch.randn(self.batch, 3, 8, 8, generator=generator)
        smooth = interpolate(coarse, size=(size.image, size.image), mode="bicubic")
        image = torch.full((self.batch, tokens), IMAGE)
        ids = torch.cat([text[:, : self.before], image, text[:, self.before :]], 1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": smooth + 0.2 * torch.randn(smooth.shape, generator=generator),
        }


class Variant:
    """The model as it is, and what others change: ``enter`` puts the change in place, and leaves
    on the stack what undoes it. ``placeholders`` of the prompt, of an image."""

    kind: Kind = "rival"
    scope = "nothing"

    def __init__(self, name: str, size: Size, tokens: int) -> None:
        self.name, self.size, self.tokens = name, size, tokens
        self.placeholders = tokens

    def enter(self, model: Any, stack: ExitStack) -> None: ...

    def left(self, layer: int) -> int:
        """Visual tokens of an image in a layer of the language model."""
        return self.tokens


@dataclass(frozen=True, kw_only=True)
class Watched(VMTCConfig):
    """Settings that note the time spent in operators: ``spent`` holds what tells it in seconds."""

    spent: list[Callable[[], float]] = field(default_factory=list, compare=False)

    def importance(self, q: Tensor, *args: Any, **options: Any) -> Tensor:
        with self._noted(q.is_cuda):
            return super().importance(q, *args, **options)

    def merge(self, x: Tensor, *args: Any, **options: Any) -> Any:
        with self._noted(x.is_cuda):
            return super().merge(x, *args, **options)

    @contextmanager
    def _noted(self, cuda: bool) -> Iterator[None]:
        if cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            stop.record()
            self.spent.append(lambda: start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            yield
            seconds = time.perf_counter() - begin
            self.spent.append(lambda: seconds)


class Ours(Variant):
    """Four fifths of the tokens are kept ones, the others merged."""

    kind: Kind = "ours"
    scope = "selects and merges"

    def __init__(self, name: str, size: Size, tokens: int, stage: Stage, inhibits: bool) -> None:
        super().__init__(name, size, tokens)
        self.placeholders = size.grid  # until the handle takes some away
        primary = tokens * 4 // 5
        self.vmtc = VMTCConfig(num_primary=primary, num_merged=tokens - primary)
        self.cmai = CMAIConfig(layers=None) if inhibits else None
        self.stage = stage
        self.handle: Any = None
        if inhibits:
            self.scope += ", inhibits"

    def enter(self, model: Any, stack: ExitStack) -> None:
        from vmtc_kernels.integrations.transformers import attach

        self.handle = attach(model, self.stage.processor, vmtc=self.vmtc, cmai=self.cmai)
        stack.callback(self.handle.detach)


class First(Variant):
    """The first tokens without a look at any: what as many tokens cost at least."""

    kind: Kind = "floor"
    scope = "takes the first tokens"

    def enter(self, model: Any, stack: ExitStack) -> None:
        projector = model.model.multi_modal_projector
        hook = projector.register_forward_pre_hook(lambda _, args: (self.reduce(args[0]),))
        stack.callback(hook.remove)

    def reduce(self, x: Tensor) -> Tensor:
        """Of ``[B, N, D]`` those that are left."""
        return x[:, : self.tokens]


class Stage:
    """A model, built when it is needed, in which one variant at a time is in place."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self._stack = ExitStack()
        self._active: Variant | None = None

    @cached_property
    def _built(self) -> tuple[Any, Any]:
        return build(self.size, self.device, self.dtype)

    @property
    def model(self) -> Any:
        return self._built[0]

    @property
    def processor(self) -> Any:
        return self._built[1]

    def put(self, variant: Variant) -> None:
        if self._active is not variant:
            self.clear()
            variant.enter(self.model, self._stack)
            self._active = variant

    def clear(self) -> None:
        self._active = None
        self._stack.close()

    def inputs(self, variant: Variant, prompt: Prompt) -> Any:
        from transformers import BatchFeature

        inputs = BatchFeature(prompt.inputs(self.size, variant.placeholders))
        if isinstance(variant, Ours):
            self.put(variant)
            return variant.handle.shrink(inputs)
        return inputs.to(self.model.device, self.model.dtype)


class Call:
    """A variant's answer to a prompt, by `generate`.

    ``steps``: seconds a token after the first one, of the samples that went on to ``new_tokens``,
    which are the first ``decodes``.
    """

    def __init__(
        self, stage: Stage, variant: Variant, prompt: Prompt, new_tokens: int, decodes: int
    ) -> None:
        self.stage, self.variant, self.prompt = stage, variant, prompt
        self.new_tokens, self.decodes = new_tokens, decodes
        self.steps: list[float] = []

    @cached_property
    def inputs(self) -> Any:
        return self.stage.inputs(self.variant, self.prompt)

    def __call__(self) -> Any:
        """One token, with its logits and the cache."""
        inputs = self.inputs
        self.stage.put(self.variant)
        return self._generate(inputs, 1, return_dict_in_generate=True, output_logits=True)

    def sample(self) -> float:
        """Seconds until the first token is on the host; putting the variant in place is none."""
        inputs = self.inputs
        self.stage.put(self.variant)
        goes_on = len(self.steps) < self.decodes
        seen = Seen()
        if self.stage.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        self._generate(inputs, self.new_tokens if goes_on else 1, streamer=seen)
        # what comes first is the prompt
        _, first, *later = seen.times
        if goes_on:
            self.steps.append((later[-1] - first) / len(later))
        return first - start

    def _generate(self, inputs: Any, count: int, **options: Any) -> Any:
        return self.stage.model.generate(
            **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options
        )


class Seen:
    """When `generate` handed out what, as a streamer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...
