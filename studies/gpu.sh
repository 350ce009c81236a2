#!/usr/bin/env bash
# The accuracy studies that need a GPU, side by side on one, in order of worth. Made for a bare
# machine that is rented by the minute; the package is built, and nothing is downloaded.
#
#   DATA=folder OUT=folder DEADLINE=240 studies/gpu.sh [PART ...]
#
# DATA holds cifar10-jpeg.tar.xz and tinyshakespeare.txt. At the deadline runs are stopped, and what
# is done makes the tables. Parts are methods, nm, channels, finetune and scratch; a name may be a
# pattern. Results: $OUT/gpu.tar.gz (for each part STUDY.csv, .md, .png and a log with the
# progress), $OUT/summary.csv (how each part ended) and $OUT/table.txt (all tables).
#
# Without git PDP_COMMIT names the commit that the rows state.
#
# EPOCHS, SEEDS and WORKERS change the trainings of ResNet-20. With MPS=1 kernels of several
# processes run at the same time, by NVIDIA's multi-process service; without it the processes take
# turns.
#
# With MPS=1 an H100 finished 16 trainings of ResNet-20 over 15 epochs side by side in 125 s. The
# times below are estimates for processes that take turns, not yet measured: a step of ResNet-20
# takes 1.5 ms of the GPU and 4 ms of the host, so that 4 processes fill the GPU. 15 epochs are 5,865
# steps, 9 s of the whole GPU. A step of the GPT takes 7 ms of the GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
OUT=${OUT:-studies/results/gpu}
DEADLINE=${DEADLINE:-600}
DEVICE=${DEVICE:-cuda}
EPOCHS=${EPOCHS:-15}
SEEDS=${SEEDS:-3}
WORKERS=${WORKERS:-16}
CHOSEN=("$@")
GROUP=studies
: "${DATA:?must be the folder of the data sets}"

. benchmarks/parts.sh

# Copies what the grids have written so far; their checkpoints stay where they are.
short_table() {
  local file
  for file in "$SCRATCH"/grids/*/*.{csv,md,png}; do
    [[ -e $file ]] || continue
    mkdir -p "$RESULTS/$(basename "$(dirname "$file")")"
    cp "$file" "$RESULTS/$(basename "$(dirname "$file")")"
    if [[ $file == *.md ]]; then cat "$file" && echo; fi
  done
}

environment() {
  nproc
  nvidia-smi
  "$PYTHON" -c "
import json, torch, pdp_kernels
print('torch', torch.__version__)
print(json.dumps(pdp_kernels.build_info(), indent=1))"
}
export -f environment

# grid NAME STUDY ARGUMENTS...: starts a grid, and waits until each of its runs has a worker. So the
# processes of the next grid start while the GPU is busy. Imports and tables take the last 15 s.
grid() {
  local name=$1 study=$2 left=$((DEADLINE - SECONDS))
  shift 2
  start "$name" "$left" "$PYTHON" -m studies.grid "$study" --device "$DEVICE" --data-dir "$DATA" \
    --prepared "$SCRATCH/prepared" --out "$SCRATCH/grids/$name" --time-limit "$((left - 15))" "$@"
  while [[ ${pid_of[$name]:-} ]] && kill -0 "${pid_of[$name]}" 2>/dev/null &&
    ! grep -q ' 0 waiting' "$RESULTS/$name.log"; do
    sleep 1
  done
}

start_mps() {
  export CUDA_MPS_PIPE_DIRECTORY=$SCRATCH/mps CUDA_MPS_LOG_DIRECTORY=$SCRATCH/mps
  mkdir "$SCRATCH/mps"
  nvidia-cuda-mps-control -d &&
    timeout 60 "$PYTHON" -c "import torch; torch.ones(9, device='cuda').sum().item()" && return
  stop_mps
  echo "no multi-process service: the processes take turns"
}

stop_mps() {
  echo quit | timeout 10 nvidia-cuda-mps-control
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
} 2>/dev/null

begin
start environment 30 environment
if [[ ${MPS:-} == 1 ]]; then start_mps; fi

# 11 runs for each seed: 2 seeds are 130,000 steps, 195 s when processes take turns.
resnet20=(--network resnet20 --epochs "$EPOCHS" --workers "$WORKERS")
grid methods methods "${resnet20[@]}" --seeds "$((SEEDS < 2 ? SEEDS : 2))" \
  --sparsities 0.863 0.95 --settings dense pdp pdp-paper gmp-global granet acdc
# 18 runs, 160 s.
grid nm nm "${resnet20[@]}" --seeds "$SEEDS" --patterns 2:4 1:4 --settings pdp sr-ste one-shot
# 9 runs, 80 s.
grid channels channels "${resnet20[@]}" --seeds "$SEEDS" --sparsities 0.5 \
  --settings pdp one-shot slimming

# Epochs of 250 steps. 8 workers have 30 GB of activations. Dense 1,000 steps, then 14 runs of 500:
# 60 s.
gpt=(--network gpt-small --workers 8 --seeds 2 --sparsities 0.75 0.9
  --settings dense pdp gmp-global movement)
grid finetune finetune "${gpt[@]}" --pretraining-epochs 4 --epochs 2
# 14 runs of 750 steps: 75 s.
grid scratch methods "${gpt[@]}" --epochs 3
finish
if [[ ${CUDA_MPS_PIPE_DIRECTORY:-} ]]; then stop_mps; fi
conclude
