"""Operators raise for wrong arguments, and so read no memory that is not theirs."""

import ctypes

import pytest
import torch

from pdp_kernels import ops

W = torch.linspace(-1, 1, 48).view(4, 12)
HALVES = torch.ones(32, 64, dtype=torch.bfloat16)
T, TAU = torch.tensor(0.5), torch.tensor(0.1)
PAIR = torch.tensor([0.5, 0.1])
COUNTS, TWO = torch.tensor([3, 5]), torch.tensor(2)
NORMS = torch.ones(12)


class Elsewhere:
    """Stands for a tensor of another device than the weight's."""

    def __init__(self, tensor):
        self.tensor = tensor


# By operator: right arguments, and for each wrong set what it changes: position, value.
CASES = {
    "prune_counts": (([W, W], [0.5, 0.5]), [(0, []), (1, [0.5])]),
    "thresholds": (
        ([W, W], COUNTS),
        [
            (0, []),
            (0, [W, W.int()]),
            (1, COUNTS[:1]),
            (1, COUNTS.int()),
            (1, COUNTS.double()),
            (1, Elsewhere(COUNTS)),
            (0, [W, Elsewhere(W)]),
        ],
    ),
    "digit_counts": (
        ([W, W], 0 * COUNTS, 1),
        [
            (0, []),
            (0, [W, W.double()]),
            (0, [W, W.bfloat16()]),
            (1, COUNTS[:1]),
            (1, COUNTS.int()),
            (1, Elsewhere(COUNTS)),
            (2, 3),
            (2, -1),
        ],
    ),
    "hard_mask": (
        (W, COUNTS[:1]),
        [(0, W.long()), (1, COUNTS), (1, COUNTS[:0]), (1, T), (1, Elsewhere(COUNTS[:1]))],
    ),
    "soft_mask": (
        (W, T, TAU, False, None, True),
        [
            (0, W.long()),
            (1, T.double()),
            (1, torch.ones(2)),
            (1, Elsewhere(T)),
            (2, TAU.half()),
            (2, torch.ones(0)),
            (2, Elsewhere(TAU)),
        ],
    ),
    "soft_mask_backward": (
        (W, W, W, T, TAU, False),
        [
            (0, W[:2]),
            (0, W.long()),
            (0, Elsewhere(W)),
            (1, W.flatten()),
            (3, T.double()),
            (4, torch.ones(2)),
        ],
    ),
    "soft_mask_list": (
        ([W, W[0]], PAIR, PAIR, True, torch.bfloat16),
        [
            (0, []),
            (0, [W]),
            (0, [W, W.double()]),
            (0, [W.double(), W]),
            (0, [W, W.long()]),
            (0, [W, Elsewhere(W)]),
            (1, PAIR.double()),
            (1, PAIR[:1]),
            (1, PAIR.view(2, 1)),
            (1, Elsewhere(PAIR)),
            (2, T),
            (2, PAIR.half()),
            (2, torch.ones(3)),
            (2, PAIR.view(1, 2)),
            (2, Elsewhere(PAIR)),
        ],
    ),
    "soft_mask_list_backward": (
        ([W.half(), None], [W, W[0]], PAIR, PAIR, True),
        [
            (0, [W]),
            (0, [W[:2], None]),
            (0, [None, W]),
            (0, [W.long(), None]),
            (0, [Elsewhere(W), None]),
            (1, [W, W.double()]),
            (1, [W]),
            (2, PAIR.double()),
            (3, PAIR[:1]),
        ],
    ),
    "soft_mask_nm": (
        (W, TAU, 4, TWO, 1, False, None, True),
        [
            (1, TAU.double()),
            (2, 5),
            (2, 0),
            (2, 64),
            (3, TWO.int()),
            (3, COUNTS),
            (3, Elsewhere(TWO)),
            (4, 2),
            (4, -1),
        ],
    ),
    "soft_mask_nm_backward": (
        (W, W, W, TAU, 4, TWO, 1, False),
        [(0, W[:, :4]), (1, Elsewhere(W)), (3, torch.ones(2)), (4, 7), (5, TAU), (6, 3)],
    ),
    "hard_mask_nm": ((W, 4, TWO, 1), [(0, W.long()), (1, 5), (2, COUNTS), (3, 2)]),
    "compress_2to4": (
        (HALVES,),
        [(0, HALVES.float()), (0, HALVES[:16]), (0, HALVES[:, :32].contiguous()), (0, HALVES[0])],
    ),
    "channel_norms": ((W, 1, False), [(0, W.long()), (1, 2), (1, -1)]),
    "soft_mask_channel": (
        (W, NORMS, T, TAU, 1, False, None),
        [(1, NORMS[:4]), (1, NORMS.double()), (1, Elsewhere(NORMS)), (2, T.double()), (4, 2)],
    ),
    "soft_mask_channel_backward": (
        (W, NORMS, W, NORMS, T, TAU, 1, False, False),
        [(0, W[:2]), (1, NORMS[:4]), (3, NORMS[:4]), (4, torch.ones(2)), (6, -1)],
    ),
    "power_sums": (
        ([W, W], [W > 0, None], 0.5, 1.0, False),
        [
            (0, []),
            (1, [None]),
            (1, [W, None]),
            (1, [W[:2] > 0, None]),
            (1, [(W > 0).flatten(), None]),
            (1, [Elsewhere(W > 0), None]),
        ],
    ),
}


def each_change(names):
    return [
        pytest.param(name, index, id=f"{name}-{index}")
        for name in names
        for index in range(len(CASES[name][1]))
    ]


def changed(arguments, change):
    position, value = change
    return [value if i == position else argument for i, argument in enumerate(arguments)]


def placed(argument, device, elsewhere, put=torch.Tensor.to):
    if isinstance(argument, list):
        return [placed(each, device, elsewhere, put) for each in argument]
    if isinstance(argument, Elsewhere):
        return put(argument.tensor, elsewhere)
    return put(argument, device) if isinstance(argument, torch.Tensor) else argument


def test_every_operator_is_tried():
    assert set(CASES) == set(ops.schemas.SCHEMAS)


@pytest.mark.parametrize("name", CASES)
def test_right_arguments_are_accepted(device, name):
    getattr(torch.ops.pdp, name)(*placed(list(CASES[name][0]), device, device))


@pytest.mark.parametrize(("name", "index"), each_change(CASES))
def test_wrong_arguments_raise(device, name, index):
    arguments, changes = CASES[name]
    wrong = changed(arguments, changes[index])
    if device == "cpu" and "Elsewhere" in repr(wrong):
        pytest.skip("a machine without a GPU has one kind of device that kernels serve")
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        getattr(torch.ops.pdp, name)(*placed(wrong, device, "cpu"))


def labelled(tensor, device):
    """Return a copy that says it is on the device "cuda" or "cpu"; its memory is the host's.

    DLPack's tensor is a pointer to the memory and the kind of its device, of which 2 is CUDA.
    """
    capsule = torch.utils.dlpack.to_dlpack(tensor.clone())
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    kind = pointer_of(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    ctypes.c_int32.from_address(kind).value = {"cpu": 1, "cuda": 2}[device]
    return torch.utils.dlpack.from_dlpack(capsule)


SERVED = ops.backends.TRITON_OPERATORS
OF_CUDA = [name for name in CASES if name not in sum(SERVED.values(), ())]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tensors are on it")
@pytest.mark.skipif(bool(ops.backends.load_errors["_C_cuda"]), reason="no extension for CUDA")
@pytest.mark.parametrize(("name", "index"), each_change(OF_CUDA))
def test_wrong_arguments_of_a_cuda_kernel_raise(monkeypatch, name, index):
    """The checks need no GPU. A list without weights goes to the reference."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    arguments, changes = CASES[name]
    wrong = placed(changed(arguments, changes[index]), "cuda", "cpu", labelled)
    with pytest.raises((RuntimeError, ValueError), match=r"must|expected|zip"):
        getattr(torch.ops.pdp, name)(*wrong)


OF_TRITON = [
    name for names in (SERVED | ops.backends.TRITON_SUBSTITUTES).values() for name in names
]


@pytest.mark.parametrize(("name", "index"), each_change(OF_TRITON))
def test_wrong_arguments_of_a_triton_kernel_raise(name, index):
    check = getattr(ops.arguments, name)
    arguments, changes = CASES[name]
    check(*arguments)
    with pytest.raises(ValueError, match=r"must .*got|must be"):
        check(*placed(changed(arguments, changes[index]), "cpu", "meta"))


@pytest.mark.parametrize(
    "name", [name for name in sum(SERVED.values(), ()) if name.endswith("_backward")]
)
def test_one_of_two_gradients_of_a_triton_kernel_may_be_missing(name):
    check = getattr(ops.arguments, name)
    grad_w_hat, grad_mask, *rest = CASES[name][0]
    check(None, grad_mask, *rest)
    check(grad_w_hat, None, *rest)
