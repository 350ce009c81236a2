"""Instruments that show, on a machine without a GPU, what a GPU would do with the kernels."""
