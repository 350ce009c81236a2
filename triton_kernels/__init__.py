"""Triton kernels, one file per operator. Triton is imported by those files alone."""
