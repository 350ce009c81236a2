"""What a GPU would do with the kernels, seen on a machine without one."""
