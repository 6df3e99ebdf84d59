#!/usr/bin/env bash
# PyTorch's numbers on this machine's GPU, the most important first, in at most ten minutes:
#   gpu.sh OUTDIR [PART...]
# OUTDIR gets pytorch_<gpu>_<date>.json and .md and log.txt. TSM_PYTHON names the Python (default python3),
# TSM_GPU_SECONDS the whole time (default 570), TSM_VIDEO_CACHE a folder of pytorch_data.py's files (default: made anew).
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
all=(step ceilings compile batches cudnn nccl kernels mobilenet ddp fp16graph small data)
if [ $# -lt 1 ]; then
  echo "usage: gpu.sh OUTDIR [PART...]; parts: ${all[*]}" >&2
  exit 64
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 73
shift
[ $# -gt 0 ] && wanted=("$@") || wanted=("${all[@]}")
python=${TSM_PYTHON:-python3}
[[ $python == */* ]] && python=$(realpath -s "$python")  # the scripts run in their own folder
total=${TSM_GPU_SECONDS:-570}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/parts"
cache=$(realpath -sm "${TSM_VIDEO_CACHE:-$work/videos}")
log=$out/log.txt
: >"$log"
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$work/inductor"

# part LIMIT NAME COMMAND...: the file NAME.json in the parts folder is the command's to write.
order=0
part() {
  local limit=$1 name=$2
  shift 2
  order=$((order + 1))
  json=$work/parts/$(printf %02d $order)-$name.json
  local left=$((total - SECONDS - 8))
  if [ $left -lt 15 ]; then
    echo "== $name: no time left" | tee -a "$log" >&2
    return
  fi
  [ $limit -gt $left ] && limit=$left
  echo "== $name, at most $limit s, at second $SECONDS" | tee -a "$log" >&2
  (cd "$here" && timeout -k 5 "$limit" "$@" --json "$json") >>"$log" 2>&1
  local rc=$?
  [ $rc -ne 0 ] && echo "== $name ended with status $rc" | tee -a "$log" >&2
  # After every part, so that what was measured is there even if this script is cut.
  "$python" "$here/report.py" "$work/parts" "$out" >>"$log" 2>&1
}

step() { part "$1" "$2" "$python" pytorch_step.py --no-kernels --preset gpu "${@:3}"; }
shipped=eager/tf32/nchw/cat/foreach
eager=eager/bf16/nhwc/onepass/fused
graph=graph/bf16/nhwc/onepass/fused
compiled=compile/bf16/nhwc/onepass/fused,compile-graph/bf16/nhwc/onepass/fused

for name in "${wanted[@]}"; do
  case $name in
    step) step 170 step --models resnet50 --sizes 224 --clips 8,32 --time-limit 130 ;;
    ceilings) part 90 ceilings "$python" gpu_facts.py --parts device,ceilings,transfer,launch,nvcuvid ;;
    compile) step 160 compile --preset gpu-compile --variants $compiled --time-limit 110 ;;
    batches) step 60 batches --models resnet50 --sizes 224 --clips 16,64 --variants $graph,$eager,$shipped --rounds 4 --time-limit 40 ;;
    cudnn) part 110 cudnn "$python" gpu_facts.py --parts cudnn ;;
    nccl) part 100 nccl "$python" gpu_facts.py --parts nccl ;;
    kernels) part 50 kernels "$python" pytorch_step.py --preset gpu --models resnet50 --sizes 224 --clips 8 --variants $eager,$shipped,$graph --rounds 1 --steps 2 --warmup 2 ;;
    mobilenet) step 60 mobilenet --models mobilenetv2 --sizes 224 --clips 8,32 --variants $graph,$eager,$shipped --rounds 4 --time-limit 40 ;;
    ddp) part 60 ddp "$python" -m torch.distributed.run --standalone --nproc-per-node "$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')" \
      pytorch_step.py --no-kernels --preset gpu --models resnet50 --sizes 224 --clips 8 --variants $eager,$graph,$shipped ;;
    fp16graph) step 40 fp16graph --models resnet50 --sizes 224 --clips 8 --variants graph/fp16/nhwc/onepass/fused,eager/fp16/nhwc/onepass/fused ;;
    small) step 60 small --sizes 112 --clips 8,32 --variants $graph,$eager,$shipped --rounds 4 --time-limit 40 ;;
    data) part 240 data "$python" pytorch_data.py --cache "$cache" --rounds 3 --seconds 2 --time-limit 200 ;;
    *) echo "error: no part is named $name; there are ${all[*]}" >&2; exit 64 ;;
  esac
done
ls "$out"/pytorch_*.json >/dev/null 2>&1 || { echo "error: no part gave a result; see $log" >&2; exit 1; }
