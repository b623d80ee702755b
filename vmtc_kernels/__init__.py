"""Fused kernels for fewer visual tokens in vision-language models.

Importing this package registers the operators ``torch.ops.vmtc.*``.
"""

from ._registry import BackendError, Explanation, available_backends, explain, use_backend
from ._version import __version__
from .config import CMAIConfig, VMTCConfig
from .focus_attention import FocusAttention, focus_attention
from .focus_mask import focus_mask
from .focus_scores import focus_scores
from .kmeans import Clusters, kmeans
from .masked_attention import MaskedAttention, masked_attention
from .merge_tokens import MergedTokens, merge_tokens
from .paged_focus_attention import paged_focus_attention
from .select_random import select_random
from .select_strided import SelectedTokens, select_strided
from .spatial_downsample import spatial_downsample
from .token_importance import token_importance

__all__ = [
    "BackendError",
    "CMAIConfig",
    "Clusters",
    "Explanation",
    "FocusAttention",
    "MaskedAttention",
    "MergedTokens",
    "SelectedTokens",
    "VMTCConfig",
    "__version__",
    "available_backends",
    "explain",
    "focus_attention",
    "focus_mask",
    "focus_scores",
    "kmeans",
    "masked_attention",
    "merge_tokens",
    "paged_focus_attention",
    "select_random",
    "select_strided",
    "spatial_downsample",
    "token_importance",
    "use_backend",
]
