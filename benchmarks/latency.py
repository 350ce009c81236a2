"""Latency of pruned networks: in PyTorch, torch.compile and ONNX Runtime, and with CSR weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import sparse_linear
from benchmarks.measure import note_of
from benchmarks.pruned_networks import (
    DENSE,
    HALF,
    Network,
    random_network,
    removed_units,
    zeroed_units,
    zeros,
)
from benchmarks.storage import NOT_INSTALLED, UnavailableError, csr_of
from benchmarks.timing import ProviderError, cpu_clock, time_interleaved

# Largest difference from the outputs in float64, relative to the largest output.
TOLERANCE = 1e-4

ZEROS = "90% zeros"
SPARSE = {ZEROS: 0.9, "95% zeros": 0.95, "99% zeros": 0.99}

EAGER, COMPILED, ONNX, CSR = "PyTorch", "torch.compile", "ONNX Runtime", "PyTorch, CSR"
TENSOR_CORES = "PyTorch, sparse tensor cores"
RUNTIMES = (EAGER, COMPILED, ONNX, CSR, TENSOR_CORES)

NOT_MEASURED = "not yet measured: needs a CUDA device of compute capability 8.0 or later"

Run = Callable[[Tensor], Tensor]


class CSRLinear(nn.Module):
    """A Linear layer with its weight in CSR."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(csr_of(layer.weight.detach()), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        # A product with a vector takes about half as long as one with a matrix of one column.
        y = (self.weight @ rows[0]).unsqueeze(0) if len(rows) == 1 else (self.weight @ rows.t()).t()
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def with_csr(model: nn.Module) -> nn.Module:
    """Return a copy with the weights of all Linear layers in CSR."""
    if not torch.backends.mkl.is_available():
        raise UnavailableError("needs a PyTorch with MKL")
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                setattr(module, name, CSRLinear(layer))
    return model


def eager(model: nn.Module, example: Tensor) -> Run:
    return model


def compiled(model: nn.Module, example: Tensor) -> Run:
    return torch.compile(model, dynamic=False)


def onnx(model: nn.Module, example: Tensor) -> Run:
    """Return a run of ONNX Runtime with as many threads as PyTorch.

    Its threads do not spin while they wait. They would take the cores of what is timed next.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx.export needs it
    except ImportError:
        raise UnavailableError(NOT_INSTALLED) from None
    program = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


PREPARE = {EAGER: eager, COMPILED: compiled, ONNX: onnx, CSR: eager}


@dataclass
class Case:
    """A pruned network in a runtime.

    Attributes:
        runtime: A key of PREPARE.
        pruning: What was pruned.
        model: Makes the network to run.
        reference: The network with zeros, whose outputs are the right ones.
    """

    runtime: str
    pruning: str
    model: Callable[[], nn.Module]
    reference: nn.Module


def cases(model: nn.Module) -> list[Case]:
    """Return what is timed of a dense network."""
    pruned, unread = zeros(model, SPARSE[ZEROS]), zeroed_units(model)
    found = [
        Case(runtime, pruning, made, reference)
        for runtime in (EAGER, COMPILED, ONNX)
        for pruning, made, reference in (
            (DENSE, lambda: model, model),
            (ZEROS, lambda: pruned, pruned),
            (HALF, partial(removed_units, unread), unread),
        )
    ]
    if not any(isinstance(layer, nn.Conv2d) for layer in model.modules()):
        for name, sparsity in SPARSE.items():
            reference = pruned if name == ZEROS else zeros(model, sparsity)
            found.append(Case(CSR, name, partial(with_csr, reference), reference))
    return found


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of a network's weights and buffers in memory."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        csr = tensor.layout == torch.sparse_csr
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values()) if csr else (tensor,)
        total += sum(part.nbytes for part in parts)
    return total


def difference(answer: Tensor, right: Tensor) -> float:
    """Return the largest difference, relative to the largest output."""
    return ((answer.double() - right).abs().max() / right.abs().max()).item()


@torch.no_grad()
def measure(name: str, network: Network, examples: int, budget: float) -> list[dict[str, object]]:
    """Check, then time a network, dense and pruned, in each runtime.

    Args:
        name: The network's name.
        network: The network; its weights are normal.
        examples: Examples of a batch.
        budget: Seconds of timing, for all cases together.

    Returns:
        A row for each case, with a note where it was not timed.
    """
    torch.compiler.reset()
    model = random_network(network)
    inputs = [torch.randn(examples, *network.inputs) for _ in range(4)]
    rows, runs, estimates, right = {}, {}, {}, {}
    for case in cases(model):
        key = case.runtime, case.pruning
        rows[key] = row = {"network": name, "examples": examples}
        row |= {"runtime": case.runtime, "pruning": case.pruning}
        if id(case.reference) not in right:
            double = copy.deepcopy(case.reference).double()
            right[id(case.reference)] = double(inputs[0].double()), case.reference
        try:
            made = case.model()
            row["held_bytes"] = held_bytes(made) if case.runtime != ONNX else None
            run = PREPARE[case.runtime](made, inputs[0])
            row["difference"] = difference(run(inputs[0]), right[id(case.reference)][0])
            if not row["difference"] <= TOLERANCE:
                row["note"] = f"wrong: outputs differ by {row['difference']:.3g} of the largest"
                continue
            runs[key], estimates[key] = run, cpu_clock(partial(run, inputs[1]))[0]
        except UnavailableError as reason:
            row["note"] = str(reason)
        except Exception as error:
            row["note"] = note_of(error)
    time_all(rows, runs, estimates, inputs, budget)
    order = [DENSE, *SPARSE, HALF]
    return sorted(rows.values(), key=lambda row: order.index(row["pruning"]))


def time_all(rows: dict, runs: dict, estimates: dict, inputs: list[Tensor], budget: float) -> None:
    """Enter the times of runs into their rows. A ratio is to the dense network in that runtime."""
    timings = {}
    while runs and not timings:
        providers = {key: lambda x, run=run: partial(run, x) for key, run in runs.items()}
        try:
            timings = time_interleaved(providers, estimates, inputs, cpu_clock, budget)
        except ProviderError as failure:
            rows[failure.provider]["note"] = note_of(failure)
            del runs[failure.provider]
    for key, timing in timings.items():
        base = timings.get((EAGER if key[0] == CSR else key[0], DENSE))
        rows[key] |= {
            "median_s": timing.median,
            "quartiles_s": timing.quartiles,
            "runs": timing.runs,
            "of dense": timing.median / base.median if base else None,
        }


def measure_tensor_cores(name: str, shape: tuple[int, int, int], budget: float) -> list[dict]:
    """Return the one row of a 2:4 Linear layer in bfloat16 on a GPU (`benchmarks.sparse_linear`).

    Args:
        name: The layer's name.
        shape: Rows of the input, in_features and out_features.
        budget: Seconds of timing.
    """
    row = {"network": name, "examples": shape[0], "runtime": TENSOR_CORES, "pruning": "2:4"}
    if not torch.cuda.is_available():
        return [row | {"note": NOT_MEASURED}]
    try:
        found = sparse_linear.measure(*shape, budget)
    except Exception as error:
        return [row | {"note": note_of(error)}]
    if "note" in found:
        return [row | {"note": found["note"]}]
    times = {"median_s": found["sparse_s"], "of dense": 1 / found["speedup"]}
    return [row | times | {"difference": found["difference"]}]
