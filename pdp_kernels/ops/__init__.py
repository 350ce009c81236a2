"""The dispatcher operators of namespace ``pdp``: schemas, fakes, vmap rules and backends.

A call goes from a public function to an `autograd.Function`, to an operator, to a backend. The
dispatcher chooses the backend: native C++ for CPU tensors, CUDA C++ (selection, lists of masks) and
Triton (masks) for CUDA tensors, and the reference for tensors without a kernel.
"""

from pdp_kernels.ops import backends, schemas, vmap

__all__ = ["backends", "schemas", "vmap"]
