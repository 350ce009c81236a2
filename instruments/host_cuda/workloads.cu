// Runs every CUDA kernel on inputs that reach each of its branches, and compares the results with a
// sort.
//
//   workloads [--seed N] [--mutation N] [NAME ...]
//
// Built with g++ for the CUDA model of this folder and with ThreadSanitizer, it finds races. Built
// with nvcc, it is a program for compute-sanitizer on a GPU:
//
//   nvcc -std=c++17 -O2 -lineinfo -arch=native -o workloads instruments/host_cuda/workloads.cu
//
// The seed determines the weights, and on the model the order of threads. Prints wrong results; the
// exit status is 0 if there are none. --mutation switches on a mistake of mutated sources
// (instruments/races.py).
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../csrc/cuda/digit_counts.cuh"
#include "../../csrc/cuda/hard_mask.cuh"
#include "../../csrc/cuda/power_sums.cuh"
#include "../../csrc/cuda/prune_counts.cuh"
#include "../../csrc/cuda/soft_mask_list.cuh"
#include "../../csrc/cuda/thresholds.cuh"
#include "../../csrc/prune_count.h"

namespace {

using pdp::BFloat16;
using pdp::Half;
using pdp::Magnitude;
using pdp::magnitude_key;

int wrong_answers = 0;
const char* workload = "";

void check(bool right, const char* what) {
  if (right) return;
  ++wrong_answers;
  printf("%s: wrong %s\n", workload, what);
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  printf("%s: %s\n", workload, cudaGetErrorString(error));
  exit(2);
}

// An array in device memory, which the host can fill and read.
template <typename Element>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size) {
    check(cudaMalloc(&data_, std::max<size_t>(1, size) * sizeof(Element)));
  }
  explicit DeviceArray(const std::vector<Element>& values) : DeviceArray(values.size()) {
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(Element), cudaMemcpyHostToDevice));
  }
  DeviceArray(DeviceArray&& other)
      : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  ~DeviceArray() noexcept(false) { check(cudaFree(data_)); }

  Element* data() const { return data_; }
  std::vector<Element> values() const {
    std::vector<Element> result(size_);
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(result.data(), data_, size_ * sizeof(Element), cudaMemcpyDeviceToHost));
    return result;
  }

 private:
  Element* data_ = nullptr;
  size_t size_;
};

template <typename Weight>
constexpr pdp::WeightType kType = std::is_same_v<Weight, double>     ? pdp::WeightType::kFloat64
                                  : std::is_same_v<Weight, float>    ? pdp::WeightType::kFloat32
                                  : std::is_same_v<Weight, BFloat16> ? pdp::WeightType::kBFloat16
                                                                     : pdp::WeightType::kFloat16;

// Truncates to 16-bit weights, and flushes a subnormal half to 0.
template <typename Weight>
Weight convert(double value) {
  if constexpr (std::is_floating_point_v<Weight>) {
    return static_cast<Weight>(value);
  } else {
    const auto bits = pdp::bit_cast<uint32_t>(static_cast<float>(value));
    const uint32_t sign = bits >> 31 << 15, magnitude = bits & 0x7FFFFFFF;
    if (std::is_same_v<Weight, BFloat16>) return {static_cast<uint16_t>(bits >> 16)};
    const uint32_t normal = std::fabs(value) < 6.2e-5 ? 0 : (magnitude - (112u << 23)) >> 13;
    return {static_cast<uint16_t>(sign | normal)};
  }
}

using Random = std::mt19937_64;
using Distribution = std::function<double(Random&)>;

double normal(Random& random) { return std::normal_distribution<double>()(random); }
double few_values(Random& random) { return static_cast<double>(random() % 7) - 3; }
double equal(Random&) { return 0.25; }
double huge(Random& random) { return 1e25 * normal(random); }
double one_prefix(Random& random) {
  return 1 + std::uniform_real_distribution<double>(0, 1.0 / 512)(random);
}

template <typename Weight>
std::vector<Weight> make_weight(int64_t size, const Distribution& distribution, Random& random) {
  std::vector<Weight> weight(size);
  for (Weight& w : weight) w = convert<Weight>(distribution(random));
  return weight;
}

// Few multiprocessors, so that there are few blocks and each has slices of several tensors.
pdp::DeviceLimits limits_of(uint64_t seed) {
  pdp::DeviceLimits limits;
  check(pdp::read_device_limits(0, &limits));
  limits.multiprocessors = 2 - static_cast<int>(seed % 2);
  return limits;
}

// Whether weights of more than 64 KiB are sampled. 16-bit weights always are.
enum class Way { kSampled, kMisled, kDigits };

int64_t sampled_from(Way way) { return way == Way::kDigits ? INT64_MAX : 0; }

// Sets all weights that a sample reads to values from 1 to 5/4.
template <typename Weight>
void mislead(std::vector<Weight>& weight, Random& random) {
  using Key = typename Magnitude<Weight>::Key;
  const auto size = static_cast<int64_t>(weight.size());
  const int64_t chunks = pdp::sample_chunks<Key>(size);
  const pdp::Strata<Key> strata(chunks, size);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t place = strata.place(chunk);
    for (int64_t i = place; i < place + pdp::kSampleChunk<Key>; ++i) {
      weight[i] = convert<Weight>(1 + std::uniform_real_distribution<double>(0, 0.25)(random));
    }
  }
}

// `ratios` are used in turn: the fraction to prune of each tensor.
template <typename Weight>
void thresholds(uint64_t seed, const std::vector<int64_t>& sizes, const Distribution& distribution,
                Way way = Way::kSampled, const std::vector<double>& ratios = {0.8, 0.3, 0.5}) {
  Random random(seed);
  std::vector<std::vector<Weight>> weights;
  std::vector<DeviceArray<Weight>> on_device;
  std::vector<int64_t> counts;
  pdp::ThresholdRequest request = {};
  for (const int64_t size : sizes) {
    weights.push_back(make_weight<Weight>(size, distribution, random));
    if (way == Way::kMisled) mislead(weights.back(), random);
    on_device.emplace_back(weights.back());
    counts.push_back(pdp::prune_count(ratios[counts.size() % ratios.size()], size));
    const auto position = static_cast<int64_t>(request.weights.size());
    request.weights.push_back({on_device.back().data(), size, position, kType<Weight>});
  }
  const DeviceArray<int64_t> counts_there(counts);
  const DeviceArray<double> result(sizes.size());
  request.prune_counts = counts_there.data();
  request.thresholds = {result.data(), true};
  request.limits = limits_of(seed);
  request.sampled_from = sampled_from(way);
  const DeviceArray<unsigned char> workspace(pdp::thresholds_workspace_bytes(request));
  check(pdp::launch_thresholds(request, workspace.data(), nullptr));

  const std::vector<double> found = result.values();
  for (size_t i = 0; i < sizes.size(); ++i) {
    std::vector<typename Magnitude<Weight>::Key> keys = {0};  // stands before the first
    for (const Weight w : weights[i]) keys.push_back(magnitude_key(w));
    std::sort(keys.begin() + 1, keys.end());
    const int64_t k = counts[i], n = sizes[i];
    const bool between = 0 < k && k < n;
    const double expected = pdp::threshold_between<Weight>(between ? keys[k] : keys[0],
                                                           between ? keys[k + 1] : keys[0], k, n);
    check(found[i] == expected, "threshold");
  }
}

template <typename Weight>
void hard_mask(uint64_t seed, int64_t size, const Distribution& distribution,
               Way way = Way::kSampled) {
  Random random(seed);
  const std::vector<Weight> weight = make_weight<Weight>(size, distribution, random);
  const std::vector<int64_t> count = {size * 3 / 5};
  const DeviceArray<Weight> there(weight);
  const DeviceArray<int64_t> count_there(count);
  const DeviceArray<double> threshold(1);
  const DeviceArray<unsigned char> kept(size);
  pdp::HardMaskRequest request = {};
  request.selection = {{{there.data(), size, 0, kType<Weight>}},
                       count_there.data(),
                       {threshold.data(), true},
                       limits_of(seed),
                       sampled_from(way)};
  request.kept = reinterpret_cast<bool*>(kept.data());
  const DeviceArray<unsigned char> workspace(pdp::hard_mask_workspace_bytes(request));
  check(pdp::launch_hard_mask(request, workspace.data(), nullptr));

  std::vector<int64_t> order(size);
  for (int64_t i = 0; i < size; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return magnitude_key(weight[a]) < magnitude_key(weight[b]);
  });
  std::vector<unsigned char> expected(size, 1);
  for (int64_t i = 0; i < count[0]; ++i) expected[order[i]] = 0;
  check(kept.values() == expected, "mask");
}

template <typename Weight>
void digit_counts(uint64_t seed, const std::vector<int64_t>& sizes) {
  Random random(seed);
  std::vector<std::vector<Weight>> weights;
  std::vector<DeviceArray<Weight>> on_device;
  pdp::DigitCountsRequest request = {};
  for (const int64_t size : sizes) {
    weights.push_back(make_weight<Weight>(size, normal, random));
    on_device.emplace_back(weights.back());
    const auto position = static_cast<int64_t>(request.weights.size());
    request.weights.push_back({on_device.back().data(), size, position, kType<Weight>});
  }
  request.limits = limits_of(seed);
  for (int64_t index = 0;; ++index) {
    const pdp::Digit digit = pdp::key_digits(sizeof(Weight)).digit(index);
    std::vector<int64_t> prefixes, expected, above;
    for (const auto& weight : weights) {
      const auto head = [&](Weight w) {
        return static_cast<int64_t>(uint64_t{magnitude_key(w)} >> digit.shift >> digit.bits);
      };
      prefixes.push_back(weight.empty() ? 0 : head(weight[0]));
      expected.resize(prefixes.size() * digit.bins());
      above.push_back(pdp::kNoKey);
      for (const Weight w : weight) {
        const auto key = static_cast<int64_t>(magnitude_key(w));
        if (head(w) == prefixes.back()) {
          const int64_t row = static_cast<int64_t>(prefixes.size()) - 1;
          ++expected[row * digit.bins() + ((key >> digit.shift) & (digit.bins() - 1))];
        } else if (digit.last && head(w) > prefixes.back()) {
          above.back() = std::min(above.back(), key);
        }
      }
    }
    const DeviceArray<int64_t> prefixes_there(prefixes), counts(expected.size());
    const DeviceArray<int64_t> above_there(above.size());
    request.digit = digit;
    request.prefixes = prefixes_there.data();
    request.counts = counts.data();
    request.above = above_there.data();
    const DeviceArray<unsigned char> workspace(pdp::digit_counts_workspace_bytes(request));
    check(pdp::launch_digit_counts(request, workspace.data(), nullptr));
    check(counts.values() == expected, "counts");
    check(above_there.values() == above, "key above the prefix");
    if (digit.last) return;
  }
}

// Every other tensor has a mask. per_row: each row is a group, instead of each tensor.
template <typename Weight>
void power_sums(uint64_t seed, const std::vector<int64_t>& sizes, double p, double q,
                bool per_row = false, const Distribution& distribution = normal) {
  Random random(seed);
  std::vector<std::vector<Weight>> weights;
  std::vector<std::vector<unsigned char>> masks;
  std::vector<DeviceArray<Weight>> on_device;
  std::vector<DeviceArray<unsigned char>> masks_there;
  pdp::PowerSumsRequest request = {};
  size_t groups = 0;
  for (const int64_t size : sizes) {
    weights.push_back(make_weight<Weight>(size, distribution, random));
    masks.emplace_back(size);
    const bool masked = masks.size() % 2 == 0;
    for (unsigned char& kept : masks.back()) kept = !masked || random() % 3 > 0;
    on_device.emplace_back(weights.back());
    masks_there.emplace_back(masks.back());
    const int64_t rows = per_row && size % 3 == 0 ? 3 : 1;
    const auto* kept = reinterpret_cast<const bool*>(masks_there.back().data());
    request.tensors.push_back(
        {on_device.back().data(), masked ? kept : nullptr, rows, size, kType<Weight>});
    groups += rows;
  }
  const DeviceArray<pdp::PowerSums> results(groups);
  request.p = p;
  request.q = q;
  request.results = results.data();
  request.limits = limits_of(seed);
  const DeviceArray<unsigned char> workspace(pdp::power_sums_workspace_bytes(request));
  check(pdp::launch_power_sums(request, workspace.data(), nullptr));

  const std::vector<pdp::PowerSums> found = results.values();
  size_t group = 0;
  const auto close = [](double a, double b) { return std::fabs(a - b) <= 1e-9 * b; };
  for (size_t i = 0; i < sizes.size(); ++i) {
    const int64_t rows = request.tensors[i].rows, row_size = sizes[i] / rows;
    for (int64_t row = 0; row < rows; ++row, ++group) {
      pdp::PowerSums expected;
      for (int64_t j = row * row_size; j < (row + 1) * row_size; ++j) {
        if (masks[i][j] == 0) continue;
        const double magnitude = Magnitude<Weight>::value(magnitude_key(weights[i][j]));
        expected = expected + pdp::PowerSums{1, std::pow(magnitude, p), std::pow(magnitude, q)};
      }
      check(found[group].count == expected.count && close(found[group].p, expected.p) &&
                close(found[group].q, expected.q),
            "sums");
    }
  }
}

void prune_counts(uint64_t seed, size_t tensors) {
  Random random(seed);
  std::vector<int64_t> values(tensors);
  for (int64_t& value : values) value = static_cast<int64_t>(random() % 100000);
  const DeviceArray<int64_t> counts(tensors);
  check(pdp::launch_prune_counts(values, counts.data(), nullptr));
  check(counts.values() == values, "counts");
}

// Each weight has a threshold and a temperature of its own.
template <typename Weight>
void soft_masks(uint64_t seed, const std::vector<int64_t>& sizes, bool relative) {
  using Real = std::conditional_t<std::is_same_v<Weight, double>, double, float>;
  constexpr double kTolerance = sizeof(Weight) == 8 ? 1e-12 : sizeof(Weight) == 4 ? 1e-5 : 1e-2;
  Random random(seed);
  std::vector<std::vector<Weight>> weights, grads;
  std::vector<DeviceArray<Weight>> weights_there, grads_there, results;
  std::vector<Real> scalars;
  for (const int64_t size : sizes) {
    weights.push_back(make_weight<Weight>(size, normal, random));
    grads.push_back(make_weight<Weight>(size, normal, random));
    weights_there.emplace_back(weights.back());
    grads_there.emplace_back(grads.back());
    results.emplace_back(size);
    const Real position = static_cast<Real>(weights.size() % 7);
    scalars.insert(scalars.end(), {Real(0.2) + position / 8, Real(0.1) + position / 9});
  }
  const DeviceArray<Real> there(scalars);
  for (const bool backward : {false, true}) {
    pdp::SoftMaskListRequest request = {{}, there.data(), 2, there.data() + 1, 2, relative};
    for (size_t i = 0; i < sizes.size(); ++i) {
      request.list.push_back({weights_there[i].data(), backward ? grads_there[i].data() : nullptr,
                              results[i].data(), sizes[i], kType<Weight>, kType<Weight>});
    }
    check(backward ? pdp::launch_soft_mask_list<pdp::MaskPass::kBackward>(request, nullptr)
                   : pdp::launch_soft_mask_list<pdp::MaskPass::kForward>(request, nullptr));
    for (size_t i = 0; i < sizes.size(); ++i) {
      const double t = scalars[2 * i], tau = scalars[2 * i + 1] * (relative ? t * t : 1.0);
      const std::vector<Weight> found = results[i].values();
      bool right = true;
      for (int64_t j = 0; j < sizes[i]; ++j) {
        const double w = pdp::widen(weights[i][j]), g = pdp::widen(grads[i][j]);
        const double m = 1 / (1 + std::exp(-(w * w - t * t) / tau));
        const double expected = backward ? g * (m + 2 * w * w / tau * m * (1 - m)) : m * w;
        const double allowed = kTolerance * (1 + std::fabs(expected));
        right &= std::fabs(pdp::widen(found[j]) - expected) <= allowed;
      }
      check(right, backward ? "gradient" : "w_hat");
    }
  }
}

std::vector<int64_t> repeated(size_t times, int64_t size) {
  return std::vector<int64_t>(times, size);
}

// The smallest tenth of 40,000 weights has one first digit and is contiguous, so in some round all
// weights are candidates.
double crowded(Random& random) {
  static int64_t drawn = 0;
  const double base = drawn++ % 40000 < 36000 ? 1 : 0.29;
  return base + std::uniform_real_distribution<double>()(random) / 64;
}

struct Workload {
  const char* name;
  std::function<void(uint64_t)> run;
};

const Workload kWorkloads[] = {
    {"thresholds-float32",
     [](uint64_t seed) { thresholds<float>(seed, {40011, 3, 0, 25000}, normal); }},
    {"thresholds-ties", [](uint64_t seed) { thresholds<float>(seed, {40011, 25000}, few_values); }},
    {"thresholds-equal", [](uint64_t seed) { thresholds<float>(seed, {40011}, equal); }},
    {"thresholds-misled",
     [](uint64_t seed) { thresholds<float>(seed, {40011, 25000}, normal, Way::kMisled, {0.3}); }},
    {"thresholds-small", [](uint64_t seed) { thresholds<float>(seed, {9000, 3, 0, 300}, normal); }},
    {"thresholds-list", [](uint64_t seed) { thresholds<float>(seed, repeated(4, 25000), normal); }},
    {"thresholds-float64",
     [](uint64_t seed) { thresholds<double>(seed, {20001, 0, 2000}, normal); }},
    {"thresholds-bfloat16",
     [](uint64_t seed) { thresholds<BFloat16>(seed, {70001, 3, 9000}, normal); }},
    {"thresholds-bfloat16-misled",
     [](uint64_t seed) {
       thresholds<BFloat16>(seed, {70001, 40000}, normal, Way::kMisled, {0.3});
     }},
    {"thresholds-float16", [](uint64_t seed) { thresholds<Half>(seed, {70001, 3, 9000}, normal); }},
    {"digits-float32",
     [](uint64_t seed) { thresholds<float>(seed, {20011, 3, 0, 18000}, normal, Way::kDigits); }},
    {"digits-neighbours",
     [](uint64_t seed) {
       const Distribution neighbours = [i = 0](Random&) mutable { return 1 + i++ * 0x1p-23; };
       thresholds<float>(seed, {40011}, neighbours, Way::kDigits);
     }},
    {"digits-ties",
     [](uint64_t seed) { thresholds<float>(seed, {20011, 17000}, few_values, Way::kDigits); }},
    {"digits-overflow",
     [](uint64_t seed) { thresholds<float>(seed, {20011, 17000}, one_prefix, Way::kDigits); }},
    {"digits-crowded",
     [](uint64_t seed) { thresholds<float>(seed, {40000}, crowded, Way::kDigits, {0.05}); }},
    {"digits-float64",
     [](uint64_t seed) { thresholds<double>(seed, {9001, 0, 2000}, normal, Way::kDigits); }},
    {"hard-mask-float32", [](uint64_t seed) { hard_mask<float>(seed, 20001, normal); }},
    {"hard-mask-ties", [](uint64_t seed) { hard_mask<float>(seed, 20011, few_values); }},
    {"hard-mask-digits",
     [](uint64_t seed) { hard_mask<float>(seed, 20011, few_values, Way::kDigits); }},
    {"hard-mask-float64", [](uint64_t seed) { hard_mask<double>(seed, 9001, few_values); }},
    {"hard-mask-bfloat16", [](uint64_t seed) { hard_mask<BFloat16>(seed, 40011, normal); }},
    {"hard-mask-float16", [](uint64_t seed) { hard_mask<Half>(seed, 40011, normal); }},
    {"digit-counts-float32",
     [](uint64_t seed) { digit_counts<float>(seed, {20011, 100, 0, 5000}); }},
    {"digit-counts-float64", [](uint64_t seed) { digit_counts<double>(seed, {9001, 0, 100}); }},
    {"digit-counts-bfloat16", [](uint64_t seed) { digit_counts<BFloat16>(seed, {20011, 100}); }},
    {"digit-counts-float16", [](uint64_t seed) { digit_counts<Half>(seed, {9001, 100}); }},
    {"power-sums",
     [](uint64_t seed) { power_sums<float>(seed, {20021, 3, 0, 9000, 5000}, 0.5, 1); }},
    {"power-sums-of-rows",
     [](uint64_t seed) { power_sums<float>(seed, {27003, 300, 9, 0}, 1, 2, true); }},
    {"power-sums-of-huge-weights",
     [](uint64_t seed) {
       power_sums<float>(seed, {5000, 300}, 0.5, 1, false, huge);
       power_sums<BFloat16>(seed, {5000, 300}, 0.5, 2, false, huge);
     }},
    {"power-sums-float64", [](uint64_t seed) { power_sums<double>(seed, {9000, 20}, 0.5, 2); }},
    {"power-sums-bfloat16",
     [](uint64_t seed) { power_sums<BFloat16>(seed, {9000, 9000, 20}, 0.5, 1); }},
    {"power-sums-any-exponents",
     [](uint64_t seed) { power_sums<BFloat16>(seed, {9000, 20}, 0.3, 1.7); }},
    {"power-sums-float16",
     [](uint64_t seed) { power_sums<Half>(seed, {9003, 27, 20}, 0.5, 2, true); }},
    {"power-sums-list", [](uint64_t seed) { power_sums<float>(seed, repeated(17, 70), 0.5, 1); }},
    {"soft-masks", [](uint64_t seed) { soft_masks<float>(seed, {20011, 3, 0, 9000}, true); }},
    {"soft-masks-float64", [](uint64_t seed) { soft_masks<double>(seed, {9000, 0, 5}, false); }},
    {"soft-masks-bfloat16", [](uint64_t seed) { soft_masks<BFloat16>(seed, {8192, 31}, false); }},
    {"soft-masks-float16", [](uint64_t seed) { soft_masks<Half>(seed, {9001, 8}, true); }},
    {"soft-masks-list",
     [](uint64_t seed) {
       std::vector<int64_t> sizes(100);  // more than a small chunk, most of them empty
       for (size_t i = 0; i < sizes.size(); i += 9) sizes[i] = 9;
       soft_masks<float>(seed, sizes, true);
     }},
    {"prune-counts",
     [](uint64_t seed) {
       for (const size_t tensors : {1, 33, 3000}) prune_counts(seed, tensors);
     }},
};

// The CUDA model throws an exception for a mistake of a kernel.
void run(const Workload& each, uint64_t seed) {
  try {
    each.run(seed);
  } catch (const std::exception& error) {
    ++wrong_answers;
    printf("%s: %s\n", each.name, error.what());
  }
}

#ifdef __CUDACC__
void prepare(uint64_t, int) {}
#else
void prepare(uint64_t seed, int mutation) {
  host_cuda::device.seed = seed;
  host_cuda::device.shared_bytes_per_block = 99 * 1024;  // the least of all devices
  host_cuda::device.mutation = mutation;
}
#endif

}  // namespace

int main(int argc, char** argv) {
  uint64_t seed = 1;
  int mutation = 0;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--seed" && i + 1 < argc) {
      seed = strtoull(argv[++i], nullptr, 10);
    } else if (argument == "--mutation" && i + 1 < argc) {
      mutation = atoi(argv[++i]);
    } else {
      names.push_back(argument);
    }
  }
  const auto known = [](const std::string& name) {
    return std::any_of(std::begin(kWorkloads), std::end(kWorkloads),
                       [&](const Workload& workload) { return name == workload.name; });
  };
  for (const std::string& name : names) {
    if (known(name)) continue;
    printf("no workload is called %s; there are", name.c_str());
    for (const Workload& workload : kWorkloads) printf(" %s", workload.name);
    printf("\n");
    return 2;
  }
  prepare(seed, mutation);
  for (const Workload& each : kWorkloads) {
    workload = each.name;
    if (names.empty() || std::find(names.begin(), names.end(), workload) != names.end()) {
      run(each, seed);
    }
  }
  printf("%d wrong\n", wrong_answers);
  return wrong_answers > 0 ? 1 : 0;
}
