"""Selection and sums of weights sharded over ranks equal those of the global weights."""

import itertools

import pytest
import torch

from pdp_kernels import (
    channel_norms,
    global_prune_counts,
    hard_mask,
    hard_mask_channel,
    hard_mask_nm,
    pdp_mask,
    pdp_mask_channel,
    pdp_mask_nm,
    pdp_thresholds,
    pq_index,
)
from pdp_kernels.ops.reference import threshold_dtype
from tests.support.ranks import BACKENDS, device_of, results_on_ranks
from tests.support.sharded import assert_same_bits, global_tensor, with_collectives
from tests.support.weights import DISTRIBUTIONS, DTYPES, weight_of

RATIOS = (0.0, 0.01, 0.5, 0.9, 1.0)

# How the dimensions of a mesh shard a matrix: along its rows (0), its columns (1), or not at all.
LAYOUTS = {
    1: ["0", "1", "-"],
    2: ["00", "10", "01", "11", "-1", "0-", "--", "FSDP of tensor parallelism"],
}


def weights_of(dtype, layout):
    """Return matrices of every distribution, sharded unevenly; some have fewer rows than ranks."""
    torch.manual_seed(0)
    weights = [weight_of(name, 37 * 12, dtype).view(37, 12) for name in DISTRIBUTIONS]
    weights += [
        weight_of("inf and NaN", 60, dtype).view(5, 12),
        torch.randn(2, 64).to(dtype),
        torch.randn(64, 1).to(dtype),
        torch.zeros(0, 8).to(dtype),
    ]
    weights += [torch.randn(700, 60).to(dtype)]  # more than two tiles of sums
    if layout.startswith("FSDP"):
        weights = [weight[: weight.shape[0] // 4 * 4] for weight in weights]
    return weights


def distribute(weight, mesh, layout):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    weight = weight.to(mesh.device_type)
    if not layout.startswith("FSDP"):
        placements = [Replicate() if dim == "-" else Shard(int(dim)) for dim in layout]
        return distribute_tensor(weight, mesh, placements, src_data_rank=None)
    first, second = mesh.get_coordinate()
    shard = weight.chunk(2)[second].chunk(2)[first].contiguous()
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    return DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def all_results(weights):
    """Return, by name, the results that must not depend on how the weights are distributed."""
    finite = [weight for weight in weights if global_tensor(weight).isfinite().all()]
    half = [hard_mask(weight, 0.5) for weight in weights]
    t = torch.tensor(0.5, dtype=threshold_dtype(weights), device=weights[0].device)
    return {
        "thresholds": [pdp_thresholds(weights, ratio) for ratio in RATIOS],
        "thresholds of fractions on the device": [pdp_thresholds(weights, t)],
        "allocation": [
            torch.tensor(global_prune_counts(finite, ratio, max_layer_sparsity=cap))
            for ratio, cap in ((0.0, 1.0), (0.5, 1.0), (0.9, 1.0), (0.9, 0.95), (1.0, 1.0))
        ],
        "hard masks": [*half, *(hard_mask(weight, 0.9) for weight in weights)],
        "soft masks": [pdp_mask(weight, threshold=t) for weight in weights],
        "norms of rows": [channel_norms(weight, 0) for weight in weights],
        "norms of columns": [channel_norms(weight, 1, "rms") for weight in weights],
        "channel masks": [hard_mask_channel(weight, 0.5) for weight in weights],
        "PQ Index": [pq_index(weights), pq_index(weights, 1, 2, scope="global")],
        "PQ Index of rows": pq_index(weights, scope="neuron"),
        "PQ Index of the unpruned": [pq_index(weights, mask=half)],
    }


def cases(ranks, mesh_dims):
    """Return layouts and dtypes: all pairs on two ranks; on other numbers dtypes take turns."""
    layouts = LAYOUTS[mesh_dims]
    if ranks == 2:
        return itertools.product(layouts, DTYPES)
    first = {1: 1, 3: 2, 4: 0}[ranks]
    return [(layout, DTYPES[(first + i) % len(DTYPES)]) for i, layout in enumerate(layouts)]


def results_of_rank(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh

    results = {}
    for shape in [(ranks,), (2, 2)] if ranks == 4 else [(ranks,)]:
        mesh = init_device_mesh(device_of(rank).type, shape)
        for layout, dtype in cases(ranks, mesh.ndim):
            weights = [distribute(w, mesh, layout) for w in weights_of(dtype, layout)]
            results[layout, dtype] = {
                name: [global_tensor(value) for value in values]
                for name, values in all_results(weights).items()
            }
    return results


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def by_rank(request, backend):
    return results_on_ranks(results_of_rank, request.param, request.param, backend=backend)


@pytest.fixture(scope="module")
def expected(backend):
    """Return the results of one process on the global weights, by layout and dtype."""
    device = "cuda" if backend == "nccl" else "cpu"
    found = {}
    for dtype in DTYPES:
        even, any_size = (
            {
                name: [global_tensor(value) for value in values]
                for name, values in all_results(
                    [weight.to(device) for weight in weights_of(dtype, layout)]
                ).items()
            }
            for layout in ("FSDP", "")
        )
        found |= {
            (layout, dtype): even if layout.startswith("FSDP") else any_size
            for layout in itertools.chain(*LAYOUTS.values())
        }
    return found


@pytest.mark.parametrize(
    "name",
    [
        "thresholds",
        "thresholds of fractions on the device",
        "allocation",
        "hard masks",
        "soft masks",
        "PQ Index",
        "PQ Index of rows",
        "PQ Index of the unpruned",
    ],
)
def test_every_rank_finds_the_results_of_one_process(by_rank, expected, backend, name):
    for rank, results in enumerate(by_rank):
        for case, found in results.items():
            for index, values in enumerate(zip(found[name], expected[case][name], strict=True)):
                if backend == "nccl" and name.startswith("PQ Index"):
                    torch.testing.assert_close(*values, rtol=1e-13, atol=1e-14, equal_nan=True)
                else:
                    assert_same_bits(*values, (rank, case, index))


@pytest.mark.parametrize(
    ("name", "dim"), [("norms of rows", "0"), ("norms of columns", "1"), ("channel masks", "0")]
)
def test_channels_are_those_of_one_process(by_rank, expected, backend, name, dim):
    """Bit for bit where each shard holds whole channels; otherwise close, and alike on all ranks.

    On a GPU shorter shards have other tiles, so that their sums are close.
    """
    for rank, results in enumerate(by_rank):
        for case, found in results.items():
            is_unsharded = len(by_rank) == 1
            same_order = is_unsharded or (set(case[0]) <= {dim, "-"} and backend != "nccl")
            for index, (value, other) in enumerate(
                zip(found[name], expected[case][name], strict=True)
            ):
                assert_same_bits(value, by_rank[0][case][name][index], (rank, case, index))
                if same_order:
                    assert_same_bits(value, other, (rank, case, index))
                elif value.is_floating_point():
                    assert_close_norms(value, other)
                else:
                    assert value.sum() == other.sum()
                    tied = expected[case]["norms of rows"][index][value != other]
                    assert_close_norms(tied, tied[:1].expand_as(tied))


def assert_close_norms(value, other):
    rtol = max(1e-14, 2 * torch.finfo(value.dtype).eps)
    torch.testing.assert_close(value, other, rtol=rtol, atol=0, equal_nan=True)


def long_lists(rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device_of(rank).type, (2,))
    torch.manual_seed(0)
    results = {}
    many = [torch.randn(3 + i % 7, 5) for i in range(1000)]
    results["many"] = with_collectives(
        lambda: pdp_thresholds([distribute(weight, mesh, "0") for weight in many], 0.7)
    )
    mixed = [weight.to(DTYPES[i % 4]) for i, weight in enumerate(many[:20])]
    results["mixed"] = with_collectives(
        lambda: pdp_thresholds([distribute(weight, mesh, "0") for weight in mixed], 0.7)
    )
    # The same 2^24 weights 129 times: more than 2^31 in all.
    large = distribute(torch.randn(2**12, 2**12).bfloat16(), mesh, "0")
    results["large"] = with_collectives(lambda: pdp_thresholds([large] * 129, 0.7))
    results["one of large"] = pdp_thresholds([global_tensor(large)], 0.7)
    return results


@pytest.fixture(scope="module")
def long_list_results(backend):
    return results_on_ranks(long_lists, 2, backend=backend)


def test_a_thousand_tensors_take_as_many_collectives_as_one(long_list_results):
    torch.manual_seed(0)
    expected = pdp_thresholds([torch.randn(3 + i % 7, 5) for i in range(1000)], 0.7)
    for results in long_list_results:
        found, sent = results["many"]
        assert_same_bits(found.cpu(), expected, "many")
        assert len(sent) == 4
        assert {tensor.dtype for tensor in sent} == {torch.int64}


def test_dtypes_share_their_collectives(long_list_results):
    torch.manual_seed(0)
    weights = [torch.randn(3 + i % 7, 5).to(DTYPES[i % 4]) for i in range(20)]
    for results in long_list_results:
        found, sent = results["mixed"]
        assert_same_bits(found.cpu(), pdp_thresholds(weights, 0.7), "mixed")
        assert len(sent) == 7  # six digits of float64, and the minimum


def test_more_than_two_billion_weights_are_exact(long_list_results):
    for results in long_list_results:
        found, sent = results["large"]
        assert (found.cpu() == results["one of large"]).all()
        assert len(sent) == 3  # two digits of 16 bits


def groups_of_ranks(rank):
    from torch.distributed.device_mesh import init_device_mesh

    device = device_of(rank).type
    mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 40, 8).unbind()
    lists = {
        "nested": [
            distribute(a, mesh, "01"),
            distribute(b, mesh, "0-"),
            c.to(device),
            distribute(c, mesh, "--"),
        ],
        # As FSDP of a model that is tensor parallel in part. The smaller mesh does not say that
        # the other ranks hold replicas.
        "on a part of the mesh": [distribute(a, mesh, "01"), distribute(b, mesh["data"], "0")],
        "apart": [distribute(a, mesh["tensor"], "0"), distribute(b, mesh["data"], "1")],
        "replicated": [a.to(device), distribute(b, mesh, "--")],
        "two dimensions of three": [distribute(a, init_device_mesh(device, (2, 1, 2)), "00-")],
    }
    return {
        name: (
            *with_collectives(lambda weights=weights: pdp_thresholds(weights, 0.6)),
            global_prune_counts(weights, 0.6),
        )
        for name, weights in lists.items()
    }


def test_a_list_on_several_meshes_takes_the_fewest_groups(backend):
    """One group if it holds replicas of all weights; none for weights that every rank holds."""
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 40, 8).unbind()
    lists = {
        "nested": ([a, b, c, c], 4),
        "on a part of the mesh": ([a, b], 8),
        "apart": ([a, b], 8),
        "replicated": ([a, b], 0),
        "two dimensions of three": ([a], 4),
    }
    for results in results_on_ranks(groups_of_ranks, 4, backend=backend):
        for name, (weights, count) in lists.items():
            found, sent, counts = results[name]
            assert_same_bits(found.cpu(), pdp_thresholds(weights, 0.6), name)
            assert counts == global_prune_counts(weights, 0.6)
            assert len(sent) == count


def masks_of_groups(rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device_of(rank).type, (2,))
    torch.manual_seed(0)
    weight = torch.randn(6, 12)
    rows, columns = (distribute(weight, mesh, layout).requires_grad_() for layout in "01")
    results = {
        "hard": global_tensor(hard_mask_nm(rows, 1, 4)),
        "soft": global_tensor(pdp_mask_nm(rows, 1, 4).detach()),
    }
    # Six columns a rank: groups of three fit, groups of four are cut.
    results["fitting"] = global_tensor(hard_mask_nm(columns, 2, 3))
    with pytest.raises(ValueError, match="must not be sharded through groups of 4 along dim -1"):
        hard_mask_nm(columns, 2, 4)
    masked = pdp_mask(columns, 0.5, tau=0.1)
    (masked * masked).sum().backward()
    results["gradient"] = global_tensor(columns.grad)
    return results


def test_masks_of_groups_and_gradients_are_those_of_one_process(backend):
    torch.manual_seed(0)
    weight = torch.randn(6, 12, requires_grad=True)
    masked = pdp_mask(weight, 0.5, tau=0.1)
    (masked * masked).sum().backward()
    for results in results_on_ranks(masks_of_groups, 2, backend=backend):
        assert torch.equal(results["hard"], hard_mask_nm(weight, 1, 4))
        assert torch.equal(results["fitting"], hard_mask_nm(weight, 2, 3))
        torch.testing.assert_close(results["soft"], pdp_mask_nm(weight, 1, 4).detach())
        torch.testing.assert_close(results["gradient"], weight.grad)


def mistakes(rank):
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = init_device_mesh(device_of(rank).type, (2,))
    weight = torch.randn(4, 4, device=mesh.device_type)
    partial = DTensor.from_local(weight, mesh, [Partial()])
    with pytest.raises(ValueError, match=r"weights\[0\] must have placements Shard and Replicate"):
        pdp_thresholds([partial], 0.5)
    sharded = distribute(weight, mesh, "0")
    with pytest.raises(TypeError, match="weight must be a plain tensor, got a DTensor"):
        pdp_mask_channel(sharded, 0.5)
    with pytest.raises(ValueError, match="mask must be distributed as the weight is"):
        pq_index(sharded, mask=weight > 0)
    # The placements give each rank two of the four rows, and the shard has three.
    given = {"run_check": False, "shape": weight.shape, "stride": weight.stride()}
    unaccounted = DTensor.from_local(weight[:3], mesh, [Shard(0)], **given)
    with pytest.raises(ValueError, match=r"has a shard of shape \(3, 4\), which its placements"):
        channel_norms(unaccounted, 0)
    of_rank_0 = distribute(weight, DeviceMesh(mesh.device_type, [0]), "0")
    if rank == 1:
        with pytest.raises(ValueError, match="must be on a device mesh that has this rank"):
            pdp_thresholds([of_rank_0], 0.5)


def test_bad_arguments_raise_on_every_rank(backend):
    results_on_ranks(mistakes, 2, backend=backend)
