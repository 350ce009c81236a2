"""Ways to store a model's weights. Each gives bytes, and the same weights back."""

import gzip
import io
import lzma
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from benchmarks.measure import note_of
from pdp_kernels import compress_2to4
from pdp_kernels.functional.compress import COMPRESSED_DTYPES, has_compressed_shape

State = dict[str, Tensor]

NOT_INSTALLED = "not installed"


class UnavailableError(Exception):
    """A way to store weights that this machine or this dtype does not have; says why."""


class Storage(NamedTuple):
    """A way to store weights.

    Attributes:
        encode: The bytes of a state_dict.
        decode: The state_dict of these bytes.
    """

    encode: Callable[[State], bytes]
    decode: Callable[[bytes], State]


def save(content: object) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load(content: bytes) -> dict:
    """Return what torch.save wrote."""
    return torch.load(io.BytesIO(content))


def safetensors_bytes(state: State) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError:
        raise UnavailableError(NOT_INSTALLED) from None
    return save({name: tensor.contiguous() for name, tensor in state.items()})


def safetensors_state(content: bytes) -> State:
    from safetensors.torch import load

    return load(content)


def compressed(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> Storage:
    """Return the storage of torch.save's file in compressed form."""
    return Storage(lambda state: pack(save(state)), lambda content: load(unpack(content)))


def gzipped(level: int) -> Storage:
    """Return the storage of a gzipped file; 6 is the default level of gzip and zip."""
    return compressed(lambda content: gzip.compress(content, level, mtime=0), gzip.decompress)


def zstd(*options: str) -> Callable[[bytes], bytes]:
    def run(content: bytes) -> bytes:
        if not shutil.which("zstd"):
            raise UnavailableError(NOT_INSTALLED)
        command = ["zstd", "--quiet", "--stdout", *options]
        return subprocess.run(command, input=content, stdout=subprocess.PIPE, check=True).stdout

    return run


def unpacked(unpack: Callable[..., Tensor]) -> Callable[[bytes], State]:
    """Return what decodes a file in which some weights are tuples, the arguments of `unpack`."""

    def decode(content: bytes) -> State:
        state = load(content)
        return {name: w if isinstance(w, Tensor) else unpack(*w) for name, w in state.items()}

    return decode


def each_weight(pack: Callable[[Tensor], tuple], unpack: Callable[..., Tensor]) -> Storage:
    """Return the storage of a file that torch.save writes, with each matrix or filter packed."""

    def encode(state: State) -> bytes:
        return save({name: pack(w) if w.dim() > 1 else w for name, w in state.items()})

    return Storage(encode, unpacked(unpack))


def csr_of(weight: Tensor) -> Tensor:
    """Return a matrix in CSR with int32 indices, which MKL takes as they are."""
    csr = weight.to_sparse_csr()
    rows, columns = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(rows, columns, csr.values(), csr.shape)


def pack_csr(weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    return csr_of(weight.flatten(1)), tuple(weight.shape)


def unpack_csr(csr: Tensor, shape: Sequence[int]) -> Tensor:
    return csr.to_dense().view(shape)


def pack_bits(weight: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    flat = weight.flatten()
    kept = flat != 0
    return flat[kept], torch.from_numpy(np.packbits(kept.numpy())), tuple(weight.shape)


def unpack_bits(values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    weight = torch.zeros(shape, dtype=values.dtype)
    kept = np.unpackbits(bits.numpy(), count=weight.numel()).astype(bool)
    weight.view(-1)[torch.from_numpy(kept)] = values
    return weight


def two_of_four_bytes(state: State) -> bytes:
    """Return a file of values and metadata, and of the weights that `compress_2to4` refuses."""
    packed = {name: pack_2to4(weight) for name, weight in state.items()}
    if not any(isinstance(weight, tuple) for weight in packed.values()):
        raise UnavailableError("compress_2to4 takes bfloat16 and float16 matrices, no convolutions")
    return save(packed)


def pack_2to4(weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    fits = weight.dtype in COMPRESSED_DTYPES and has_compressed_shape(weight)
    return compress_2to4(weight) if fits else weight


STORAGES = {
    "torch.save": Storage(save, load),
    "safetensors": Storage(safetensors_bytes, safetensors_state),
    "gzip": gzipped(6),
    "gzip -9": gzipped(9),
    "zstd -3": compressed(zstd("-3"), zstd("--decompress")),
    "xz": compressed(lambda content: lzma.compress(content, preset=6), lzma.decompress),
    "CSR": each_weight(pack_csr, unpack_csr),
    "values + bits": each_weight(pack_bits, unpack_bits),
    "2:4 packed": Storage(two_of_four_bytes, unpacked(sparse_semi_structured_to_dense_cutlass)),
}


def storages_for(pruning: str, compressors: Sequence[str]) -> list[str]:
    """Return the names of the storages that make sense for a pruning.

    Args:
        pruning: A key of `benchmarks.pruned_networks.PRUNINGS`.
        compressors: The compressors to use.
    """
    names = ["torch.save", "safetensors", *compressors]
    if pruning.endswith("zeros"):
        names += ["CSR", "values + bits"]
    if pruning == "2:4":
        names += ["values + bits", "2:4 packed"]
    return names


def stored_size(name: str, state: State) -> dict[str, object]:
    """Return the bytes that a storage takes, once it gave the same weights back, or a note."""
    storage = STORAGES[name]
    try:
        content = storage.encode(state)
        back = storage.decode(content)
    except UnavailableError as reason:
        return {"note": str(reason)}
    except Exception as error:
        return {"note": note_of(error)}
    wrong = [key for key in state if key not in back or not torch.equal(state[key], back[key])]
    if wrong or len(back) != len(state):
        return {"note": f"wrong: {', '.join(wrong) or 'another number of weights'} came back other"}
    return {"bytes": len(content)}
