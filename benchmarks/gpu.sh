#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build for the card, tests, compute-sanitizer, benchmark.
# Downloads nothing. A part that fails does not stop the others; the last lines say which failed.
#
#   PYTHON=python3 OUT=benchmarks/results/gpu benchmarks/gpu.sh [PART ...]
#
# With names of parts, such as tests or ncu, it runs those alone.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-benchmarks/results/gpu}")
mkdir -p "$OUT"
failed=()
only=("$@")

part() {
  local name=$1
  shift
  if ((${#only[@]})) && [[ " ${only[*]} " != *" $name "* ]]; then return; fi
  echo "== $name: $*"
  if "$@" >"$OUT/$name.log" 2>&1; then
    tail -n 3 "$OUT/$name.log"
  else
    failed+=("$name")
    tail -n 40 "$OUT/$name.log"
  fi
}

environment() {
  nvidia-smi
  nvcc --version
  "$PYTHON" -c "import torch, triton; print(torch.__version__, torch.version.cuda, triton.__version__)"
  git rev-parse HEAD
  git status --porcelain
}

TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") || {
  echo "no CUDA device that $PYTHON's torch can use"
  exit 1
}
export TORCH_CUDA_ARCH_LIST PDP_BUILD_CUDA=1

# A small matrix of every kernel: each tool runs it some 10 to 50 times slower than it is.
SANITIZED=(tests/test_threshold.py tests/test_digit_counts.py tests/test_hard_mask.py tests/test_soft_mask.py
  tests/test_soft_mask_nm.py tests/test_soft_mask_channel.py tests/test_pq_index.py
  -k "gpu and (mixed or special or tiles or layouts or out_dtype or unusual or inf_and_nan or both_half)")

# Of each kernel: time, bytes moved, occupancy, and what atomics and banks of shared memory cost.
METRICS=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
METRICS+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
METRICS+=,smsp__inst_executed_op_shared_atom.sum,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum

part environment environment
part build "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --editable .
part build-info "$PYTHON" -c "import json, pdp_kernels; print(json.dumps(pdp_kernels.build_info(), indent=1))"
part tests "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    part "$tool" timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m pytest -q -p no:cacheprovider "${SANITIZED[@]}"
  done
else
  echo "compute-sanitizer is not installed: left out"
fi
part benchmark "$PYTHON" -m benchmarks --device cuda --dtypes float32 bfloat16 --budget 0.5 \
  --steps copy sum threshold forward backward mask step --out "$OUT" --plot "$OUT/benchmark.png"
part benchmark-large "$PYTHON" -m benchmarks --device cuda --dtypes float32 bfloat16 --budget 0.5 \
  --inputs 1e9 llama-7b-block --steps copy sum threshold forward backward \
  --providers copy sum compiled ours --out "$OUT/large"
for share in 0.5 0.8; do
  part "benchmark-$share" "$PYTHON" -m benchmarks --device cuda --dtypes float32 bfloat16 --budget 0.5 \
    --sparsity "$share" --inputs 16777216 gpt2 --steps sum threshold --out "$OUT/sparsity-$share"
done
part benchmark-2to4 "$PYTHON" -m benchmarks --device cuda --dtypes float32 bfloat16 \
  --inputs 2359296 16777216 100663296 --steps copy mask-2:4 pack-2:4 --out "$OUT/2to4"
part benchmark-channel "$PYTHON" -m benchmarks --device cuda --dtypes float32 bfloat16 \
  --inputs conv-1x1 conv-3x3 100663296 resnet50 --steps copy mask-channel --out "$OUT/channel"
part benchmark-pq-index "$PYTHON" -m benchmarks --device cuda --dtypes float32 bfloat16 \
  --inputs 100663296 resnet50 gpt2 --steps copy pq-index --out "$OUT/pq-index"
part training-step "$PYTHON" -m benchmarks.training_step --device cuda --budget 3 --out "$OUT/training_step.json"
part distributed "$PYTHON" -m benchmarks.distributed --device cuda --ranks 1 --out "$OUT/distributed.json"
if command -v ncu >/dev/null; then
  part ncu ncu --profile-from-start off --csv --log-file "$OUT/ncu.csv" --metrics "$METRICS" \
    "$PYTHON" -m benchmarks.profile
else
  echo "ncu is not installed: left out"
fi
part sparse-linear "$PYTHON" -m benchmarks.sparse_linear --out "$OUT/sparse_linear.json"

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}; logs in $OUT"
  exit 1
fi
echo "all passed; results in $OUT"
