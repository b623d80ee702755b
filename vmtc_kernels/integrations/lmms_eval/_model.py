"""The model ``vmtc_hf`` of lmms-eval: transformers with VMTC, CMAI or downsampling, or as it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from ..transformers import MODEL_TYPES, attach
from ._prompts import Ends, Prompt, cut, generation_of, prompt_of, user_turn
from ._settings import Settings, settings_of


class VmtcHf(lmms):  # type: ignore[misc]
    """A model of transformers, of a family that `attach` supports.

    Args:
        arguments: see `settings_of`: of ``model_args``, and batch size and device of the command.

    Raises:
        ValueError: before any weight is loaded, unknown or contradictory arguments and models of
            other families; after that, settings that do not fit the model.
    """

    is_simple = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        settings = settings_of(arguments)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.device, self.batch_size = self._device(settings), settings.batch_size
        self.model, self.processor = _load(settings, self.device)
        self.handle = None
        if (settings.vmtc, settings.cmai, settings.downsample) != (None, None, None):
            self.handle = attach(
                self.model,
                self.processor,
                vmtc=settings.vmtc,
                cmai=settings.cmai,
                downsample=settings.downsample,
            )
            if settings.vmtc is not None and self.handle.unit_tokens is not None:
                settings.vmtc.counts(self.handle.unit_tokens)
        tokenizer = self.processor.tokenizer
        self._image_token = tokenizer.convert_tokens_to_ids(self.processor.image_token)
        ends = self.model.generation_config.eos_token_id
        self._eos = {ends} if isinstance(ends, int) else set(ends or ())

    def _device(self, settings: Settings) -> torch.device:
        """Each process of ``accelerate launch`` has one of its own."""
        if self._world_size > 1:
            return self.accelerator.device
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(settings.device or usual)

    def clean(self) -> None:
        """Called after the last request: give the memory back."""
        if self.handle is not None:
            self.handle.detach()  # the handle would keep the model
            self.handle = None
        super().clean()

    # what lmms-eval asks for

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """The answers, in order; requests with the same settings are generated together."""
        results: list[Any] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            key = json.dumps(self._options(request), sort_keys=True, default=str)
            groups.setdefault(key, []).append(i)
        totals = {"seconds": 0.0, "tokens": 0, "images": 0, "image_tokens": 0}
        for batch in self._batches(groups.values(), len(requests)):
            prompts = [self._prompt(requests[i]) for i in batch]
            asked = self._options(requests[batch[0]])
            for i, prompt, result in zip(
                batch, prompts, self._answers(prompts, asked, totals), strict=True
            ):
                results[i] = result
                self.cache_hook.add_partial("generate_until", (prompt.text, asked), result.text)
        self._log(totals)
        return results

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of each continuation its loss, and whether greedy decoding gives it.

        The loss is the mean of -log p over the continuation's tokens, as in lmms-eval's other
        models: its multiple-choice tasks take the smallest.

        Raises:
            ValueError: an empty continuation.
        """
        results: list[Any] = [None] * len(requests)
        for batch in self._batches([list(range(len(requests)))], len(requests)):
            prompts, continuations = [], []
            for i in batch:
                context, target, *place = requests[i].args
                doc, visual = None, None
                if place:
                    doc_to_visual, doc_id, task, split = place
                    doc = self.task_dict[task][split][doc_id]
                    visual = doc_to_visual(doc)
                continuations.append(target if isinstance(target, str) else target(doc))
                prompts.append(prompt_of(self.processor, user_turn(visual, context)))
            losses = self._losses(prompts, continuations)
            for i, prompt, continuation, loss in zip(
                batch, prompts, continuations, losses, strict=True
            ):
                results[i] = loss
                self.cache_hook.add_partial("loglikelihood", (prompt.text, continuation), loss)
        return results

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """The answers of each round, of which the task asks the next until it has enough."""
        results = []
        totals = {"seconds": 0.0, "tokens": 0, "images": 0, "image_tokens": 0}
        for (i,) in self._batches([[i] for i in range(len(requests))], len(requests)):
            _, doc_to_messages, asked, doc_id, task, split = requests[i].args
            doc = self.task_dict[task][split][doc_id]
            messages, known, answers = doc_to_messages(doc), None, []
            while messages is not None:
                prompt = prompt_of(self.processor, messages)
                answers.append(self._answers([prompt], asked, totals)[0].text)
                messages, done, _, known = doc_to_messages(
                    doc,
                    round_idx=len(answers),
                    previous_output=list(answers),
                    previous_round_info=known,
                )
                if done:
                    messages = None
            results.append(answers)
        self._log(totals)
        return results

    # how a request is laid out

    def _options(self, request: Any) -> dict[str, Any]:
        return request.args[2]

    def _prompt(self, request: Any) -> Prompt:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return prompt_of(self.processor, doc_to_messages(self.task_dict[task][split][doc_id]))

    # how the model runs

    def _batches(self, groups: Any, total: int) -> Iterator[list[int]]:
        with tqdm(total=total, disable=self.rank != 0, desc="Model Responding") as bar:
            for group in groups:
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    yield batch
                    bar.update(len(batch))

    def _inputs(self, prompts: list[Prompt], texts: list[str]) -> Any:
        """On the device, padded on the left, with as many placeholders as there will be tokens."""
        images = [prompt.images for prompt in prompts]
        # the beginning is written by most templates, and must not be there twice
        begin = self.processor.tokenizer.bos_token
        options = {
            "images": images if any(images) else None,
            "text": texts,
            "return_tensors": "pt",
            "padding": True,
            "padding_side": "left",
            "add_special_tokens": not (begin and texts[0].startswith(begin)),
        }
        if self.handle is not None:
            return self.handle.prepare(**options)
        return self.processor(**options).to(self.device, self.model.dtype)

    def _decode(self, ids: Any) -> list[str]:
        return self.processor.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    @torch.inference_mode()
    def _answers(
        self, prompts: list[Prompt], asked: dict[str, Any], totals: dict[str, Any]
    ) -> list[GenerationResult]:
        options, ends = generation_of(asked)
        inputs = self._inputs(prompts, [prompt.text for prompt in prompts])
        ids = inputs["input_ids"]
        length, pad = ids.shape[1], self.processor.tokenizer.pad_token_id
        if ends:
            options["stopping_criteria"] = [Ends(ends, length, self._decode)]
        start = time.perf_counter()
        rows = self.model.generate(**inputs, pad_token_id=pad, **options)[:, length:]
        totals["seconds"] += time.perf_counter() - start
        counts = [_length(row, self._eos, pad) for row in rows.tolist()]
        totals["tokens"] += sum(counts)
        totals["images"] += sum(len(prompt.images) for prompt in prompts)
        totals["image_tokens"] += int((ids == self._image_token).sum())
        given = inputs["attention_mask"].sum(1).tolist()
        return [
            GenerationResult(cut(answer, ends), TokenCounts(input_tokens=a, output_tokens=b))
            for answer, a, b in zip(self._decode(rows), given, counts, strict=True)
        ]

    @torch.inference_mode()
    def _losses(self, prompts: list[Prompt], continuations: list[str]) -> list[tuple[float, bool]]:
        texts = [p.text + more for p, more in zip(prompts, continuations, strict=True)]
        inputs = self._inputs(prompts, texts)
        counts = [
            _added(self.processor.tokenizer, prompt.text, text)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        # rows end together
        logits = self.model(**inputs, logits_to_keep=max(counts) + 1).logits[:, :-1]
        losses = []
        for row, ids, count in zip(logits, inputs["input_ids"], counts, strict=True):
            shares, targets = row[-count:].float().log_softmax(-1), ids[-count:]
            loss = -shares.gather(1, targets[:, None]).mean()
            losses.append((float(loss), bool((shares.argmax(-1) == targets).all())))
        return losses

    def _log(self, totals: dict[str, Any]) -> None:
        """Into the results' ``throughput``, from which the paper's table takes the tokens."""
        more = {}
        if totals["images"]:
            more["image_tokens"] = totals["image_tokens"] / totals["images"]
        speed = totals["tokens"] / totals["seconds"] if totals["seconds"] else 0.0
        log_metrics(totals["seconds"], totals["tokens"], speed, more)


class VmtcHfSimple(VmtcHf):
    """The same for ``--force_simple``, the only way to lmms-eval's multiple-choice tasks."""

    is_simple = True

    def _options(self, request: Any) -> dict[str, Any]:
        return request.args[1]

    def _prompt(self, request: Any) -> Prompt:
        context, _, doc_to_visual, doc_id, task, split = request.args
        visual = doc_to_visual(self.task_dict[task][split][doc_id])
        return prompt_of(self.processor, user_turn(visual, context))

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        raise NotImplementedError(
            "vmtc_hf: rounds are asked of the chat model alone: leave out --force_simple"
        )


def _load(settings: Settings, device: torch.device) -> tuple[Any, Any]:
    """The model, on its device, and its processor."""
    source = {
        "revision": settings.revision or "main",
        "trust_remote_code": settings.trust_remote_code,
    }
    kind = transformers.AutoConfig.from_pretrained(settings.pretrained, **source).model_type
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"vmtc_hf: {settings.pretrained} is a model of type {kind!r}, supported are"
            f" {', '.join(MODEL_TYPES)}"
        )
    processor = transformers.AutoProcessor.from_pretrained(settings.pretrained, **source)
    if not processor.chat_template:
        raise ValueError(
            f"vmtc_hf: the processor of {settings.pretrained} has no chat template: take a"
            " checkpoint that has one, or add chat_template.jinja to its folder"
        )
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    options: dict[str, Any] = {"dtype": settings.dtype or "auto", **source}
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    load: Callable[..., Any] = transformers.AutoModelForImageTextToText.from_pretrained
    return load(settings.pretrained, **options).to(device).eval(), processor


def _length(row: list[int], eos: set[int], pad: int) -> int:
    """Tokens generated in a row: to the end of the answer, which counts, or to the padding."""
    for i, token in enumerate(row):
        if token in eos:
            return i + 1
        if token == pad:
            return i
    return len(row)


def _added(tokenizer: Any, prompt: str, text: str) -> int:
    """Tokens of ``text`` after those that it begins with as ``prompt`` does.

    A continuation has no tokens of its own: the last of the prompt may have become another.
    """
    before, ids = (tokenizer(each, add_special_tokens=False).input_ids for each in (prompt, text))
    pairs = enumerate(zip(before, ids, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), len(before))
    if same >= len(ids):
        raise ValueError(f"vmtc_hf: a continuation is empty, after {prompt[-40:]!r}")
    return len(ids) - same
