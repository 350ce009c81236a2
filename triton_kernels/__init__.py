"""Triton kernels, one file per group of operators. Only these files import Triton."""
