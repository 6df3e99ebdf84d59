#!/usr/bin/env python3
"""Makes one report of gpu-check.sh's parts:  gpu_report.py WORK_FOLDER OUT_FOLDER COMMIT_FILE

Writes OUT_FOLDER/gpu_<device>_<date>.json and .md, and prints the .md. `--self-test` checks the arithmetic.
"""

import csv
import datetime
import json
import os
import re
import sys

STATUS = {-1: "no time left", 0: "ok", 124: "ran out of time", 137: "ran out of time"}


def read(path, missing=""):
    try:
        with open(path, errors="replace") as f:
            return f.read()
    except OSError:
        return missing


def facts(log):
    """The first GPU's row of `nvidia-smi --format=csv`, and the other lines as they are."""
    lines = [l for l in log.splitlines() if l.strip()]
    if len(lines) > 1 and lines[0].startswith("name, "):
        return dict(zip((k.strip() for k in lines[0].split(",")), (v.strip() for v in lines[1].split(",")))), lines[2:]
    return {}, lines


def summary(name, log):
    """What a part's output says in a few words."""
    tests = re.findall(r"test result: \w+\. (\d+) passed; (\d+) failed", log)
    if tests:
        passed, failed = (sum(int(t[i]) for t in tests) for i in (0, 1))
        named = sorted(set(re.findall(r"^    (\S+)$", log, re.M))) if failed else []
        return f"{passed} passed, {failed} failed" + (": " + ", ".join(named) if named else "")
    best = re.findall(r"best top1 ([\d.]+)", log)
    if best:
        return f"best top1 {best[-1]}"
    row = re.search(r"busbw GB/s .*\n\D*?0 \| +(\d+) +\d+ +\d+ +[\d.]+ +\S+ +(\S+) +\d+ +(right|wrong on rank [\d, ]+\d) ", log)
    if row:
        ranks, bus, sums = row.groups()
        return f"{ranks} rank(s), bus bandwidth {bus} GB/s, sums {sums}"
    return ""


def last_error(log):
    lines = [l.strip() for l in log.splitlines() if l.strip()]
    errors = [l for l in lines if re.search(r"error|panicked|FAILED|assert", l)]
    return (errors or lines or [""])[-1][:200]


def parts_of(work):
    parts = []
    rows = csv.reader(read(os.path.join(work, "parts.tsv")).splitlines(), delimiter="\t")
    for name, seconds, limit, status in rows:
        log, status = read(os.path.join(work, "logs", name)), int(status)
        part = dict(name=name, seconds=int(seconds), limit_s=int(limit), status=status, outcome=STATUS.get(status, f"status {status}"), says=summary(name, log))
        if status > 0:
            part.update(error=last_error(log), tail=log[-2000:])
        parts.append(part)
    return parts


def steps_of(work):
    """The reports of `tsm-bench step`, by the name of their file."""
    folder = os.path.join(work, "bench")
    found = {}
    for name in sorted(os.listdir(folder)):
        try:
            found[name.removesuffix(".json")] = json.loads(read(os.path.join(folder, name)))
        except ValueError:
            pass  # the part was cut while it wrote; its status says so
    return dict(sorted(found.items(), key=lambda kv: (flag(kv[1], "precision"), int(flag(kv[1], "clips")), kv[0])))


def flag(report, name):
    flags = report["flags"]
    return flags[flags.index("--" + name) + 1]


def cell(text):
    return str(text).replace("|", "\\|")


def markdown(result):
    out = [f"# The GPU's tests and steps on {result['device']}", "",
           f"{result['date']}; tsm-launch {result['commit']}. Generated from the JSON beside it by `benchmarks/gpu_report.py`.", ""]
    out += [f"- {k}: {v}" for k, v in result["gpu"].items()] + [f"- {l}" for l in result["machine"]]
    out += ["", "| part | outcome | seconds | |", "|---|---|---|---|"]
    for p in result["parts"]:
        out.append(f"| {p['name']} | {p['outcome']} | {p['seconds']} | {cell(p.get('error') or p['says'])} |")
    if result["steps"]:
        out += ["", "A training step on synthetic input that lies on the device; `tsm-bench step`, medians.", "",
                "| network | px | clips | | form | clips/s | ms | min-max | peak GB | ours / this |", "|---|---|---|---|---|---|---|---|---|---|"]
        for report in result["steps"].values():
            for r in report["rows"]:
                s, peak = r["step_ms"], r["peak_bytes"]
                out.append(f"| {flag(report, 'arch')} | {flag(report, 'size')} | {flag(report, 'clips')} | {r['name']} | {r['form']} | {r['clips_per_s']:.1f} | "
                           f"{s['median']:.2f} | {s['min']:.2f}-{s['max']:.2f} | {peak / 1e9 if peak else float('nan'):.2f} | {r['ratio']:.2f} |")
    return "\n".join(out) + "\n"


def main():
    if sys.argv[1:] == ["--self-test"]:
        return self_test()
    if len(sys.argv) != 4:
        raise SystemExit("usage: gpu_report.py WORK_FOLDER OUT_FOLDER COMMIT_FILE")
    work, out, commit = sys.argv[1:]
    gpu, machine = facts(read(os.path.join(work, "logs", "facts")))
    device = gpu.get("name", "dry run" if os.environ.get("TSM_GPU_CHECK_CPU") == "1" else "unknown device")
    result = dict(benchmark="gpu_check", date=datetime.date.today().isoformat(), device=device, commit=read(commit, "unknown").strip(),
                  gpu=gpu, machine=machine, parts=parts_of(work), steps=steps_of(work))
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    base = os.path.join(out, f"gpu_{slug}_{result['date']}")
    text = markdown(result)
    for name, content in ((base + ".json", json.dumps(result, indent=1) + "\n"), (base + ".md", text)):
        with open(name + ".part", "w") as f:
            f.write(content)
        os.replace(name + ".part", name)
    print(text, end="")


def self_test():
    gpu, rest = facts("name, driver_version\nNVIDIA H200, 580.1\nLinux\n16\n")
    assert gpu == {"name": "NVIDIA H200", "driver_version": "580.1"} and rest == ["Linux", "16"], (gpu, rest)
    assert facts("bash: nvidia-smi: not found\n") == ({}, ["bash: nvidia-smi: not found"])
    failed = "failures:\n    a::b\n\ntest result: FAILED. 2 passed; 1 failed; 0 ignored"
    assert summary("x", failed) == "2 passed, 1 failed: a::b"
    assert summary("x", "best top1 50.00; report in r\n") == "best top1 50.00"
    table = "0 |  ranks  bytes  busbw GB/s  sums device\n0 |      2   64       3      9.062        7.40        8.40             0  right   cpu\n"
    assert summary("x", table) == "2 rank(s), bus bandwidth 8.40 GB/s, sums right", summary("x", table)
    assert last_error("one\nerror: two\nthree") == "error: two"
    report = dict(flags=["--arch", "resnet50", "--size", "224", "--clips", "8"],
                  rows=[dict(name="a", form="f", clips_per_s=2.0, ratio=1.0, peak_bytes=None, step_ms=dict(median=1, min=1, max=1))])
    result = dict(device="d", date="x", commit="c", gpu=gpu, machine=rest, parts=[], steps={"s": report})
    assert flag(report, "size") == "224"
    assert "| resnet50 | 224 | 8 | a | f | 2.0 |" in markdown(result)
    print("ok")


if __name__ == "__main__":
    main()
