#!/usr/bin/env bash
# The main job in small: TSM against the same network without the shift, on a set where only the
# order of the frames tells the classes apart. Two CPU ranks, real processes, real gradients.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=target/release
began=$(date +%s)

"$bin/tsm-data" demo --out data/demo

stamp=$(date -u +%Y%m%d-%H%M%S)
tsm=runs/demo-tsm-$stamp tsn=runs/demo-tsn-$stamp
echo
echo "== TSM: tsm-launch --cpus 2 configs/demo.yaml"
"$bin/tsm-launch" --cpus 2 --run-dir "$tsm" configs/demo.yaml
echo
echo "== the same network without the shift: tsm-launch --cpus 2 configs/demo.yaml model.shift.mode=none"
"$bin/tsm-launch" --cpus 2 --run-dir "$tsn" configs/demo.yaml model.shift.mode=none run.name=demo-tsn
echo
"$bin/tsm-trainer" compare "$tsm" "$tsn"
echo "total time: $(($(date +%s) - began)) s on $(nproc) cores"
