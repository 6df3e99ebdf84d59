#!/usr/bin/env bash
# PyTorch's numbers on this machine's CPU, for a quiet machine, at most 25 minutes on two cores:
#   cpu.sh OUTDIR [PART...]
# OUTDIR gets pytorch_<cpu>_<date>.json and .md and log.txt. TSM_PYTHON names the Python (default python3),
# TSM_VIDEO_CACHE a folder for pytorch_data.py's files (default: made anew).
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
all=(step step2 ddp ddp2 data compile)
if [ $# -lt 1 ]; then
  echo "usage: cpu.sh OUTDIR [PART...]; parts: ${all[*]}" >&2
  exit 64
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 73
shift
[ $# -gt 0 ] && wanted=("$@") || wanted=("${all[@]}")
python=${TSM_PYTHON:-python3}
[[ $python == */* ]] && python=$(realpath -s "$python")  # the scripts run in their own folder
total=1500
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/parts"
log=$out/log.txt
: >"$log"
export PYTHONUNBUFFERED=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS

order=0
part() {
  local limit=$1 name=$2
  shift 2
  order=$((order + 1))
  local left=$((total - SECONDS - 8))
  if [ $left -lt 15 ]; then
    echo "== $name: no time left" | tee -a "$log" >&2
    return
  fi
  [ $limit -gt $left ] && limit=$left
  echo "== $name, at most $limit s, at second $SECONDS" | tee -a "$log" >&2
  (cd "$here" && timeout -k 5 "$limit" "$@" --json "$work/parts/$(printf %02d $order)-$name.json") >>"$log" 2>&1
  local rc=$?
  [ $rc -ne 0 ] && echo "== $name ended with status $rc" | tee -a "$log" >&2
  "$python" "$here/report.py" "$work/parts" "$out" >>"$log" 2>&1
}

shipped=eager/fp32/nchw/cat/foreach
best=eager/fp32/nhwc/onepass/fused,eager/bf16/nhwc/onepass/fused
cores=$(nproc)
ranks=(-m torch.distributed.run --standalone --nproc-per-node "$cores" pytorch_step.py --threads 1)

for name in "${wanted[@]}"; do
  OMP_NUM_THREADS=$cores
  case $name in
    # The batches at which PyTorch does best on two cores: one clip at 224 pixels, two at 112.
    step) part 300 step "$python" pytorch_step.py --preset cpu --sizes 224 --clips 1 ;;
    step2) part 240 step2 "$python" pytorch_step.py --preset cpu --sizes 112 --clips 2 ;;
    ddp) OMP_NUM_THREADS=1 && part 270 ddp "$python" "${ranks[@]}" --preset cpu --sizes 224 --clips 1 --variants $shipped,$best ;;
    ddp2) OMP_NUM_THREADS=1 && part 240 ddp2 "$python" "${ranks[@]}" --preset cpu --sizes 112 --clips 1,2 --variants $shipped,$best ;;
    data) part 440 data "$python" pytorch_data.py --cache "$(realpath -sm "${TSM_VIDEO_CACHE:-$work/videos}")" --rounds 3 --seconds 1.5 --batch 4 --time-limit 420 ;;
    compile) part 400 compile "$python" pytorch_step.py --preset cpu --models mobilenetv2,resnet50 --sizes 112 --clips 2 \
      --variants compile/fp32/nchw/onepass/fused,compile/bf16/nhwc/onepass/fused --time-limit 250 ;;
    *) echo "error: no part is named $name; there are ${all[*]}" >&2; exit 64 ;;
  esac
done
ls "$out"/pytorch_*.json >/dev/null 2>&1 || { echo "error: no part gave a result; see $log" >&2; exit 1; }
