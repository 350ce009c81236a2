"""The CUDA kernels' own sources, compiled for the CPU by instruments/host_cuda, against a sort."""

import pytest
import torch

from instruments.build import CXX
from instruments.host_build import ADA_SHARED_MEMORY, HOPPER_SHARED_MEMORY, TYPES, HostBuild
from tests.distributed import test_digit_counts
from tests.functional import test_pq_index
from tests.support.cases import denormals, with_special_values

DTYPES = list(TYPES)

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def built():
    return HostBuild()


@pytest.fixture
def host(built):
    built.device()
    return built


def expected_threshold(weight, count):
    size = weight.numel()
    if count <= 0 or size == 0:
        return float("-inf")
    if count >= size:
        return float("inf")
    ordered = weight.double().abs().sort().values
    low, high = ordered[count - 1].item(), ordered[count].item()
    middle = 0.5 * low + 0.5 * high if high > 1 else 0.5 * (low + high)
    if weight.dtype == torch.float64:
        return middle
    return torch.tensor(middle, dtype=torch.float64).float().double().item()


def expected_mask(weight, count):
    order = weight.double().abs().sort(stable=True).indices
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[order[: max(count, 0)]] = False
    return kept


def assert_same(actual, expected):
    expected = torch.tensor(expected, dtype=actual.dtype)
    assert torch.equal(actual.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0)), (
        actual,
        expected,
    )


def counts_to_try(size):
    return sorted({0, min(1, size), size // 2, max(size - 1, 0), size})


def check(host, weight, counts=None):
    counts = counts_to_try(weight.numel()) if counts is None else counts
    for count in counts:
        thresholds, _ = host.thresholds([weight], [count])
        assert_same(thresholds, [expected_threshold(weight, count)])


def with_specials(size):
    weight = torch.randn(size)
    weight[:: max(size // 7, 1)] = float("nan")
    weight[1 :: max(size // 9, 1)] = float("inf")
    weight[2 :: max(size // 11, 1)] = float("-inf")
    weight[3 :: max(size // 13, 1)] = -0.0
    return weight


DISTRIBUTIONS = {
    "normal": lambda n: torch.randn(n, dtype=torch.float64),
    "uniform": lambda n: torch.rand(n, dtype=torch.float64),
    "cauchy": lambda n: torch.empty(n, dtype=torch.float64).cauchy_(),
    "few values": lambda n: torch.randint(-3, 4, (n,)) / 7,
    "all equal": lambda n: torch.full((n,), -0.3),
    "shared prefix": lambda n: 1 + torch.rand(n, dtype=torch.float64) / 512,
    "float32 denormals": lambda n: torch.randn(n, dtype=torch.float64) * 1e-40,
    "float64 denormals": lambda n: torch.randn(n, dtype=torch.float64) * 1e-310,
    "float16 denormals": lambda n: torch.randn(n, dtype=torch.float64) * 1e-5,
    "zeros of both signs": lambda n: torch.randint(0, 2, (n,)) * -2.0 * 0.0,
    "inf and nan": with_specials,
    "all nan": lambda n: torch.full((n,), float("nan")),
    "huge": lambda n: torch.rand(n, dtype=torch.float64) * 1e300,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_threshold_is_exact_for_every_distribution(host, distribution, dtype):
    weight = DISTRIBUTIONS[distribution](10007).to(dtype)
    check(host, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 31, 33, 4097, 8191, 99991])
def test_threshold_is_exact_for_every_size(host, size, dtype):
    weight = torch.randn(size).to(dtype)
    counts = [size // 2, size * 9 // 10] if size > 10000 else None
    check(host, weight, counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_is_exact_for_every_alignment(host, dtype):
    storage = torch.randn(9000).to(dtype)
    for offset in range(16 // dtype.itemsize + 1):
        check(host, storage[offset : offset + 8507], [4000])
        check(host, storage[offset : offset + 3], [1, 2])


def test_count_beyond_the_weight_prunes_all_and_below_zero_none(host):
    weight = torch.randn(100)
    thresholds, _ = host.thresholds([weight, weight], [101, -1])
    assert thresholds.tolist() == [float("inf"), float("-inf")]


@pytest.mark.parametrize("tensors", [1, 2, 17, 300, 800])
def test_list_of_mixed_types_and_sizes(host, tensors):
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
    thresholds, _ = host.thresholds(weights, counts)
    assert_same(
        thresholds, [expected_threshold(w, k) for w, k in zip(weights, counts, strict=True)]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_does_not_depend_on_grid_or_block_order(host, dtype):
    weights = [torch.randn(size).to(dtype) for size in (50021, 3, 0, 20011, 9000)]
    counts = [40000, 1, 0, 10000, 8999]
    expected = [expected_threshold(w, k) for w, k in zip(weights, counts, strict=True)]
    for multiprocessors in (1, 3, 40):
        for seed in range(3):
            host.device(multiprocessors=multiprocessors, seed=seed)
            thresholds, _ = host.thresholds(weights, counts)
            assert_same(thresholds, expected)


@pytest.mark.parametrize("tensors", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared_memory", [HOPPER_SHARED_MEMORY, ADA_SHARED_MEMORY])
def test_half_precision_counters_do_not_overflow(host, shared_memory, dtype, tensors):
    # One block counts more than 65,535 equal weights, of one tensor or of several.
    host.device(multiprocessors=2 if tensors > 1 else 1, shared_memory=shared_memory)
    weights = []
    for i in range(tensors):
        weight = torch.full((150001 if i % 2 == 0 else 70001,), 0.25 + i).to(dtype)
        weight[:10] = 0.125
        weights.append(weight)
    counts = [9, 10, 11, 70000, 5][:tensors]
    for shift in range(2):
        shifted = [counts[(i + shift) % tensors] for i in range(tensors)]
        thresholds, _ = host.thresholds(weights, shifted)
        assert_same(
            thresholds, [expected_threshold(w, k) for w, k in zip(weights, shifted, strict=True)]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_counters_count_as_wide_ones(host, dtype):
    weights = [torch.randn(size).to(dtype) for size in (30011, 700, 5)]
    counts = [20000, 350, 4]
    host.device(shared_memory=ADA_SHARED_MEMORY)
    thresholds, _ = host.thresholds(weights, counts)
    assert_same(
        thresholds, [expected_threshold(w, k) for w, k in zip(weights, counts, strict=True)]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_candidates_are_collected_when_they_fit(host, dtype):
    weight = torch.randn(60013, dtype=dtype)
    thresholds, buffered = host.thresholds([weight], [50000])
    assert 0 < buffered.item() <= weight.numel() // 8
    assert_same(thresholds, [expected_threshold(weight, 50000)])


def test_candidates_that_do_not_fit_are_read_again_from_the_weights(host):
    weight = 1 + torch.rand(60013) / 512
    thresholds, buffered = host.thresholds([weight], [30000])
    assert buffered.item() == 0
    assert_same(thresholds, [expected_threshold(weight, 30000)])


def test_candidates_crowded_in_one_place_pass_through_the_stage(host):
    # Rounds in which all weights are candidates, after one that leaves the stage partly filled.
    host.device(multiprocessors=1)
    for partly in (100, 1000, 2000, 8000):
        weight = 1 + torch.rand(400009)
        first, candidates = 8192 - partly, 33333 + partly
        weight[first : first + candidates] = 0.29 + torch.rand(candidates) / 64
        thresholds, buffered = host.thresholds([weight], [16000])
        assert buffered.item() == candidates
        assert_same(thresholds, [expected_threshold(weight, 16000)])


def test_candidates_of_a_share_smaller_than_a_packet(host):
    # Twenty full tiles of 16 KiB and three weights more, a block for each.
    for seed in range(5):
        host.device(multiprocessors=40, seed=seed)
        weight = 1 + torch.rand(20 * 4096 + 3)
        weight[-1003:] = 0.29 + torch.rand(1003) / 64
        thresholds, buffered = host.thresholds([weight], [1002])
        assert buffered.item() == 1003
        assert_same(thresholds, [expected_threshold(weight, 1002)])


def test_candidates_of_the_last_bin_are_all_there(host):
    # The k-th and k+1-th differ in the first, second or third digit, or only in the last bit.
    for step in (2.0**-1, 2.0**-6, 2.0**-14, 2.0**-23):
        weight = torch.cat([torch.full((5000,), 1.0), torch.full((5000,), 1.0 + step)])
        check(host, weight[torch.randperm(10000)], [4999, 5000, 5001])


@pytest.mark.parametrize(
    ("dtype", "launches"),
    [(torch.float64, 7), (torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)],
    ids=str,
)
def test_number_of_launches_does_not_depend_on_the_list(host, dtype, launches):
    for tensors in (1, 2, 40, 300):
        host.thresholds([torch.randn(50).to(dtype)] * tensors, [20] * tensors)
        assert host.launches() == launches


def test_number_of_launches_adds_up_over_key_widths(host):
    weights = [torch.randn(50).to(dtype) for dtype in DTYPES] * 20
    host.thresholds(weights, [20] * len(weights))
    assert host.launches() == 7 + 4 + 2


MASK_DISTRIBUTIONS = ["normal", "few values", "all equal", "inf and nan", "zeros of both signs"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", MASK_DISTRIBUTIONS)
def test_hard_mask_prunes_exactly_k_lowest_index_first(host, distribution, dtype):
    for size in (1, 33, 4097, 20011):
        weight = DISTRIBUTIONS[distribution](size).to(dtype)
        for count in counts_to_try(size):
            kept = host.hard_mask(weight, count)
            assert kept.sum().item() == size - count
            assert torch.equal(kept, expected_mask(weight, count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_mask_of_misaligned_weights_and_any_block_order(host, dtype):
    storage = torch.randint(-9, 10, (70000,)).to(dtype)
    for seed, offset in enumerate([0, 1, 3]):
        weight = storage[offset : offset + 65003]
        host.device(multiprocessors=1 + 2 * seed, seed=seed)
        for count in (1000, 33333):
            assert torch.equal(host.hard_mask(weight, count), expected_mask(weight, count))


def test_hard_mask_takes_two_launches_more_than_the_threshold(host):
    for size in (10, 30000):
        host.hard_mask(torch.zeros(size), size // 2)
        assert host.launches() == 4 + 2


@pytest.mark.parametrize("tensors", [1, 32, 33, 5000])
def test_prune_counts_round_half_up_and_stay_in_range(host, tensors):
    sizes = [(7919 * i) % 4099 for i in range(tensors)]
    sparsities = [(i % 101) / 100 for i in range(tensors)]
    expected = [min(n, int(r * n + 0.5)) for n, r in zip(sizes, sparsities, strict=True)]
    assert host.prune_counts(sizes, sparsities) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", ["normal", "few distinct", "one shared prefix"])
def test_digit_counts_of_every_distribution(host, distribution, dtype):
    test_digit_counts.check_distribution(host.digit_counts, "cpu", distribution, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [denormals, with_special_values])
def test_digit_counts_of_denormals_inf_and_nan(host, make, dtype):
    test_digit_counts.check_special_values(host.digit_counts, "cpu", make, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digit_counts_of_every_size_for_any_grid_and_block_order(host, dtype):
    for seed, multiprocessors in enumerate((1, 40)):
        host.device(multiprocessors=multiprocessors, seed=seed)
        test_digit_counts.check_sizes(host.digit_counts, "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digit_counts_of_misaligned_weights(host, dtype):
    storage = torch.randn(9000).to(dtype)
    for offset in range(16 // dtype.itemsize + 1):
        weights = [storage[offset : offset + 8507], storage[offset : offset + 3]]
        test_digit_counts.check(host.digit_counts, weights)


def test_digit_counts_of_a_list_of_both_half_precisions(host):
    test_digit_counts.check_mixed_halves(host.digit_counts, "cpu")


def test_digit_counts_of_empty_weights_alone(host):
    test_digit_counts.check(host.digit_counts, [torch.empty(0)] * 2)
    assert host.launches() == 1


@pytest.mark.parametrize(("tensors", "launches"), [(1, 2), (16, 2), (17, 2), (768, 2), (1000, 3)])
def test_digit_counts_take_as_many_launches_for_any_list(host, tensors, launches):
    weights = [torch.randn(1 + i % 7) for i in range(tensors)]
    test_digit_counts.check(host.digit_counts, weights)
    assert host.launches() == launches


@pytest.mark.parametrize("norms", test_pq_index.NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_sums_of_every_size_mask_and_norm(host, dtype, norms):
    sizes = (0, 1, 31, 33, 4095, 4097, 40009)
    weights = [torch.randn(size).to(dtype) for size in sizes]
    for kept in (0.0, 0.5, 1.0):
        masks = [None if i == 1 else torch.rand(n) < kept for i, n in enumerate(sizes)]
        test_pq_index.check_sums(host.power_sums, weights, masks, *norms)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_power_sums_of_every_distribution(host, distribution):
    for dtype in DTYPES:
        weight = DISTRIBUTIONS[distribution](5003).to(dtype)
        test_pq_index.check_sums(host.power_sums, [weight], [None], 0.5, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_sums_of_rows(host, dtype):
    shapes = test_pq_index.ROWS
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    masks = [torch.rand(shape) < 0.5 if i % 2 else None for i, shape in enumerate(shapes)]
    test_pq_index.check_sums(host.power_sums, weights, masks, 0.5, 1.0, per_row=True)


def test_power_sums_of_misaligned_weights(host):
    for dtype in DTYPES:
        weight = torch.randn(9001).to(dtype)[1:]
        mask = (torch.rand(9003) < 0.5)[3:]
        test_pq_index.check_sums(host.power_sums, [weight], [mask], 1.0, 2.0)


def test_power_sums_are_the_same_for_any_grid_and_block_order(host):
    weights = [torch.randn(size) for size in (50021, 3, 0, 20011, 9000)]
    masks = [torch.rand(len(weight)) < 0.5 for weight in weights]
    first = host.power_sums(weights, masks, 0.5, 1.0, False)
    for multiprocessors in (1, 3, 40):
        for seed in range(3):
            host.device(multiprocessors=multiprocessors, seed=seed)
            assert torch.equal(host.power_sums(weights, masks, 0.5, 1.0, False), first)


@pytest.mark.parametrize(("size", "launches"), [(50, 2), (4097, 3)])
def test_power_sums_take_as_many_launches_for_any_list(host, size, launches):
    for tensors in (1, 2, 40, 300):
        weights = [torch.randn(size).to(DTYPES[i % 4]) for i in range(tensors)]
        found = host.power_sums(weights, [None] * tensors, 0.5, 1.0, False)
        assert host.launches() == launches
        assert (found[:, 0] == size).all()


def test_power_sums_of_a_list_longer_than_a_chunk_of_the_table(host):
    weights = [torch.full((1 + i % 7,), 4.0) for i in range(1000)]
    found = host.power_sums(weights, [None] * 1000, 0.5, 1.0, False)
    sizes = torch.tensor([float(len(weight)) for weight in weights]).double()
    assert torch.equal(found, torch.stack([sizes, 2 * sizes, 4 * sizes], dim=1))
