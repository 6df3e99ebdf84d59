#!/usr/bin/env bash
# Do the peers' scripts run here, and do their results have the form that tsm-bench reads? Under a minute on two cores.
# TSM_PYTHON names the Python (default python3); without a PyTorch of 2.6 or later in it there is nothing to test.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${TSM_PYTHON:-python3}
[[ $python == */* ]] && python=$(realpath -s "$python")  # the scripts run in their own folder
skip() { echo "skipped: $*" >&2; exit 0; }
command -v "$python" >/dev/null || skip "no $python; set TSM_PYTHON to a Python with PyTorch 2.6 or later"
found=$("$python" -c 'import torch; v = torch.__version__; import torch.distributed; print(v, *v.split("+")[0].split(".")[:2])' 2>&1) ||
  skip "$python has no working PyTorch: $(tail -1 <<<"$found")"
read -r version major minor <<<"$(tail -1 <<<"$found")"
[ $((major * 1000 + ${minor%%[!0-9]*})) -ge 2006 ] || skip "PyTorch $version in $python is older than 2.6"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/parts" "$work/out"
# One thread a process: on a busy machine OpenMP's threads wait for each other far longer than they compute.
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
cd "$here" || exit 1
run() {
  "$@" >"$work/log" 2>&1 && return
  echo "FAILED: ${*}" >&2
  tail -20 "$work/log" >&2
  exit 1
}
run "$python" pytorch_step.py --self-test
run "$python" pytorch_step.py --preset smoke --threads 1 --json "$work/parts/01-step.json" --markdown "$work/step.md"
run "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pytorch_step.py --preset smoke --threads 1 \
  --variants eager/bf16/nhwc/onepass/fused,eager/fp32/nchw/cat/foreach --json "$work/parts/02-ddp.json"
run "$python" gpu_facts.py --device cpu --parts device,ceilings,nvcuvid --json "$work/parts/03-facts.json"
data=no
if ! command -v ffmpeg >/dev/null; then
  echo "skipped: the loaders: no ffmpeg to make their videos" >&2
elif ! "$python" -c 'import numpy, cv2' 2>/dev/null; then
  echo "skipped: the loaders: $python has no numpy or no cv2" >&2
else
  data=yes
  run "$python" pytorch_data.py --self-test
  run "$python" pytorch_data.py --cache "$work/videos" --kinds jpeg,ucf --outputs u8 --workers 1 --videos 1 --batch 1 --rounds 2 --seconds 0.1 \
    --json "$work/parts/04-data.json" --markdown "$work/data.md"
fi
run "$python" report.py "$work/parts" "$work/out"

run "$python" - "$work" "$data" <<'EOF'
import glob, json, sys

work, data = sys.argv[1:]
(path,) = glob.glob(f"{work}/out/pytorch_*.json")
with open(path) as f:
    parts = json.load(f)["parts"]
with open(path.replace(".json", ".md")) as f:
    text = f.read()
assert list(parts) == ["step", "ddp", "facts"] + ["data"] * (data == "yes"), list(parts)
for name, world, count in (("step", 1, 3), ("ddp", 2, 2)):
    part = parts[name]
    assert part["benchmark"] == "pytorch_step" and part["world_size"] == world and part["ddp"] == (name == "ddp"), part
    assert len(part["rows"]) == count, part
    for row in part["rows"]:
        assert row["samples"] == part["rounds"] * part["steps"] and row["peak_bytes"] > 1 << 20, row
        assert 0 < row["min_ms"] <= row["step_ms"] <= row["max_ms"], row
        assert abs(row["clips_per_s"] * row["step_ms"] / 1e3 - world * row["clips"]) < 1e-6, row
        assert f"{row['clips_per_s']:.2f}" in text
assert parts["step"]["left_out"] and "GPU" in parts["step"]["left_out"][0]["why"], parts["step"]["left_out"]
assert parts["step"]["machine"]["torch"] and parts["step"]["machine"]["cpu"]
assert parts["facts"]["parts"]["ceilings"]["matmul_bf16_tflops"] > 0, parts["facts"]
if data == "yes":
    rows = {(r["kind"], r["reader"]): r for r in parts["data"]["rows"]}
    assert ("jpeg", "cv2") in rows and ("ucf", "cv2") in rows, list(rows)
    for row in rows.values():
        assert row["clips_per_s"] > 0 and row["clips_per_core_s"] > 0 and row["samples"] == 2, row
        assert row["difference"] < 3, row  # grey levels: all readers give the same frames
EOF
echo "ok: peers, PyTorch $version, loaders: $data"
