"""The CUDA kernels on a model of a GPU: launches, grids, counters, candidates of thresholds."""

import pytest
import torch

from instruments.host_build import ADA_SHARED_MEMORY, SAMPLED_FROM
from pdp_kernels.functional.pq_index import index_of
from tests.support.selection import (
    check_digit_counts,
    check_digit_counts_of_sizes,
    check_hard_mask,
    check_thresholds,
)
from tests.support.sums import exact_sums
from tests.support.weights import DTYPES


def test_count_beyond_the_weight_prunes_all_and_below_zero_none(cuda):
    weight = torch.randn(100)
    found = cuda.host.thresholds([weight, weight], [101, -1])
    assert found.thresholds.tolist() == [float("inf"), float("-inf")]


@pytest.mark.parametrize("tensors", [1, 2, 17, 300, 800])
def test_lists_may_have_several_dtypes_and_sizes(cuda, tensors):
    generator = torch.Generator().manual_seed(tensors)
    draw = lambda high: int(torch.randint(high, (1,), generator=generator))  # noqa: E731
    weights, counts = [], []
    for i in range(tensors):
        size = [0, 1, 37, 1000, 9001, 40000][draw(6) if tensors < 100 else draw(4)]
        weights.append(torch.randn(size).to(DTYPES[(i + draw(4)) % 4]))
        counts.append(draw(size + 1))
    if tensors >= 17:
        weights[7], counts[7] = torch.randn(70001), 60000
        weights[11], counts[11] = torch.randn(70001).to(torch.bfloat16), 60000
    check_thresholds(cuda, weights, counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_does_not_depend_on_grid_or_block_order(cuda, dtype):
    weights = [torch.randn(size).to(dtype) for size in (50021, 3, 0, 20011, 9000)]
    counts = [40000, 1, 0, 10000, 8999]
    for multiprocessors in (1, 3, 40):
        for seed in range(3):
            cuda.host.device(multiprocessors=multiprocessors, seed=seed)
            check_thresholds(cuda, weights, counts)


@pytest.mark.parametrize("tensors", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_counters_do_not_overflow(cuda, dtype, tensors):
    # One block counts more than 65,535 equal weights, of one tensor or of several.
    cuda.host.device(multiprocessors=2 if tensors > 1 else 1)
    weights = []
    for i in range(tensors):
        weight = torch.full((150001 if i % 2 == 0 else 70001,), 0.25 + i).to(dtype)
        weight[:10] = 0.125
        weights.append(weight)
    counts = [9, 10, 11, 70000, 5][:tensors]
    for shift in range(2):
        shifted = [counts[(i + shift) % tensors] for i in range(tensors)]
        check_thresholds(cuda, weights, shifted)


@pytest.mark.parametrize("sampled", [False, True], ids=["digits", "sampled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_least_shared_memory_of_all_devices_is_enough(cuda, dtype, sampled):
    cuda.host.sample_from(0 if sampled else SAMPLED_FROM)
    cuda.host.device(shared_memory=ADA_SHARED_MEMORY)
    check_thresholds(cuda, [torch.randn(size).to(dtype) for size in (40009, 5)], [30000, 4])
    check_hard_mask(cuda, torch.randn(40009).to(dtype), 30000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_candidates_are_collected_when_they_fit(cuda, dtype):
    weight = torch.randn(60013, dtype=dtype)
    candidates = cuda.host.thresholds([weight], [50000]).candidates
    assert 0 < candidates.item() <= weight.numel() // 8
    check_thresholds(cuda, [weight], [50000])


def test_candidates_that_do_not_fit_are_read_again_from_the_weights(cuda):
    weight = 1 + torch.rand(60013) / 512
    assert cuda.host.thresholds([weight], [30000]).candidates.item() == 0
    check_thresholds(cuda, [weight], [30000])


def test_candidates_crowded_in_one_place_pass_through_the_stage(cuda):
    # Rounds in which all weights are candidates, after one that leaves the stage partly filled.
    cuda.host.device(multiprocessors=1)
    for partly in (100, 1000, 2000, 8000):
        weight = 1 + torch.rand(400009)
        first, candidates = 8192 - partly, 33333 + partly
        weight[first : first + candidates] = 0.29 + torch.rand(candidates) / 64
        assert cuda.host.thresholds([weight], [16000]).candidates.item() == candidates
        check_thresholds(cuda, [weight], [16000])


def test_candidates_of_a_slice_smaller_than_a_packet(cuda):
    # Twenty full tiles of 16 KiB and three weights more, a block for each.
    for seed in range(5):
        cuda.host.device(multiprocessors=40, seed=seed)
        weight = 1 + torch.rand(20 * 4096 + 3)
        weight[-1003:] = 0.29 + torch.rand(1003) / 64
        assert cuda.host.thresholds([weight], [1002]).candidates.item() == 1003
        check_thresholds(cuda, [weight], [1002])


def test_candidates_of_the_last_bin_are_all_there(cuda):
    # The k-th and k+1-th differ in the first, second or third digit, or only in the last bit.
    for step in (2.0**-1, 2.0**-6, 2.0**-14, 2.0**-23):
        weight = torch.cat([torch.full((5000,), 1.0), torch.full((5000,), 1.0 + step)])
        weight = weight[torch.randperm(10000)]
        for count in (4999, 5000, 5001):
            check_thresholds(cuda, [weight], [count])


@pytest.mark.parametrize(
    ("dtype", "launches"),
    [(torch.float64, 7), (torch.float32, 4), (torch.bfloat16, 4), (torch.float16, 4)],
    ids=str,
)
def test_number_of_launches_does_not_depend_on_the_list(cuda, dtype, launches):
    for tensors in (1, 2, 50):
        cuda.host.thresholds([torch.randn(33000).to(dtype)] * tensors, [20] * tensors)
        assert cuda.host.launches() == launches


@pytest.mark.parametrize(
    ("dtype", "launches"), [(torch.float64, 9), (torch.float32, 6), (torch.bfloat16, 4)], ids=str
)
def test_number_of_launches_with_samples_does_not_depend_on_the_list(cuda, dtype, launches):
    cuda.host.sample_from(0)
    for tensors in (1, 20):
        cuda.host.thresholds([torch.randn(33000).to(dtype)] * tensors, [20] * tensors)
        assert cuda.host.launches() == launches


@pytest.mark.parametrize(("tensors", "launches"), [(1, 1), (16, 1), (768, 1), (1000, 2)])
def test_small_tensors_take_one_launch_for_each_chunk_of_the_table(cuda, tensors, launches):
    weights = [torch.randn(1 + i % 70) for i in range(tensors)]
    check_thresholds(cuda, weights, [len(weight) // 2 for weight in weights])
    assert cuda.host.launches() == launches


def test_number_of_launches_adds_up_over_key_widths(cuda):
    weights = [torch.randn(33000).to(dtype) for dtype in DTYPES]
    cuda.host.thresholds(weights, [20] * len(weights))
    assert cuda.host.launches() == 7 + 4 + 4


def test_kernels_overlap_only_if_the_code_that_the_device_loads_waits_for_earlier_ones(cuda):
    """Devices may load code for 8.0 that their driver compiles from PTX, and that has no wait."""
    try:
        for device, (architecture, overlapped) in enumerate(((90, 3), (80, 0), (89, 0), (100, 3))):
            cuda.host.loads_code_for(architecture, device)
            for _ in range(2):
                check_thresholds(cuda, [torch.randn(30_000)], [15_000])
                assert cuda.host.overlapped_launches() == overlapped
    finally:
        cuda.host.loads_code_for(90, device=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_mask_of_misaligned_weights_is_exact_in_any_block_order(cuda, dtype):
    storage = torch.randint(-9, 10, (70000,)).to(dtype)
    for seed, offset in enumerate([0, 1, 3]):
        weight = storage[offset : offset + 65003]
        cuda.host.device(multiprocessors=1 + 2 * seed, seed=seed)
        for count in (1000, 33333):
            check_hard_mask(cuda, weight, count)


def test_hard_mask_takes_two_launches_more_than_the_threshold(cuda):
    for size, launches in ((10, 1), (30000, 4)):
        cuda.host.hard_mask(torch.zeros(size), size // 2)
        assert cuda.host.launches() == launches + 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_mask_is_exact_for_any_number_of_ties_in_a_unit(cuda, dtype):
    # Few enough to be noted, too many, and units without any.
    weight = torch.rand(40009).add(2).to(dtype)
    weight[torch.randperm(5000)[:20]] = 1
    weight[20000:24000] = 1
    weight[-3:] = 1
    for count in (1, 10, 20, 21, 2000, 4020, 4022, 4023):
        check_hard_mask(cuda, weight, count)


@pytest.mark.parametrize("tensors", [1, 32, 33, 5000])
def test_prune_counts_round_half_up_and_stay_in_range(cuda, tensors):
    sizes = [(7919 * i) % 4099 for i in range(tensors)]
    sparsities = [(i % 101) / 100 for i in range(tensors)]
    expected = [min(n, int(r * n + 0.5)) for n, r in zip(sizes, sparsities, strict=True)]
    assert cuda.host.prune_counts(sizes, sparsities) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digit_counts_of_every_size_are_exact_for_any_grid_and_block_order(cuda, dtype):
    for seed, multiprocessors in enumerate((1, 40)):
        cuda.host.device(multiprocessors=multiprocessors, seed=seed)
        check_digit_counts_of_sizes(cuda, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digit_counts_of_misaligned_weights_are_exact(cuda, dtype):
    storage = torch.randn(9000).to(dtype)
    for offset in range(16 // dtype.itemsize + 1):
        weights = [storage[offset : offset + 8507], storage[offset : offset + 3]]
        check_digit_counts(cuda, weights)


def test_digit_counts_of_empty_weights_take_one_launch(cuda):
    check_digit_counts(cuda, [torch.empty(0)] * 2)
    assert cuda.host.launches() == 1


@pytest.mark.parametrize(("tensors", "launches"), [(1, 2), (16, 2), (17, 2), (768, 2), (1000, 3)])
def test_digit_counts_take_as_many_launches_for_any_list(cuda, tensors, launches):
    weights = [torch.randn(1 + i % 7) for i in range(tensors)]
    check_digit_counts(cuda, weights)
    assert cuda.host.launches() == launches


def test_power_sums_are_the_same_for_any_grid_and_block_order(cuda):
    weights = [torch.randn(size) for size in (50021, 3, 0, 20011, 9000)]
    masks = [torch.rand(len(weight)) < 0.5 for weight in weights]
    first = cuda.power_sums(weights, masks, 0.5, 1.0, False)
    for multiprocessors in (1, 3, 40):
        for seed in range(3):
            cuda.host.device(multiprocessors=multiprocessors, seed=seed)
            assert torch.equal(cuda.power_sums(weights, masks, 0.5, 1.0, False), first)


@pytest.mark.parametrize(("size", "launches"), [(50, 2), (4097, 3)])
def test_power_sums_take_as_many_launches_for_any_list(cuda, size, launches):
    for tensors in (1, 2, 300):
        weights = [torch.randn(size).to(DTYPES[i % 4]) for i in range(tensors)]
        found = cuda.power_sums(weights, [None] * tensors, 0.5, 1.0, False)
        assert cuda.host.launches() == launches
        assert (found[:, 0] == size).all()


def test_power_sums_of_a_list_longer_than_a_chunk_of_the_table_are_exact(cuda):
    weights = [torch.full((1 + i % 7,), 4.0) for i in range(1000)]
    found = cuda.power_sums(weights, [None] * 1000, 0.5, 1.0, False)
    sizes = torch.tensor([float(len(weight)) for weight in weights]).double()
    assert torch.equal(found, torch.stack([sizes, 2 * sizes, 4 * sizes], dim=1))


def test_power_sums_of_few_and_of_many_tiles_are_the_same_in_any_list(cuda):
    """One block adds 32 or 320 tiles side by side, and up to 2,560 before it loads more."""
    tile = 4096
    sizes = [2 * tile, 32 * tile, 33 * tile + 5, 320 * tile, 321 * tile - 9, 2600 * tile]
    for size in sizes:
        equal = torch.full((size,), 4.0, dtype=torch.bfloat16)
        found = cuda.power_sums([equal], [None], 1.0, 2.0, False)
        assert found.tolist() == [[size, 4 * size, 16 * size]]
    weights = [torch.randn(size) for size in sizes[:4]]
    alone = [cuda.power_sums([weight], [None], 1.0, 2.0, False) for weight in weights]
    assert torch.equal(cuda.power_sums(weights, [None] * 4, 1.0, 2.0, False), torch.cat(alone))


NARROW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_power_sums_of_equal_weights_are_the_same_at_every_address(cuda, dtype):
    def moved(tensor, offset):
        return torch.cat([torch.zeros(offset, dtype=tensor.dtype), tensor])[offset:]

    weight, mask = torch.randn(9001).to(dtype), torch.rand(9001) < 0.5
    for kept in (None, mask):
        first = cuda.power_sums([weight], [kept], 0.5, 1.0, False)
        for offset in range(1, 9):
            masks = [kept, None if kept is None else moved(kept, offset)]
            found = cuda.power_sums([moved(weight, offset)] * 2, masks, 0.5, 1.0, False)
            assert torch.equal(found, first.expand(2, -1))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sums_of_roots_have_a_tenth_of_the_error_that_is_allowed(cuda, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    for scale in (1.0, tiny, torch.finfo(dtype).max / 8):
        weight = (torch.randn(50_021).double() * scale).to(dtype)
        found = cuda.power_sums([weight], [None], 0.5, 1.0, False)[0]
        expected = exact_sums(weight, None, 0.5, 1.0)[0]
        assert found[1:].tolist() == pytest.approx([float(e) for e in expected[1:]], rel=1e-14)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_equal_magnitudes_have_index_0(cuda, dtype):
    for value in (0.3, 0.7, 1.1, 1e-5, 2.9e-38, 60000.0):
        weight = torch.full((40_001,), value, dtype=dtype)
        index = index_of(cuda.power_sums([weight], [None], 0.5, 1.0, False), 0.5, 1.0)
        assert index.abs() <= 2e-14
