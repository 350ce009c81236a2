"""The ways to a threshold on CUDA: one read with a bracket, candidates, and the radix select.

Weights of more than 64 KiB pass through them; smaller ones are selected in by one block.
"""

import pytest
import torch

from instruments.host_build import ADA_SHARED_MEMORY, SAMPLED_FROM
from tests.support.selection import check_hard_mask, check_thresholds
from tests.support.weights import DISTRIBUTIONS, DTYPES, HALVES, weight_of

SIZE = 33_001  # more than 64 KiB in every dtype
WIDE = (torch.float64, torch.float32)


@pytest.fixture(params=["sampled", "digits"])
def way(request, cuda):
    """The CUDA build, with or without samples for the dtypes that have both."""
    cuda.host.sample_from(0 if request.param == "sampled" else SAMPLED_FROM)
    return cuda


@pytest.fixture
def sampled(cuda):
    cuda.host.sample_from(0)
    return cuda


def sampled_places(size, dtype):
    """Return the places that the sample of a weight reads (csrc/cuda/sample.cuh)."""
    chunk = 64 // dtype.itemsize
    least, most = {8: (4096, 8192), 4: (4096, 20480), 2: (2048, 16384)}[dtype.itemsize]
    wanted = min(max(size // 32, least), most)
    chunks, units = wanted // chunk, size // chunk
    places = []
    for i in range(chunks):
        hashed = i + 1
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            hashed = (hashed ^ hashed >> shift) * factor % 2**32
        hashed ^= hashed >> 16
        length, longer = divmod(units, chunks)
        begin = i * length + min(i, longer)
        first = (begin + (hashed * (length + (i < longer)) >> 32)) * chunk
        places.append(torch.arange(first, first + chunk))
    return torch.cat(places)


def check(cuda, weight, count, fallbacks):
    assert cuda.host.thresholds([weight], [count]).fallbacks == fallbacks
    check_thresholds(cuda, [weight], [count])
    check_hard_mask(cuda, weight, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_way_is_exact_for_every_distribution(way, distribution, dtype):
    weight = weight_of(distribution, SIZE, dtype)
    for count in (1, SIZE // 2, int(0.9 * SIZE), SIZE - 1):
        check_thresholds(way, [weight], [count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_is_exact_for_any_grid_block_order_and_alignment(way, dtype):
    storage = torch.randn(50_021).to(dtype)
    weights = [storage[1:], storage[3 : SIZE + 3], torch.randn(3).to(dtype), storage[:0]]
    counts = [40_000, 10_000, 1, 0]
    for multiprocessors in (1, 3, 40):
        for seed in range(3):
            way.host.device(multiprocessors=multiprocessors, seed=seed)
            check_thresholds(way, weights, counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", ["normal", "inf and NaN", "all NaN", "all equal"])
def test_masks_that_keep_all_weights_or_none(way, distribution, dtype):
    weight = weight_of(distribution, SIZE, dtype)
    for count in (0, 1, SIZE - 1, SIZE):
        check_hard_mask(way, weight, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.9, 0.98])
def test_the_usual_weights_are_read_once(sampled, fraction, dtype):
    size = 150_021  # a sample of 4,096 keys or more
    check(sampled, torch.randn(size).to(dtype), int(fraction * size), fallbacks=0)


ARRANGED = {
    "period 16": lambda: torch.randn(16).repeat(SIZE // 16 + 1)[:SIZE],
    "period 512": lambda: torch.randn(512).repeat(SIZE // 512 + 1)[:SIZE],
    "sorted": lambda: torch.randn(SIZE).sort().values,
    "pairs": lambda: torch.randn(SIZE // 2 + 1).repeat_interleave(2)[:SIZE],
    "7 values": lambda: torch.randint(-3, 4, (SIZE,)),
    "zeros": lambda: torch.randn(SIZE) * (torch.rand(SIZE) > 0.6),
    "equal": lambda: torch.full((SIZE,), 0.3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arranged", ARRANGED)
def test_order_and_ties_do_not_mislead_the_sample(sampled, arranged, dtype):
    weight = ARRANGED[arranged]().to(dtype)
    for count in (SIZE // 2, int(0.9 * SIZE)):
        check(sampled, weight, count, fallbacks=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_sample_fits_into_shared_memory(sampled, dtype):
    sampled.host.device(shared_memory=ADA_SHARED_MEMORY)
    weight = torch.randn(700_001).to(dtype)
    assert sampled.host.thresholds([weight], [300_000]).fallbacks == 0
    check_thresholds(sampled, [weight], [300_000])


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_the_first_and_the_last_weights_are_found_without_a_second_read(sampled, dtype):
    weight = torch.randn(SIZE).to(dtype)
    for count in (1, 2, 30, SIZE - 30, SIZE - 1):
        check(sampled, weight, count, fallbacks=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_that_misses_everything_costs_a_radix_select(sampled, dtype):
    for elsewhere in (0.5, 2.0):
        weight = elsewhere + torch.rand(SIZE) / 4
        weight[sampled_places(SIZE, dtype)] = 1.0
        check(sampled, weight.to(dtype), SIZE // 2, fallbacks=1)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_candidates_that_do_not_fit_cost_a_radix_select(sampled, dtype):
    places = sampled_places(SIZE, dtype)
    weight = 0.5 + torch.rand(SIZE, dtype=dtype) / 1e3  # all of them in the middle of the sample
    weight[places] = torch.rand(len(places), dtype=dtype)
    check(sampled, weight, SIZE // 2, fallbacks=1)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_survivors_that_do_not_fit_cost_a_radix_select(sampled, dtype):
    places = sampled_places(SIZE, dtype)
    weight = 2 * (torch.rand(SIZE) > 0.5).to(dtype)
    crowd = torch.arange(SIZE)[~torch.isin(torch.arange(SIZE), places)][:3000]
    weight[crowd] = 0.5 + torch.rand(3000, dtype=dtype) / 1e6
    weight[places] = torch.rand(len(places), dtype=dtype)
    count = int((weight < 0.5).sum()) + 1500
    check(sampled, weight, count, fallbacks=1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_bracket_with_more_keys_than_bins_costs_a_radix_select(sampled, dtype):
    exponents = (
        torch.rand(SIZE) * 80 - 40 if dtype == torch.bfloat16 else torch.rand(SIZE) * 17 - 13
    )
    weight = (2**exponents).to(dtype)
    places = sampled_places(SIZE, dtype)  # half of them at either end
    weight[places[::2]], weight[places[1::2]] = weight.min(), weight.max()
    check(sampled, weight, SIZE // 2, fallbacks=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_two_keys_may_be_any_two_neighbours_of_a_bracket(sampled, dtype):
    # With few values, v_k and v_{k+1} lie at the ends of the bracket, and inside it.
    weight = torch.arange(SIZE).remainder(9).add(1)[torch.randperm(SIZE)]
    ends = torch.arange(1, 10).mul(SIZE).div(9, rounding_mode="floor").tolist()
    for end in ends[:-1]:
        for count in (end - 1, end, end + 1, end + 2):
            check_thresholds(sampled, [weight.to(dtype)], [count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_tensors_of_a_list_may_fall_back(sampled, dtype):
    misled = 0.5 + torch.rand(SIZE) / 4
    misled[sampled_places(SIZE, dtype)] = 1.0
    weights = [torch.randn(SIZE), misled, torch.randn(50), torch.randn(SIZE), misled]
    weights = [weight.to(dtype) for weight in weights]
    counts = [SIZE // 2, SIZE // 2, 25, 30_000, 16_000]
    assert sampled.host.thresholds(weights, counts).fallbacks == 2
    for multiprocessors in (1, 5):
        sampled.host.device(multiprocessors=multiprocessors)
        check_thresholds(sampled, weights, counts)
