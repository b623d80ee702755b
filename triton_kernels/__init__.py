"""Triton kernels of the operators, installed as ``vmtc_kernels.triton_kernels``."""
