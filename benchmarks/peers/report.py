#!/usr/bin/env python3
"""Joins the results of several runs into pytorch_<machine>_<date>.json and .md:  report.py PARTS_FOLDER OUT_FOLDER"""

import json
import os
import re
import sys

import machine


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def markdown(name, part):
    """The script's own table, one level down, with the name of the run."""
    kind = part["benchmark"]
    script = __import__({"pytorch_step": "pytorch_step", "pytorch_data": "pytorch_data", "gpu_facts": "gpu_facts"}[kind])
    body = script.markdown(part).splitlines()
    return "\n".join([f"## {name}: {body[0].removeprefix('# ')}", *body[1:]])


def main():
    if len(sys.argv) != 3:
        raise SystemExit("usage: report.py PARTS_FOLDER OUT_FOLDER")
    folder, out = sys.argv[1:]
    parts = {}
    for name in sorted(n for n in os.listdir(folder) if n.endswith(".json")):
        with open(os.path.join(folder, name)) as f:
            parts[name.removesuffix(".json").partition("-")[2]] = json.load(f)  # the number before the dash is the order
    if not parts:
        raise SystemExit(f"error: {folder} holds no result: every part failed, the log says why")
    machines = [p["machine"] for p in parts.values()]
    gpu = next((m["gpu"] for m in machines if "gpu" in m), None)
    title = gpu or f"{machines[0]['cpu']} {machines[0]['cores']} cores"
    date = max(p["date"] for p in parts.values())
    base = os.path.join(out, f"pytorch_{slug(title)}_{date}")
    machine.write_json(base + ".json", dict(title=title, date=date, parts=parts))
    with open(base + ".md", "w") as f:
        f.write(f"# PyTorch on {title}\n\nGenerated from the JSON beside it by `benchmarks/peers/report.py`.\n\n")
        f.write("\n".join(markdown(name, part) + "\n" for name, part in parts.items()))
    print(base + ".md", file=sys.stderr)


if __name__ == "__main__":
    main()
