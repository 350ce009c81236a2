"""What only a GPU can show: graphs, streams, launches and the absence of waiting."""

import pytest
import torch

from pdp_kernels import (
    PDPConfig,
    PDPPruner,
    build_info,
    hard_mask,
    pdp_mask,
    pdp_threshold,
    pdp_thresholds,
    pq_index,
    reference,
)

pytestmark = pytest.mark.gpu


def layers(sizes=(1000, 70_001, 3), dtypes=(torch.float32, torch.bfloat16, torch.float64)):
    return [torch.randn(n, device="cuda").to(d) for n, d in zip(sizes, dtypes, strict=True)]


def test_every_backend_is_live():
    assert all(build_info()["backends"].values()), build_info()["reasons"]


def captured(call):
    """A CUDA graph of a call, warmed up on a side stream as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_graph_of_thresholds_follows_weights_and_ratios():
    weights = layers()
    ratio = torch.tensor(0.5, device="cuda", dtype=torch.float64)
    graph, thresholds = captured(lambda: pdp_thresholds(weights, ratio))
    for new_ratio in (0.5, 0.9, 0.0, 1.0):
        for weight in weights:
            weight.copy_(torch.randn_like(weight))
        ratio.fill_(new_ratio)
        thresholds.fill_(torch.nan)
        graph.replay()
        assert torch.equal(thresholds, pdp_thresholds(weights, new_ratio))


def test_graph_of_a_hard_mask_follows_the_weight():
    weight = torch.randint(-3, 4, (50_021,), device="cuda").float()
    graph, kept = captured(lambda: hard_mask(weight, 0.6))
    for _ in range(3):
        weight.copy_(torch.randint(-3, 4, (50_021,), device="cuda"))
        graph.replay()
        assert torch.equal(kept, hard_mask(weight, 0.6))


@pytest.mark.parametrize("digit", [0, 1, 2])
def test_graph_of_digit_counts_follows_weights_and_prefixes(digit):
    weights = layers(dtypes=(torch.float32,) * 3)
    prefixes = torch.zeros(3, dtype=torch.int64, device="cuda")
    graph, results = captured(lambda: torch.ops.pdp.digit_counts(weights, prefixes, digit))
    for largest in (1.0, 4.0):
        for weight in weights:
            weight.uniform_(-largest, largest)
        keys = reference.magnitude_keys(torch.stack([w.median().abs() for w in weights]))
        prefixes.copy_(keys >> (31, 20, 10)[digit])
        graph.replay()
        expected = reference.digit_counts(weights, prefixes, digit)
        assert all(map(torch.equal, results, expected))


def test_graph_of_a_pq_index_follows_the_weights():
    weights = layers()
    graph, index = captured(lambda: pq_index(weights))
    for _ in range(3):
        for weight in weights:
            weight.copy_(torch.randn_like(weight))
        graph.replay()
        assert torch.equal(index, pq_index(weights))


def test_graph_of_a_training_step_follows_weight_ratio_and_temperature():
    weight = torch.randn(4099, device="cuda", requires_grad=True)
    ratio = torch.tensor(0.5, device="cuda", dtype=torch.float64)
    tau = torch.tensor(0.1, device="cuda")

    def step():
        w_hat = pdp_mask(weight, ratio, tau=tau)
        return w_hat, *torch.autograd.grad(w_hat.square().sum(), weight)

    graph, results = captured(step)
    for new_ratio, new_tau in ((0.5, 0.1), (0.8, 0.01), (0.9, 1.0)):
        with torch.no_grad():
            weight.normal_()
        ratio.fill_(new_ratio)
        tau.fill_(new_tau)
        graph.replay()
        for result, expected in zip(results, step(), strict=True):
            assert torch.equal(result, expected)


def test_graph_keeps_no_memory_of_the_host():
    """Ratios given as numbers stay right after the host lists that held them are gone."""
    weights = layers()
    graph, thresholds = captured(lambda: pdp_thresholds(weights, [0.1, 0.5, 0.9]))
    expected = pdp_thresholds(weights, [0.1, 0.5, 0.9])
    garbage = [torch.randint(0, 255, (1 << 16,), dtype=torch.uint8).pin_memory() for _ in range(64)]
    thresholds.fill_(torch.nan)
    graph.replay()
    assert torch.equal(thresholds, expected)
    del garbage


def test_two_streams_at_once():
    weights = [torch.randn(1 << 20, device="cuda") for _ in range(2)]
    expected = [pdp_threshold(weight, 0.9) for weight in weights]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for weight, stream in zip(weights, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(pdp_threshold(weight, 0.9))
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))


def test_nothing_waits_for_the_device():
    weights = [weight.requires_grad_() for weight in layers()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        pdp_thresholds(weights, [0.1, 0.5, 0.9])
        hard_mask(weights[0], 0.5)
        pdp_mask(weights[0], 0.5).sum().backward()
        pq_index(weights, mask=[weights[0] > 0, None, None])
        pq_index(weights, 0.3, 1.7, scope="neuron")
        prefixes = torch.zeros(1, dtype=torch.int64, device="cuda")
        torch.ops.pdp.digit_counts([weights[0].detach()], prefixes, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def network(depth):
    layers = [torch.nn.Linear(64, 64, device="cuda") for _ in range(depth)]
    return torch.nn.Sequential(*layers)


def test_a_step_of_the_pruner_does_not_wait_for_the_device():
    model = network(3)
    pruner = PDPPruner(model, PDPConfig(0.9, warmup=1, ramp=4))
    pruner.step(1)  # shares out the budget, which does wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for progress in (2, 3, 4, 5):
            model(torch.ones(2, 64, device="cuda")).sum().backward()
            pruner.step(progress)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_training_step_follows_the_schedule():
    model = network(2)
    pruner = PDPPruner(model, PDPConfig(0.9, warmup=0, ramp=4))
    inputs = torch.randn(8, 64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad()
            model(inputs).square().sum().backward()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    model.zero_grad()
    with torch.cuda.graph(graph):
        outputs = model(inputs)
        outputs.square().sum().backward()
    for progress in (0, 1, 2, 3, 4):
        pruner.step(progress)
        graph.replay()
        assert torch.equal(outputs, model(inputs))


def launches(call):
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages())


def test_launches_do_not_grow_with_the_list():
    few = [torch.randn(5000, device="cuda") for _ in range(2)]
    many = [torch.randn(5000, device="cuda") for _ in range(300)]
    zeros = torch.zeros(300, dtype=torch.int64, device="cuda")

    def counts(weights):
        return torch.ops.pdp.digit_counts(weights, zeros[: len(weights)], 2)

    for call in (lambda weights: pdp_thresholds(weights, 0.9), pq_index, counts):
        assert launches(lambda call=call: call(many)) == launches(lambda call=call: call(few))
    steps = [PDPPruner(network(depth), PDPConfig(0.9, warmup=0, ramp=1)).step for depth in (2, 60)]
    assert launches(lambda: steps[0](1)) == launches(lambda: steps[1](1))


def test_mask_at_more_than_2_to_31_elements():
    size = 2**31 + 5
    weight = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    weight[-2:] = torch.tensor([1.0, 0.25])
    w_hat = pdp_mask(weight, threshold=torch.tensor(0.5, device="cuda"))
    assert w_hat[-2:].tolist() == [1, 0]
    assert not w_hat[:-2].any()


def test_digit_counts_of_more_than_2_to_31_elements():
    size = 2**31 + 5
    weight = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    weight[-2:] = torch.tensor([1.0, 0.25])
    prefixes = torch.zeros(1, dtype=torch.int64, device="cuda")
    counts, above = torch.ops.pdp.digit_counts([weight], prefixes, 1)
    assert counts[0, 0] == counts.sum() == size - 2
    assert above.item() == reference.magnitude_keys(weight[-1:]).item()


def test_pq_index_of_more_than_2_to_31_elements():
    size = 2**31 + 5
    weight = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    weight[-2:] = torch.tensor([1.0, 0.25])
    assert pq_index(weight).item() == pytest.approx(1 - 1.5**2 / 1.25 / size, rel=1e-12)


def test_a_second_device_is_served_where_there_is_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    weight = torch.randn(1000, device="cuda:1", requires_grad=True)
    w_hat = pdp_mask(weight, 0.5)
    w_hat.sum().backward()
    assert w_hat.device == weight.grad.device == weight.device
