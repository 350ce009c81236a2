// Counts the memory accesses of kernels compiled with -fsanitize=thread: this file defines the
// functions that the compiler calls before each access, in place of ThreadSanitizer's.
//
// It always counts bytes read and written, and atomics, by launch and named buffer. On request,
// since that takes a hundred times as long, it traces how many 32-byte sectors of device memory a
// warp's request touches, and how many passes over the 32 banks of shared memory it needs (one pass
// serves any number of lanes that access one word). Lanes belong to one request if they execute the
// same instruction for the same number of times.
//
// Compiled without -fsanitize=thread.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine.h"

namespace {

using host_cuda::device;

enum Kind { kLoad, kStore, kAtomic, kKinds };
constexpr const char* kKindNames[] = {"load", "store", "atomic"};

struct Bytes {
  uint64_t read = 0, written = 0, atomics = 0;
};

struct Buffer {
  uintptr_t begin, end;
  std::string name;
  bool is_table;
  std::map<int64_t, Bytes> by_launch;
  std::vector<bool> written;  // by kernels, one bit for every 4 bytes; empty: none yet
};

// The accesses of one instruction of a warp.
struct Request {
  int64_t launch;
  Kind kind;
  Buffer* buffer;  // null: shared memory
  unsigned bytes;  // of a lane
  unsigned lanes = 0;
  std::array<uintptr_t, 32> address = {};
};

struct Requests {
  uint64_t count = 0, bytes = 0, cost = 0;
};

constexpr unsigned kWarp = 32, kThreads = 1024;
constexpr uintptr_t kSector = 32, kWord = 4, kBanks = 32;

std::map<uintptr_t, Buffer> buffers;  // by begin
Buffer* latest = nullptr;             // the one found last
std::map<int64_t, std::string> kernels;
std::map<int64_t, Bytes> shared_by_launch;
uint64_t stale_loads = 0;

bool traced = false;
std::unordered_map<uint64_t, Request> open_requests;
std::unordered_map<uint64_t, uint32_t> executed;  // times that a thread has executed an instruction
std::map<std::pair<int64_t, int>, Requests> requests;  // by launch, and by kind and memory

Buffer* buffer_of(uintptr_t address) {
  if (latest != nullptr && latest->begin <= address && address < latest->end) return latest;
  auto after = buffers.upper_bound(address);
  if (after == buffers.begin()) return nullptr;
  Buffer& buffer = std::prev(after)->second;
  return address < buffer.end ? latest = &buffer : nullptr;
}

// The finalizer of SplitMix64 over both.
uint64_t hash(uint64_t a, uint64_t b) {
  uint64_t z = a * 0x9E3779B97F4A7C15 + b;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

template <typename Value>
size_t distinct(std::vector<Value>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values.size();
}

uint64_t cost_of(const Request& request) {
  const bool shared = request.buffer == nullptr;
  const uintptr_t unit = shared ? kWord : kSector;
  std::vector<uintptr_t> units;
  for (unsigned i = 0; i < request.lanes; ++i) {
    const uintptr_t last = request.address[i] + request.bytes - 1;
    for (uintptr_t u = request.address[i] / unit; u <= last / unit; ++u) units.push_back(u);
  }
  distinct(units);
  if (!shared) return units.size();
  std::array<uint64_t, kBanks> passes = {};
  for (const uintptr_t word : units) ++passes[word % kBanks];
  return *std::max_element(passes.begin(), passes.end());
}

void add(Bytes& total, Kind kind, uint64_t bytes) {
  if (kind == kAtomic) {
    ++total.atomics;
  } else {
    (kind == kStore ? total.written : total.read) += bytes;
  }
}

void close(const Request& request) {
  const uint64_t cost = cost_of(request);
  if (request.buffer != nullptr && request.buffer->is_table && request.kind != kAtomic) {
    add(request.buffer->by_launch[request.launch], request.kind, kSector * cost);
  }
  if (!traced) return;
  Requests& total = requests[{request.launch, request.kind + (request.buffer ? 0 : kKinds)}];
  ++total.count;
  total.bytes += uint64_t{request.lanes} * request.bytes;
  total.cost += cost;
}

// Closes the requests that not all lanes took part in, at the end of a launch.
void close_all() {
  for (const auto& [key, request] : open_requests) close(request);
  open_requests.clear();
  executed.clear();
}

void trace(uintptr_t address, unsigned bytes, Kind kind, Buffer* buffer, const void* instruction) {
  const uint64_t place = hash(hash(device.launches, blockIdx.x), (uintptr_t)instruction);
  const uint32_t times = executed[hash(place, threadIdx.x)]++;
  const uint64_t key = hash(hash(place, kThreads + threadIdx.x / kWarp), times);
  const auto [open, begins] = open_requests.try_emplace(key, Request{});
  Request& request = open->second;
  if (begins) request = {device.launches, kind, buffer, bytes};
  request.address[request.lanes++] = address;
  if (request.lanes < kWarp) return;
  close(request);
  open_requests.erase(open);
}

void count(const void* pointer, unsigned bytes, Kind kind, const void* instruction) {
  if (!host_cuda::in_kernel()) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto shared_begin = reinterpret_cast<uintptr_t>(host_cuda::shared_memory());
  const bool shared = shared_begin <= address && address < shared_begin + host_cuda::shared_bytes();
  Buffer* buffer = shared ? nullptr : buffer_of(address);
  if (!shared && buffer == nullptr) return;  // arguments and local variables
  const bool in_table = buffer != nullptr && buffer->is_table;
  if (!in_table || kind == kAtomic) {
    add((shared ? shared_by_launch : buffer->by_launch)[device.launches], kind, bytes);
  }
  if (buffer != nullptr && kind != kLoad) {
    if (buffer->written.empty()) buffer->written.resize((buffer->end - buffer->begin) / kWord + 1);
    for (uintptr_t i = address - buffer->begin; i < address - buffer->begin + bytes; i += kWord) {
      buffer->written[i / kWord] = true;
    }
  }
  if (traced || in_table) trace(address, bytes, kind, buffer, instruction);
}

// Returns a kernel's name, without parameters and namespace.
std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "?";
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  std::string name = demangled != nullptr ? demangled : info.dli_sname;
  free(demangled);
  name = name.substr(0, std::min(name.find('<'), name.find('(')));
  const size_t scope = name.find_last_of(": ");
  return scope == std::string::npos ? name : name.substr(scope + 1);
}

void append(std::string& json, const std::string& row) {
  json += (json.back() == '[' ? "" : ",") + row;
}

std::string row_of(int64_t launch, const std::string& buffer, const Bytes& bytes) {
  return "{\"launch\":" + std::to_string(launch) + ",\"kernel\":\"" + kernels[launch] +
         "\",\"buffer\":\"" + buffer + "\",\"read\":" + std::to_string(bytes.read) +
         ",\"written\":" + std::to_string(bytes.written) +
         ",\"atomics\":" + std::to_string(bytes.atomics) + "}";
}

}  // namespace

extern "C" {

void host_cuda_name_buffer(const void* begin, size_t bytes, const char* name, int is_table) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  if (bytes > 0) buffers[address] = {address, address + bytes, name, is_table != 0, {}, {}};
}

void host_cuda_atomic(const void* address, size_t bytes, const void* instruction) {
  count(address, static_cast<unsigned>(bytes), kAtomic, instruction);
}

void host_cuda_launched() {
  close_all();
  kernels[device.launches] = name_of(device.kernel);
}

void host_cuda_read_only_load(const void* pointer, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Buffer* buffer = buffer_of(address);
  if (buffer == nullptr || buffer->written.empty()) return;
  bool stale = false;
  for (uintptr_t i = address - buffer->begin; i < address - buffer->begin + bytes; i += kWord) {
    stale |= buffer->written[i / kWord];
  }
  stale_loads += stale;
}

// Clears all counts and names.
void host_cuda_start_counting(int trace_requests) {
  close_all();
  buffers.clear();
  latest = nullptr;
  kernels.clear();
  shared_by_launch.clear();
  requests.clear();
  stale_loads = 0;
  traced = trace_requests != 0;
}

// Returns JSON: rows of bytes by launch and buffer; rows of requests by launch, memory and kind,
// with their cost in sectors or passes; and the number of loads through the read-only path of
// memory that kernels wrote.
const char* host_cuda_counts() {
  static std::string json;
  close_all();
  json = "{\"bytes\":[";
  for (const auto& [begin, buffer] : buffers) {
    for (const auto& [launch, bytes] : buffer.by_launch) {
      append(json, row_of(launch, buffer.name, bytes));
    }
  }
  for (const auto& [launch, bytes] : shared_by_launch) {
    append(json, row_of(launch, "shared memory", bytes));
  }
  json += "],\"requests\":[";
  for (const auto& [key, total] : requests) {
    append(json,
           "{\"launch\":" + std::to_string(key.first) + ",\"kernel\":\"" + kernels[key.first] +
               "\",\"shared\":" + (key.second < kKinds ? "false" : "true") + ",\"kind\":\"" +
               kKindNames[key.second % kKinds] + "\",\"count\":" + std::to_string(total.count) +
               ",\"bytes\":" + std::to_string(total.bytes) +
               ",\"cost\":" + std::to_string(total.cost) + "}");
  }
  json += "],\"stale_loads\":" + std::to_string(stale_loads) + "}";
  return json.c_str();
}

// The functions that -fsanitize=thread makes the compiler call.

#define HERE __builtin_return_address(0)
#define PDP_ACCESSES(bytes)                                                    \
  void __tsan_read##bytes(void* p) { count(p, bytes, kLoad, HERE); }           \
  void __tsan_write##bytes(void* p) { count(p, bytes, kStore, HERE); }         \
  void __tsan_unaligned_read##bytes(void* p) { count(p, bytes, kLoad, HERE); } \
  void __tsan_unaligned_write##bytes(void* p) { count(p, bytes, kStore, HERE); }

PDP_ACCESSES(1)
PDP_ACCESSES(2)
PDP_ACCESSES(4)
PDP_ACCESSES(8)
PDP_ACCESSES(16)

void __tsan_read_range(void* p, size_t bytes) {
  count(p, static_cast<unsigned>(bytes), kLoad, HERE);
}
void __tsan_write_range(void* p, size_t bytes) {
  count(p, static_cast<unsigned>(bytes), kStore, HERE);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// host_cuda_atomic counts these: a loop of compare-and-exchange is one instruction on a GPU.
#define PDP_ATOMICS(bits, Word)                                                                   \
  Word __tsan_atomic##bits##_load(const volatile Word* p, int) { return *p; }                     \
  Word __tsan_atomic##bits##_fetch_add(volatile Word* p, Word value, int) {                       \
    const Word old = *p;                                                                          \
    *p = old + value;                                                                             \
    return old;                                                                                   \
  }                                                                                               \
  Word __tsan_atomic##bits##_exchange(volatile Word* p, Word value, int) {                        \
    const Word old = *p;                                                                          \
    *p = value;                                                                                   \
    return old;                                                                                   \
  }                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile Word* p, Word* expected, Word value, \
                                                    int, int) {                                   \
    const Word old = *p;                                                                          \
    if (old == *expected) *p = value;                                                             \
    return old == std::exchange(*expected, old);                                                  \
  }

PDP_ATOMICS(32, uint32_t)
PDP_ATOMICS(64, uint64_t)

uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return *p; }  // of static variables

}  // extern "C"
