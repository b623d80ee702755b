"""Which of the two GPU backends a call tries first: pure functions of shapes and architecture.

The rules follow from counted bytes, launches and steps, and agree with what one H100 measured
but for large k-means, where both are slow (docs/kernels.md).
"""

from __future__ import annotations

# beyond it the pairs of an image are more than its tokens
_MOST_TOKENS = 1024
# what every GPU since compute capability 7.5 gives a block
_SHARED_MEMORY = 64 * 1024


def fits_one_launch(tokens: int, clusters: int) -> bool:
    """Whether the CUDA kernel runs all rounds of an image in one launch.

    A block keeps 20 bytes for each token, 92 for each cluster, and 4 KB (csrc/cuda/lloyd.cuh).
    """
    return tokens <= _MOST_TOKENS and 20 * tokens + 92 * clusters + 4096 <= _SHARED_MEMORY


def clustering(capability: tuple[int, int], tokens: int, clusters: int) -> tuple[str, str]:
    """For kmeans and merge_tokens: ``tokens`` is the most that an image may cluster."""
    if not fits_one_launch(tokens, clusters):
        return "triton", "so many tokens or clusters take a launch a step, on tensor cores there"
    if capability >= (9, 0):
        return "cuda", "its rounds are one launch, few images' pairs in distributed shared memory"
    return "cuda", "its rounds are one launch, the state of an image in shared memory"


def importance(capability: tuple[int, int]) -> tuple[str, str]:
    """For token_importance."""
    return "triton", "both read the keys once"


def attention(capability: tuple[int, int], *args: object, **kwargs: object) -> tuple[str, str]:
    """For the operators of focus attention."""
    return "triton", "its products take the widest tensor-core instructions of each GPU"
