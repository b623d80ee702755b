"""A short fine-tuning of the language model and the projector with a reducer in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from .batches import Batches
from .reducers import Reducer
from .train import LENGTH, ROWS, answers, normalized, use_training_attention

_IMAGES, _WARMUP = 8, 10


def tune(
    model: Any, processor: Any, reducer: Reducer, tokens: int, steps: int, rate: float = 3e-4
) -> None:
    """Change the model in place; the encoder stays as it is, as where LLaVA is fine-tuned."""
    before = model.config.text_config._attn_implementation
    use_training_attention(model)
    learns = [model.model.multi_modal_projector, model.model.language_model]
    weights = [p for module in learns for p in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    data = Batches(
        *(processor.tokenizer, _IMAGES, ROWS, LENGTH), seed=77, tokens=reducer.counts(tokens)
    )
    loader = iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4))
    for index in range(steps):
        batch = next(loader)
        with torch.autocast(model.device.type, torch.bfloat16):
            with torch.no_grad():
                seen = reducer.see(model, normalized(batch.pixels))
                few = reducer.reduce(seen.x, seen.scores, seen.keys, tokens, seed=index)
            said, targets = answers(model, batch, model.model.multi_modal_projector(few))
        cross_entropy(said.float(), targets).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((index + 1) / _WARMUP, 1 - index / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.set_attn_implementation(before)
