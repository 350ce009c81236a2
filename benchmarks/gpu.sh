#!/usr/bin/env bash
# Everything that needs a GPU, in three calls in order of importance: is it right, how fast is it,
# and which constants suit the card. Made for a bare machine that is rented by the minute: it builds
# for the card of the machine, and downloads nothing.
#
#   PYTHON=python3 OUT=folder DEADLINE=540 PDP_COMMIT=$(git describe --always --dirty) \
#     benchmarks/gpu.sh [right|fast|tuned|PART ...]
#
# Without names all parts run; otherwise the named ones, after environment and build. A name may be a
# pattern: 'memcheck-*'. The sanitizers of the CUDA kernels need the part workloads.
# Results: $OUT/gpu.tar.gz (logs and results), $OUT/summary.csv (how each part ended) and
# $OUT/table.txt (the benchmarks in short), updated after each part.
#
# Limits are about twice the estimate: bytes at 3 TB/s, compile times, and 6 s for each process that
# imports torch. A part that fails or reaches its limit costs the others nothing but time.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
DEADLINE=${DEADLINE:-1800}
CHOSEN=("$@")

. benchmarks/parts.sh

short_table() { "$PYTHON" -m benchmarks.report "$RESULTS"; }

environment() {
  uname -a
  nproc
  nvidia-smi
  nvidia-smi -q -d CLOCK,POWER,PERFORMANCE,ECC
  nvcc --version
  "$PYTHON" -m pip list --disable-pip-version-check
}

build() {
  "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --editable . || return
  "$PYTHON" -c "
import json, pdp_kernels
info = pdp_kernels.build_info()
print(json.dumps(info, indent=1))
assert all(info['backends'].values()), info['reasons']"
}

# Builds and runs the torch-free program over csrc/cuda.
workloads() {
  nvcc -std=c++17 -O2 -lineinfo -arch=native -I csrc -o "$1" instruments/host_cuda/workloads.cu && "$1"
}
export -f environment build workloads

# In parallel, with failures written to a file as they happen.
tests() {
  local workers
  workers=$(nproc)
  OMP_NUM_THREADS=1 "$PYTHON" -m pytest -m gpu -q --tb=short -p no:cacheprovider \
    -n "$((workers < 16 ? workers : 16))" --dist worksteal \
    -p benchmarks.gpu_tests --test-limit 200 --failures "$1" --durations 15
}
export -f tests

bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" -m benchmarks --device cuda \
    --dtypes float32 bfloat16 float32/bfloat16 --out "$RESULTS/$name" "$@"
}

# For each kernel: time, bytes moved, occupancy, atomics and bank conflicts of shared memory.
METRICS=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
METRICS+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
METRICS+=,smsp__inst_executed.sum,smsp__inst_executed_op_shared_atom.sum
METRICS+=,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum

profile() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" ncu --clock-control none --profile-from-start off \
    --kernel-name-base demangled --kernel-name "regex:$KERNELS" --csv --print-units base \
    --log-file "$RESULTS/$name.csv" --metrics "$METRICS" "$PYTHON" -m benchmarks.profile "$@"
}

# Our kernels by their demangled names, in csrc/cuda and in triton_kernels.
KERNELS='.*pdp::.*|_?(soft_mask|hard_mask|compress|channel)_.*'

parts() {
  GROUP=always
  start environment 30 environment
  # 25 s of nvcc for one architecture, and 20 s of CPU kernels over all cores.
  start build 120 build
  GROUP=right
  start workloads 120 workloads "$SCRATCH/workloads"
  GROUP=tuned
  start variants-build 150 "$PYTHON" -m benchmarks.variants build "$SCRATCH/variants"
  finish
  ok build || stop "the build failed"

  # Is it right?
  GROUP=right
  # 45 variants compiled by Triton, half a second each.
  part smoke 60 "$PYTHON" -m benchmarks.smoke
  # A thousand tests and as many compilations, by 16 workers.
  part tests 230 tests "$RESULTS/failures.txt"
  # All tools at once: a few MB of weights, 10 to 50 times slower than without a tool. Triton's
  # kernels come from the cache that smoke has filled.
  for tool in memcheck racecheck initcheck synccheck; do
    sanitizer=(compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20)
    start "$tool-cuda" 60 "${sanitizer[@]}" "$SCRATCH/workloads"
    start "$tool-triton" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "${sanitizer[@]}" "$PYTHON" -m benchmarks.smoke --triton --no-poison
  done
  finish
  # 3 inputs x (2 dtypes of weights x 3 steps + 3 pairs of dtypes x 3 steps) of 0.3 s, and 6
  # compilations by inductor of 3 s.
  bench core 60 --budget 0.2 --inputs 2359296 100000000 resnet50 \
    --steps copy sum threshold forward backward step --providers copy sum compiled ours
  # 65 launches, each replayed for a handful of counters; then the same for a million weights, where
  # every launch counts.
  profile ncu 60 --rows 8192
  profile ncu-small 45 --rows 256

  # How fast is it?
  GROUP=fast
  # 7 inputs x 15 as in core, 4 lists of weights x 15 for the host, and compilations.
  bench sizes 100 --budget 0.2 --limit 0.5 \
    --inputs 65536 1048576 16777216 100000000 resnet50 bert-base gpt2 \
    --steps copy sum threshold forward backward step \
    --providers copy sum sort eager compiled compiled-sort ours
  # One size for the eager providers: kthvalue runs in one block, 2.5 s at 1e8.
  bench eager 60 --budget 0.5 --inputs 2359296 --steps copy threshold mask step \
    --masks relative paper
  # 4 tasks: float64 gradients once, then 2 s; 2 compilations.
  TAIL=4 part host 40 "$PYTHON" -m benchmarks.host --device cuda --budget 2 \
    --out "$RESULTS/host.json"
  bench 2to4 45 --budget 0.2 --inputs 2359296 16777216 100663296 --steps copy mask-2:4 pack-2:4
  bench channel 50 --budget 0.2 --inputs conv-1x1 conv-3x3 100663296 resnet50 \
    --steps copy mask-channel
  bench pq-index 30 --budget 0.2 --inputs 100663296 resnet50 gpt2 --steps copy pq-index
  bench sparsity-50 25 --budget 0.2 --sparsity 0.5 --inputs 16777216 gpt2 \
    --steps copy sum threshold --providers copy sum ours
  bench sparsity-80 25 --budget 0.2 --sparsity 0.8 --inputs 16777216 gpt2 \
    --steps copy sum threshold --providers copy sum ours
  # 9 shapes of 0.5 s, and their packing.
  TAIL=9 part sparse-linear 35 "$PYTHON" -m benchmarks.sparse_linear --budget 0.5 \
    --out "$RESULTS/sparse_linear.json"
  part distributed 30 "$PYTHON" -m benchmarks.distributed --device cuda --ranks 1 \
    --out "$RESULTS/distributed.json"

  # Whole training steps, the largest weights, and other constants.
  GROUP=tuned
  # 4 tasks: float64 gradients once, then 3 s; 3 compilations.
  TAIL=4 part training 120 "$PYTHON" -m benchmarks.training_step --device cuda --budget 3 \
    --out "$RESULTS/training_step.json" --tasks "ResNet-50, 128 images, bfloat16" \
    "GPT-2 124M, 8 x 1024 tokens, bfloat16" "GPT 10.6M, 64 x 256 tokens" "pruner.step, GPT-2"
  # A sort of 1e9 weights for their thresholds, and 2 s for a billion in float64.
  bench large 100 --budget 0.3 --inputs 1e9 llama-7b-block \
    --steps copy sum threshold forward backward --providers copy sum compiled ours
  # 35 choices x 2 dtypes x 2 to 3 steps of 0.2 s, and two compilations for each.
  TAIL=80 part sweep 120 "$PYTHON" -m benchmarks.sweep --out "$RESULTS/sweep.csv"
  # 9 builds of 10 s.
  TAIL=54 part variants 110 "$PYTHON" -m benchmarks.variants time "$SCRATCH/variants" \
    --out "$RESULTS/variants"
}

known="right fast tuned $(LISTING=1 && parts)"
for pattern in "$@"; do
  for name in $known; do
    # shellcheck disable=SC2053 # a pattern
    [[ $name == $pattern ]] && continue 2
  done
  echo "no part is called $pattern; there are:" $known >&2
  exit 2
done
((${#CHOSEN[@]})) && CHOSEN+=(environment build)

PATH=$PATH:/usr/local/cuda/bin:$(echo /opt/nvidia/nsight-compute/*/ | tr ' ' :)
PDP_COMMIT=${PDP_COMMIT:-$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)}
capability="import torch; print('%d.%d' % torch.cuda.get_device_capability())"
TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c "$capability") || {
  echo "no CUDA device that $PYTHON's torch can use"
  exit 1
}
export PYTHON PDP_COMMIT TORCH_CUDA_ARCH_LIST PDP_BUILD_CUDA=1 PYTHONUNBUFFERED=1
export NVCC_APPEND_FLAGS="-lineinfo -Xptxas -v"

begin
{
  echo "# commit: $PDP_COMMIT"
  fields=name,driver_version,clocks.sm,clocks.mem
  nvidia-smi --query-gpu="$fields" --format=csv,noheader | sed 's/^/# card: /'
} >>"$RESULTS/summary.csv"
parts
conclude
