"""The fake device reports the mistakes of a GPU test that a GPU would report."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity

from pdp_kernels import pdp_mask


@pytest.fixture(autouse=True)
def fake_device():
    # Imported here: they import Dynamo, which takes seconds.
    from instruments.fake_cuda.calls import DEVICE
    from instruments.fake_cuda.device import DeviceWork
    from instruments.fake_cuda.torch_cuda import PATCHES

    real = torch.cuda.is_available
    PATCHES.put(PATCHES.values)
    DEVICE.reset()
    with DeviceWork(DEVICE):
        yield DEVICE
    PATCHES.put(PATCHES.real)
    assert torch.cuda.is_available is real


def test_tensors_know_their_device():
    weight = torch.randn(3, device="cuda")
    layer = torch.nn.Linear(2, 2).to("cuda:1")
    assert weight.device == torch.device("cuda", 0)
    assert weight[1:].device == (weight + 1).device == weight.double().device == weight.device
    assert layer.weight.device == copy.deepcopy(layer).weight.device == torch.device("cuda", 1)
    assert weight.is_cuda and not weight.cpu().is_cuda
    assert torch.zeros(3).device == torch.device("cpu")


def test_moving_a_tensor_copies_it():
    host = torch.zeros(3)
    moved = host.cuda()
    moved += 1
    assert host.tolist() == [0, 0, 0]
    back = moved.cpu()
    back += 1
    assert moved.tolist() == [1, 1, 1]
    assert moved.to("cuda", torch.float32) is moved


MIXES = {
    "host": lambda: torch.zeros(3, device="cuda") + torch.zeros(3),
    "another device": lambda: torch.zeros(3, device="cuda:0") * torch.zeros(3, device="cuda:1"),
    "list": lambda: torch.stack([torch.zeros(3, device="cuda"), torch.zeros(3)]),
    "operator": lambda: torch.ops.pdp.thresholds([torch.zeros(3, device="cuda")], torch.ones(1)),
}


@pytest.mark.parametrize("name", MIXES)
def test_tensors_of_several_devices_are_an_error(name):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        MIXES[name]()


def test_a_number_of_the_host_is_none():
    assert torch.equal(
        torch.ones(2, device="cuda") * torch.tensor(3.0), torch.tensor([3.0, 3.0]).cuda()
    )


def test_what_an_earlier_test_has_left_stays_on_its_device(fake_device):
    left = torch.ones(3, device="cuda:1")
    fake_device.reset()
    assert left.device == torch.device("cuda", 1)
    assert (left + 1).tolist() == [2, 2, 2]


def test_arguments_are_checked_as_on_a_gpu():
    with pytest.raises(ValueError, match="device"):
        pdp_mask(torch.ones(3, device="cuda"), threshold=torch.tensor(0.5))


WAITS = {
    "item": lambda weight: weight[0].item(),
    "bool": lambda weight: bool(weight[0] > 0),
    "tolist": lambda weight: weight.tolist(),
    "to the host": lambda weight: weight.cpu(),
    "into a tensor of the host": lambda weight: torch.zeros(3).copy_(weight),
    "from the host": lambda weight: weight.copy_(torch.zeros(3)),
    "new from a number": lambda weight: torch.tensor(3.0, device="cuda"),
    "nonzero": lambda weight: weight.nonzero(),
    "index by mask": lambda weight: weight[weight > 0],
    "index by list": lambda weight: weight[[0, 1]],
    "comparison": lambda weight: torch.equal(weight, weight),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_errors_where_they_are_forbidden(name):
    weight = torch.ones(3, device="cuda")
    WAITS[name](weight)
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        WAITS[name](weight)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        WAITS[name](weight)


def test_synchronizing_is_forbidden_in_a_graph_alone():
    torch.cuda.set_sync_debug_mode("error")
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.synchronize()


def test_no_wait_is_no_error():
    weight = torch.ones(3, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    w_hat = pdp_mask(weight, 0.5) * torch.full((), 2.0, device="cuda")
    w_hat.square().sum().backward()
    weight.grad[1:].fill_(0.5)
    torch.zeros(3).to("cuda", non_blocking=True)


def test_numpy_needs_a_tensor_of_the_host():
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        torch.ones(3, device="cuda").numpy()


def test_a_stream_that_does_not_wait_is_an_error():
    weight = torch.ones(3, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), pytest.raises(RuntimeError, match="reads what another stream"):
        weight + 1
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        total = weight + 1
        weight.zero_()
    with pytest.raises(RuntimeError, match="reads what another stream"):
        total * 2
    with pytest.raises(RuntimeError, match="writes what another stream"):
        weight.fill_(2)
    torch.cuda.current_stream().wait_event(stream.record_event())
    assert (total * 2).tolist() == [4, 4, 4]
    with torch.cuda.stream(stream):
        total += 1
    torch.cuda.synchronize()
    assert total.tolist() == [3, 3, 3]


def test_a_graph_does_nothing_before_it_is_replayed():
    weight, steps = torch.ones(3, device="cuda"), torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps += 1
        doubled = (weight * 2).cumsum(0)
    assert doubled.isnan().all() and steps == 0
    for filled in (1, 5):
        weight.fill_(filled)
        graph.replay()
        assert doubled.tolist() == [2 * filled, 4 * filled, 6 * filled]
    assert steps == 2


def test_a_graph_of_a_backward_is_replayed():
    weight = torch.ones(3, device="cuda", requires_grad=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (grad,) = torch.autograd.grad(weight.square().sum(), weight)
    with torch.no_grad():
        weight.fill_(4)
    graph.replay()
    assert grad.tolist() == [8, 8, 8]


def test_operations_count_as_kernels_but_views_do_not():
    weight = torch.ones(4, 4, device="cuda")
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        weight.t()[1:].mul_(2).sum()
        torch.zeros(3) + 1
    on_device = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert on_device == ["aten.mul_.Tensor", "aten.sum.default"]


def test_memory_is_counted_in_granules_until_it_is_freed():
    kept = torch.ones(1000, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (kept * 2).sum()
    assert before == 4096
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == before + 4096 + 512


def test_compiled_functions_run_and_their_results_are_on_the_device():
    weight = torch.randn(30, device="cuda", requires_grad=True)
    compiled = torch.compile(lambda w: pdp_mask(w, 0.5).sin(), mode="max-autotune", fullgraph=True)
    found, expected = compiled(weight), pdp_mask(weight, 0.5).sin()
    assert found.device == weight.device
    torch.testing.assert_close(found, expected)
    for result in (found, expected):
        (grad,) = torch.autograd.grad(result.sum(), weight)
        assert grad.device == weight.device
        found.detach() + grad
