#!/usr/bin/env bash
# Builds and collects, stripped, what gpu-check.sh runs where there is a GPU and no compiler:
# the programs and the tests that need a device, in benchmarks/gpu-bin/.
set -euo pipefail
cd "$(dirname "$0")/.."
out=benchmarks/gpu-bin
limit_mib=60
mkdir -p "$out"
built=$(mktemp)
trap 'rm -f "$built"' EXIT
cargo=${CARGO:-cargo}

"$cargo" build --release --message-format=json -p tsm-launch -p tsm-trainer -p tsm-data -p tsm-bench >"$built"
"$cargo" test --release --no-run --message-format=json -p tsm-torch-ext --lib >>"$built"
"$cargo" test --release --no-run --message-format=json -p tsm-trainer --lib --test gpu >>"$built"

# Cargo's lines name every executable: "name<tab>path".
executables() {
  python3 - "$built" <<'PY'
import json
import sys

PROGRAMS = {"tsm-launch", "tsm-trainer", "tsm-data", "tsm-bench"}
TESTS = {("lib", "tsm_torch_ext"): "test-torch-ext", ("lib", "tsm_trainer"): "test-trainer", ("test", "gpu"): "test-gpu"}
found = {}
with open(sys.argv[1]) as lines:
    for line in lines:
        artifact = json.loads(line)
        path = artifact.get("executable")
        if artifact.get("reason") != "compiler-artifact" or not path:
            continue
        kind, name = artifact["target"]["kind"][0], artifact["target"]["name"]
        if not artifact["profile"]["test"] and name in PROGRAMS:
            found[name] = path
        elif artifact["profile"]["test"] and (kind, name) in TESTS:
            found[TESTS[kind, name]] = path
missing = (PROGRAMS | set(TESTS.values())) - set(found)
if missing:
    sys.exit(f"error: cargo built no {', '.join(sorted(missing))}")
for name, path in sorted(found.items()):
    print(name, path, sep="\t")
PY
}
list=$(executables)
rm -f "$out"/*
while IFS=$'\t' read -r name path; do
  strip --strip-all -o "$out/$name" "$path"
done <<<"$list"
{
  git rev-parse --short HEAD 2>/dev/null || echo unknown
  git diff --quiet HEAD 2>/dev/null || echo "with changes that are not committed"
} | paste -sd ' ' >"$out/commit"

du -h --apparent-size "$out"/* "$out"
mib=$(($(du -sb "$out" | cut -f1) >> 20))
if [ "$mib" -ge "$limit_mib" ]; then
  echo "error: $out holds $mib MiB, and $limit_mib MiB are the limit" >&2
  exit 1
fi
