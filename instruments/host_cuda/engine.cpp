// Interleaves the blocks of a grid, and runs the threads of each as coroutines that a barrier, a
// warp operation or a global atomic interrupts. The order is drawn from a seed.
//
// Linked with ThreadSanitizer, every thread is one of its fibers, and a switch between fibers
// orders nothing. This file tells it what does: a barrier, for the threads of one block; a fence,
// which makes what comes before it visible to a thread that reads a later atomic of this thread and
// then fences too; the begin and the end of a grid. Atomics alone are relaxed and order nothing,
// and neither do warp shuffles.
#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

// ThreadSanitizer's functions are null if it is not linked.
#define PDP_WEAK __attribute__((weak))
extern "C" {
PDP_WEAK void* __tsan_get_current_fiber(void);
PDP_WEAK void* __tsan_create_fiber(unsigned flags);
PDP_WEAK void __tsan_destroy_fiber(void* fiber);
PDP_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
PDP_WEAK void __tsan_acquire(void* address);
PDP_WEAK void __tsan_release(void* address);
}

uint3 threadIdx, blockIdx, blockDim, gridDim;
host_cuda::Device host_cuda::device;

// switch_stack(&from, to) pushes the registers that a call preserves, keeps the stack pointer in
// *from, and goes on with the stack `to`. (longjmp between fibers makes ThreadSanitizer abort.)
#if defined(__x86_64__)
asm(R"(
.text
.globl pdp_switch_stack
.hidden pdp_switch_stack
pdp_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "the CUDA model can switch stacks on x86-64 only"
#endif
extern "C" void pdp_switch_stack(void** from, void* to);

namespace {

using host_cuda::device;

constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr unsigned kResidentThreads = 2048;
constexpr size_t kMostShared = 256 * 1024;
// The arguments of a kernel alone may take 32 KiB. Not a power of two, or the tops of all stacks
// would map to a few sets of the cache.
constexpr size_t kStackBytes = 65 * 1024 - 192;
// Noise after the shared memory that a kernel asks for, which the kernel must not change.
constexpr size_t kBeyondShared = 16 * 1024;
constexpr unsigned char kStackEnd = 0x5A;
constexpr size_t kStackEndBytes = 64;
constexpr unsigned kWithoutOrder = 1;  // __tsan_switch_to_fiber_no_sync

// SplitMix64. It has internal linkage, and so have the instances of <algorithm> templates with it.
struct Random {
  using result_type = uint64_t;
  uint64_t state = 0;

  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }
  uint64_t operator()() {
    uint64_t z = (state += 0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }
  unsigned below(size_t count) { return static_cast<unsigned>((*this)() % count); }
};

struct Index {
  unsigned value;
};

enum class Waiting { kNot, kBlock, kWarp, kDone };

struct Thread {
  unsigned char* stack = nullptr;
  void* stack_pointer = nullptr;
  Waiting waiting = Waiting::kNot;
  // By the parity of the warp operation. No lane shows a third value before all have read the
  // first.
  uint64_t shown[2] = {};
  unsigned warp_operations = 0;

  void* fiber = nullptr;
  void* publisher = nullptr;  // a fiber whose clock is that of the thread's last fence
  bool fenced = false;
  // The last addresses of atomics since the last fence.
  const void* read[32] = {};
  size_t reads = 0;
};

// Sync variables of a block.
struct Clocks {
  char barrier[2];  // by the parity of the barrier
  char fence[];     // of every thread
};

struct Block {
  unsigned index = 0;
  std::vector<Thread> threads;
  std::vector<Index> runnable;  // the first threads of warps that do not wait at a barrier
  unsigned barriers = 0;
  bool votes[2] = {};  // by the parity of the barrier

  unsigned char* shared = nullptr;
  Clocks* clocks = nullptr;
  unsigned char noise = 0;
};

struct Grid {
  unsigned threads;
  size_t shared_bytes;
  void (*call)(void*);
  void* argument;
};

Random draw;
Grid grid;
Block* block = nullptr;    // the running one
Thread* thread = nullptr;  // the running one; null: the scheduler runs
void* scheduler_stack = nullptr;
void* scheduler_fiber = nullptr;
const char* failure = nullptr;
char grid_begin, grid_end;  // sync variables

bool races_are_watched() { return __tsan_create_fiber != nullptr; }

void acquire(void* address) {
  if (races_are_watched()) __tsan_acquire(address);
}

void release(void* address) {
  if (races_are_watched()) __tsan_release(address);
}

void switch_fiber(void* fiber) {
  if (races_are_watched()) __tsan_switch_to_fiber(fiber, kWithoutOrder);
}

void back_to_scheduler() {
  Thread* self = thread;
  switch_fiber(scheduler_fiber);
  pdp_switch_stack(&self->stack_pointer, scheduler_stack);
}

void wait(Waiting for_what) {
  thread->waiting = for_what;
  back_to_scheduler();
}

void resume(Block& of, unsigned index) {
  block = &of;
  thread = &of.threads[index];
  threadIdx.x = index;
  blockIdx.x = of.index;
  thread->waiting = Waiting::kNot;
  switch_fiber(thread->fiber);
  pdp_switch_stack(&scheduler_stack, thread->stack_pointer);
  thread = nullptr;
}

void run_thread() {
  acquire(&grid_begin);
  grid.call(grid.argument);
  release(&grid_end);
  wait(Waiting::kDone);
  abort();  // nothing resumes it
}

size_t round_up(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

unsigned char* new_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) abort();
  return static_cast<unsigned char*>(pages);
}

// Allocates what a block still lacks for this grid. The block keeps it for later grids.
void equip(Block& b) {
  if (b.shared == nullptr) {
    const size_t clocks = round_up(sizeof(Clocks) + kMostThreads);
    b.shared = new_pages(clocks + kMostShared + kBeyondShared) + clocks;
    b.clocks = reinterpret_cast<Clocks*>(b.shared - clocks);
  }
  if (b.threads.size() >= grid.threads) return;
  const size_t had = b.threads.size(), lacks = grid.threads - had;
  unsigned char* stacks = new_pages(lacks * kStackBytes);
  b.threads.resize(grid.threads);
  for (size_t i = 0; i < lacks; ++i) {
    Thread& t = b.threads[had + i];
    t.stack = stacks + i * kStackBytes;
    memset(t.stack, kStackEnd, kStackEndBytes);
    if (races_are_watched()) t.fiber = __tsan_create_fiber(0);
  }
}

void start(Block& b, unsigned index) {
  equip(b);
  b.index = index;
  b.barriers = 0;
  b.votes[0] = b.votes[1] = false;
  b.noise = static_cast<unsigned char>(draw() | 1);
  memset(b.shared, b.noise, grid.shared_bytes + kBeyondShared);
  release(&grid_begin);  // after the memset; the scheduler has acquired nothing from this grid
  b.runnable.clear();
  for (unsigned i = 0; i < grid.threads; ++i) {
    Thread& t = b.threads[i];
    t.waiting = Waiting::kNot;
    t.warp_operations = 0;
    t.fenced = false;
    t.reads = 0;
    auto* top = reinterpret_cast<void**>(t.stack + kStackBytes);
    *--top = nullptr;  // a function begins 8 bytes off a multiple of 16
    *--top = reinterpret_cast<void*>(run_thread);
    top -= 6;  // the registers that switch_stack pops
    t.stack_pointer = top;
    if (i % kWarp == 0) b.runnable.push_back({i});
  }
}

// Returns null, or which forbidden place the block has written to.
const char* damage(const Block& b) {
  for (size_t i = grid.shared_bytes; i < grid.shared_bytes + kBeyondShared; ++i) {
    if (b.shared[i] != b.noise) return "a store beyond the shared memory of the block";
  }
  for (unsigned i = 0; i < grid.threads; ++i) {
    for (size_t j = 0; j < kStackEndBytes; ++j) {
      if (b.threads[i].stack[j] != kStackEnd) return "a thread needs more stack than the model has";
    }
  }
  return nullptr;
}

// Runs the lanes of a warp in random order, each until it waits. Returns whether any can go on.
bool run_warp(Block& b, unsigned first) {
  const uint64_t drawn = draw();
  const unsigned start = drawn % kWarp, step = drawn / kWarp % kWarp | 1;  // odd: meets every lane
  unsigned in_operation = 0, runnable = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    const unsigned lane = first + (start + i * step) % kWarp;
    if (b.threads[lane].waiting == Waiting::kNot) resume(b, lane);
    if (failure != nullptr) return false;
    in_operation += b.threads[lane].waiting == Waiting::kWarp;
    runnable += b.threads[lane].waiting == Waiting::kNot;
  }
  if (in_operation == kWarp) {
    for (unsigned i = 0; i < kWarp; ++i) b.threads[first + i].waiting = Waiting::kNot;
    return true;
  }
  if (in_operation > 0 && runnable == 0) failure = "a warp operation that some lanes miss";
  return runnable > 0;
}

// Runs a warp of the block. Returns false once all its threads are done.
bool advance(Block& b) {
  if (!b.runnable.empty()) {
    const unsigned place = draw.below(b.runnable.size());
    if (!run_warp(b, b.runnable[place].value)) {
      b.runnable[place] = b.runnable.back();
      b.runnable.pop_back();
    }
    return true;
  }
  unsigned done = 0;
  for (unsigned i = 0; i < grid.threads; ++i) done += b.threads[i].waiting == Waiting::kDone;
  if (done == grid.threads) return false;
  if (done > 0) {
    failure = "a barrier that some threads of the block miss";
    return true;
  }
  ++b.barriers;
  b.votes[b.barriers % 2] = false;
  for (unsigned i = 0; i < grid.threads; ++i) {
    b.threads[i].waiting = Waiting::kNot;
    if (i % kWarp == 0) b.runnable.push_back({i});
  }
  return true;
}

// If a second block used the fibers of a first, ThreadSanitizer would take it as ordered after the
// first, but nothing orders two blocks of a grid: so with ThreadSanitizer all blocks are resident.
size_t most_resident(unsigned blocks) {
  if (races_are_watched()) return blocks;
  return std::min(blocks, std::max(1u, kResidentThreads / grid.threads));
}

void run_blocks(unsigned blocks) {
  static std::vector<Block> resident;
  std::vector<Index> waiting(blocks);
  for (unsigned i = 0; i < blocks; ++i) waiting[i] = {i};
  std::shuffle(waiting.begin(), waiting.end(), draw);
  const auto start_next = [&](Block& b) {
    start(b, waiting.back().value);
    waiting.pop_back();
  };
  const size_t most = most_resident(blocks);
  if (resident.size() < most) resident.resize(most);
  std::vector<Block*> running;
  for (size_t i = 0; i < most; ++i) {
    start_next(resident[i]);
    running.push_back(&resident[i]);
  }
  while (!running.empty() && failure == nullptr) {
    const unsigned place = draw.below(running.size());
    Block& b = *running[place];
    if (advance(b)) continue;
    failure = damage(b);
    if (!waiting.empty()) {
      start_next(b);
    } else {
      running[place] = running.back();
      running.pop_back();
    }
  }
}

bool is_shared(const void* address) {
  const auto* byte = static_cast<const unsigned char*>(address);
  return block->shared <= byte && byte < block->shared + grid.shared_bytes;
}

}  // namespace

namespace host_cuda {

bool in_kernel() { return thread != nullptr; }

void fail(const char* message) {
  failure = message;
  back_to_scheduler();
  abort();  // nothing resumes it
}

unsigned char* shared_memory() { return block->shared; }

size_t shared_bytes() { return grid.shared_bytes; }

bool barrier(bool vote) {
  const unsigned parity = block->barriers % 2;
  block->votes[parity] |= vote;
  char* clock = &block->clocks->barrier[parity];
  release(clock);
  wait(Waiting::kBlock);
  acquire(clock);
  return block->votes[parity];
}

uint64_t exchange(uint64_t value, unsigned lane) {
  Thread* self = thread;
  Thread* warp = &block->threads[threadIdx.x / kWarp * kWarp];
  const unsigned parity = self->warp_operations++ % 2;
  self->shown[parity] = value;
  wait(Waiting::kWarp);
  return warp[lane].shown[parity];
}

uint32_t ballot(bool vote) {
  const Thread* warp = &block->threads[threadIdx.x / kWarp * kWarp];
  const unsigned parity = thread->warp_operations % 2;
  exchange(vote, 0);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    votes |= static_cast<uint32_t>(warp[lane].shown[parity]) << lane;
  }
  return votes;
}

void fence() {
  for (size_t i = 0; i < std::min(thread->reads, std::size(thread->read)); ++i) {
    acquire(const_cast<void*>(thread->read[i]));
  }
  thread->reads = 0;
  release(&block->clocks->fence[threadIdx.x]);
  thread->fenced = true;
}

void before_atomic(const void* address, size_t bytes) {
  if (host_cuda_atomic != nullptr) host_cuda_atomic(address, bytes, __builtin_return_address(0));
  if (is_shared(address)) return;
  if (draw.below(4) == 0) wait(Waiting::kNot);
  thread->read[thread->reads++ % std::size(thread->read)] = address;
}

// The thread may have done more since its fence. The publisher's clock does not include that.
void after_atomic(const void* address) {
  if (!races_are_watched() || is_shared(address) || !thread->fenced) return;
  if (thread->publisher == nullptr) thread->publisher = __tsan_create_fiber(0);
  switch_fiber(thread->publisher);
  acquire(&block->clocks->fence[threadIdx.x]);
  release(const_cast<void*>(address));
  switch_fiber(thread->fiber);
}

const char* run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, void (*call)(void*),
                     void* argument) {
  if (threads % kWarp != 0 || threads > kMostThreads) return "a block must be 1 to 32 full warps";
  if (blocks == 0) return "an empty grid";
  if (shared_bytes > static_cast<size_t>(device.shared_bytes_per_block)) {
    return "more shared memory than the device has";
  }
  ++device.launches;
  if (host_cuda_launched != nullptr) host_cuda_launched();
  draw.state = (device.seed << 32) + static_cast<uint64_t>(device.launches);
  gridDim = {blocks};
  blockDim = {threads};
  grid = {threads, shared_bytes, call, argument};
  failure = nullptr;
  if (races_are_watched()) scheduler_fiber = __tsan_get_current_fiber();
  release(&grid_begin);
  run_blocks(blocks);
  acquire(&grid_end);
  return failure;
}

}  // namespace host_cuda
