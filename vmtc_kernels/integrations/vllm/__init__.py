"""VMTC and CMAI in vLLM: a plugin that `pip install` registers and that is silent until it is set.

``--additional-config '{"vmtc": {"num_primary": 80, "num_merged": 80}, "cmai": {}}'`` or the
variables ``VMTC_VLLM_VMTC`` and ``VMTC_VLLM_CMAI``, the same objects as JSON, turn it on; the
fields are those of `vmtc_kernels.VMTCConfig` and `vmtc_kernels.CMAIConfig`.
"""

from ._plugin import register

__all__ = ["register"]
