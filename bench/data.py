"""Seeded data sets that look like visual tokens, x: [B, N, D] float32.

Each is drawn where it is needed, as a large one takes a processor minutes; so the numbers of one
seed differ between devices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CENTRES = 40


def blobs(batch: int, tokens: int, features: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """A Gaussian mixture for each image: 40 standard normal centres, unit noise around them."""
    generator = torch.Generator(device).manual_seed(seed)
    centres = torch.randn(batch, CENTRES, features, generator=generator, device=device)
    member = torch.randint(CENTRES, (batch, tokens), generator=generator, device=device)
    noise = torch.randn(batch, tokens, features, generator=generator, device=device)
    return centres.gather(1, member[..., None].expand_as(noise)) + noise


def field(batch: int, tokens: int, features: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """A smooth field of rank 64 over a square grid, and noise: like the features of a ViT."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"field: tokens must be a square number, got {tokens}")
    generator = torch.Generator(device).manual_seed(seed)
    coarse = torch.randn(batch, 64, 6, 6, generator=generator, device=device)
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    mixing = torch.randn(64, features, generator=generator, device=device) / 8
    noise = torch.randn(batch, tokens, features, generator=generator, device=device)
    return fine.flatten(2).transpose(1, 2) @ mixing + 0.3 * noise


def randn(batch: int, tokens: int, features: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """No structure at all."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(batch, tokens, features, generator=generator, device=device)


DATASETS = {"blobs": blobs, "field": field, "randn": randn}
