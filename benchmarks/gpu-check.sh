#!/usr/bin/env bash
# Everything that needs a GPU, the most important first, in at most 9.5 minutes and without building:
#   benchmarks/gpu-check.sh [OUTDIR]        (default benchmarks/results)
# runs what gpu-pack.sh collected with the libtorch of the Python there, prints one table, and writes
# OUTDIR/gpu_<device>_<date>.md and .json, and OUTDIR/gpu_check.log. The state after every part is on disk.
#   TSM_PYTHON         a Python with torch 2.11 (default: python3)
#   TSM_GPU_BIN        the collected programs (default: benchmarks/gpu-bin)
#   TSM_GPU_SECONDS    the whole time (default: 570)
#   TSM_GPU_CHECK_CPU  1: every part on the CPU in tiny sizes, to check the script itself
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 70
out=${1:-benchmarks/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 73
bin=${TSM_GPU_BIN:-$root/benchmarks/gpu-bin}
total=${TSM_GPU_SECONDS:-570}
cpu=${TSM_GPU_CHECK_CPU:-0}
export TSM_GPU_CHECK_CPU=$cpu

for program in tsm-launch tsm-trainer tsm-data tsm-bench test-torch-ext test-trainer test-gpu; do
  if [ ! -x "$bin/$program" ]; then
    echo "error: $bin has no $program: run benchmarks/gpu-pack.sh where the project builds" >&2
    exit 69
  fi
done
python=${TSM_PYTHON:-python3}
if ! torch=$("$python" -c 'import os, torch; assert torch.__version__.startswith("2.11."), torch.__version__; print(os.path.dirname(torch.__file__))'); then
  echo "error: $python has no torch 2.11; name one that has with TSM_PYTHON" >&2
  exit 69
fi
python=$(command -v "$python")
libraries=$torch/lib
for folder in "$(dirname "$torch")"/nvidia/*/lib; do
  [ -d "$folder" ] && libraries=$libraries:$folder
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/logs" "$work/bench"
log=$out/gpu_check.log
: >"$log"
export PYTHONUNBUFFERED=1
# Ours alone: PyTorch finds its own.
ours() { LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$@"; }
left() { echo $((total - SECONDS - 10)); }

# part LIMIT NAME FUNCTION ARGS...: its outcome is recorded whatever it does, and the report rewritten.
part() {
  local limit=$1 name=$2 began=$SECONDS rc
  shift 2
  if [ "$(left)" -lt 10 ]; then
    printf '%s\t0\t%s\t-1\n' "$name" "$limit" >>"$work/parts.tsv"
  else
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    echo "== $name, at most $limit s, at second $SECONDS" | tee -a "$log" >&2
    # A shell of its own, so that the limit holds for a function and ends all that it started.
    timeout -k 5 "$limit" bash -c '"$@"' part "$@" >"$work/logs/$name" 2>&1 </dev/null
    rc=$?
    cat "$work/logs/$name" >>"$log"
    echo "== $name ended with status $rc after $((SECONDS - began)) s" | tee -a "$log" >&2
    printf '%s\t%s\t%s\t%s\n' "$name" $((SECONDS - began)) "$limit" "$rc" >>"$work/parts.tsv"
  fi
  "$python" benchmarks/gpu_report.py "$work" "$out" "$bin/commit" >"$work/table" 2>>"$log" || tail -3 "$log" >&2
}

facts() {
  if [ "$cpu" = 1 ]; then echo "gpu: none, a dry run on the CPU"; else
    nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap,power.limit,clocks.max.sm,ecc.mode.current,mig.mode.current --format=csv || return
  fi
  uname -srm
  echo "$(getconf _NPROCESSORS_ONLN) cores"
  "$python" -c 'import torch; print("torch", torch.__version__, "cuda", torch.version.cuda, "devices", torch.cuda.device_count())'
}

torch_ext() {
  if [ "$cpu" = 1 ]; then ours "$bin/test-torch-ext" cuda::; else ours "$bin/test-torch-ext" --ignored --test-threads=1; fi
}

# In a dry run these take the CPU themselves: see the head of trainer/tests/gpu.rs.
gpu_tests() { ours "$bin/test-gpu" --ignored --test-threads=1 --nocapture "$@"; }

nvml() {
  if [ "$cpu" = 1 ]; then ours "$bin/test-trainer" meter::nvml; else ours "$bin/test-trainer" --ignored meter::nvml; fi
}

data=$work/demo
# Common to all demo runs; an absolute root, as the set lies outside the checkout.
# Words, not an array: only plain variables reach the parts' shells.
demo_values="data.root=$data data.train_list=$data/train.txt data.val_list=$data/val.txt data.class_names=$data/classes.txt run.dir=$work/runs"
if [ "$cpu" = 1 ]; then
  made="--train 32 --val 16" devices="--cpus 1" epochs=1 more_epochs=2
  demo_values+=" launch.device=cpu"
else
  made="--train 1200 --val 240" devices="--gpus 1" epochs=9 more_epochs=10
  demo_values+=" launch.device=gpu data.workers=6"
fi

# demo NAME KEY=VALUE...: through the launcher, as a user does it.
demo() {
  local name=$1
  shift
  ours "$bin/tsm-data" demo --out "$data" $made >/dev/null || return
  ours "$bin/tsm-launch" $devices --run-dir "$work/runs/$name" configs/demo.yaml launch.nproc_per_node=1 train.batch_per_rank=16 $demo_values train.epochs=$epochs "$@"
}

# The run of `demo fp32` goes on where it stopped, with more epochs.
resume() {
  ours "$bin/tsm-launch" $devices --run-dir "$work/runs/resumed" --resume "$work/runs/fp32" configs/demo.yaml \
    launch.nproc_per_node=1 train.batch_per_rank=16 $demo_values train.epochs=$more_epochs
}

# Two ranks as two processes on one card: NCCL refuses two ranks on a GPU of one host, so each says that it is on another.
two_ranks() {
  ours "$bin/tsm-data" demo --out "$data" $made >/dev/null || return
  mkdir -p "$work/runs/two"
  local port rank pids=() status=0
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  for rank in 0 1; do
    RANK=$rank LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=1 GROUP_RANK=$rank MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
      TSM_RUN_DIR=$work/runs/two OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo \
      NCCL_HOSTID=rank$rank NCCL_MNNVL_ENABLE=0 NCCL_RAS_ENABLE=0 NCCL_MAX_CTAS=2 NCCL_DEBUG=WARN \
      ours "$bin/tsm-trainer" --config configs/demo.yaml $demo_values train.epochs=$epochs &
    pids+=($!)
  done
  for rank in 0 1; do
    wait "${pids[$rank]}" || { status=$?; echo "rank $rank ended with status $status"; }
  done
  return $status
}

# Over all GPUs there are; one alone has nobody to send to, but the sum is made and checked on it.
all_reduce() {
  local all="--gpus auto"
  [ "$cpu" = 1 ] && all="--cpus 2"
  ours "$bin/tsm-launch" $all --run-dir "$work/runs/all-reduce" -- "$bin/tsm-trainer" all-reduce --seconds 1
}

# bench NAME ARGS...: our step, with PyTorch's in turn where --against is among the arguments.
bench() {
  local name=$1
  shift
  if [ "$cpu" = 1 ]; then
    # Of the arguments only --against stays: the command line refuses a flag given twice.
    case $* in *--against*) set -- --against "$python" ;; *) set -- ;; esac
    set -- "$@" --precision "${name%%-*}" --arch mobilenetv2 --size 32 --segments 2 --warmup 1 --steps 2 --device cpu --threads 1 --clips 1 --rounds 1
  else
    set -- "$@" --arch resnet50 --size 224 --warmup 12 --steps 30 --device gpu
  fi
  ours "$bin/tsm-bench" step --json "$work/bench/$name.json" "$@"
}

# The rest of the time: PyTorch eager, compiled and as a graph, and the questions about the device.
peers() {
  if [ "$cpu" = 1 ]; then
    "$python" benchmarks/peers/pytorch_step.py --preset smoke --threads 1 --engines eager && \
      "$python" benchmarks/peers/gpu_facts.py --device cpu --parts device,nvcuvid --json "$work/facts.json"
  else
    TSM_PYTHON=$python TSM_GPU_SECONDS=$1 benchmarks/peers/gpu.sh "$out" compile step nccl cudnn ceilings
  fi
}

export root bin python cpu work out data made devices libraries demo_values epochs more_epochs
export -f ours facts torch_ext gpu_tests nvml demo resume two_ranks all_reduce bench peers

part 20 facts facts
part 60 torch-ext torch_ext
part 90 tests gpu_tests --skip two_ranks
part 60 two-ranks-test gpu_tests two_ranks
part 60 demo-fp32 demo fp32
part 60 two-ranks-demo two_ranks
part 10 all-reduce all_reduce
part 100 step-bf16-8 bench bf16-8 --precision bf16 --clips 8 --rounds 2 --against "$python"
for clips in 16 32; do
  part 60 step-bf16-$clips bench bf16-$clips --precision bf16 --clips $clips --rounds 1 --against "$python"
done
for precision in fp16 o2 fp32; do
  for clips in 8 16 32; do
    part 40 step-$precision-$clips bench $precision-$clips --precision $precision --clips $clips --rounds 1
  done
done
part 60 step-fp16-8-pytorch bench fp16-8-pytorch --precision fp16 --clips 8 --rounds 1 --against "$python"
part 40 demo-resume resume
for mode in bf16 fp16 o2; do
  part 40 demo-$mode demo $mode train.precision.mode=$mode
done
part 40 demo-deterministic demo deterministic train.deterministic=true
part 20 nvml nvml
part 400 pytorch peers "$(left)"

cat "$work/table"
# A part that failed fails the whole; one that found no time does not.
! awk -F '\t' '$4 > 0 { bad = 1 } END { exit !bad }' "$work/parts.tsv"
