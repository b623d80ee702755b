"""Which of the two GPU backends a call tries first: pure functions of shapes and architecture.

The rules follow from counted bytes and launches (docs/kernels.md). They have not been measured on a
GPU yet.
"""

from __future__ import annotations

# shared memory of a block on compute capability 9.0 and 10.x
BLOCK_BYTES = 227 * 1024


def fits_one_launch(tokens: int, clusters: int) -> bool:
    """Whether eight blocks hold the pairs of an image and the sums of its clusters.

    Each block has an eighth of the rows: 4 bytes a pair, 8 bytes a cluster, and 16 bytes for every
    token and 24 for every cluster of the image.
    """
    rows = -(-tokens // 8)
    row_bytes = 4 * (-(-tokens // 4) * 4) + 8 * clusters
    return rows * row_bytes + 16 * tokens + 24 * clusters <= BLOCK_BYTES


def clustering(capability: tuple[int, int], tokens: int, clusters: int) -> tuple[str, str]:
    """For kmeans and merge_tokens: ``tokens`` is the most that an image may cluster."""
    if capability not in ((9, 0), (10, 0), (10, 3)):
        return "triton", "compute capability 9.0 or 10.x alone holds the pairs in shared memory"
    if fits_one_launch(tokens, clusters):
        return "cuda", "it runs all rounds in one launch, the pairs in distributed shared memory"
    return "triton", "the pairs of an image do not fit the shared memory of eight blocks"


def importance(capability: tuple[int, int]) -> tuple[str, str]:
    """For token_importance."""
    return "triton", "both read the keys once"
