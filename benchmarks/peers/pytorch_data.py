#!/usr/bin/env python3
"""Clips per second from video files and JPEG folders, by the loaders PyTorch users have; see README.md beside this file.

python3 pytorch_data.py --cache FOLDER --json out.json --markdown out.md
The first run makes the files in FOLDER with ffmpeg (about 60 MB); a reader that is not installed is named and left out.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time

try:
    import torch
except Exception as e:  # a torch without its CUDA libraries fails in several ways
    print(f"error: this Python cannot import torch: {e}", file=sys.stderr)
    sys.exit(69)

import machine
import media

READERS = ("cv2", "decord", "torchcodec", "torchcodec-approximate", "dali")
PACKAGES = ("opencv-python-headless", "opencv-python", "decord", "torchcodec", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "numpy")


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cache", help="folder for the generated files; required but for --self-test")
    p.add_argument("--kinds", default=",".join(media.KINDS), help=f"of {', '.join(media.KINDS)}")
    p.add_argument("--readers", default=",".join(READERS), help=f"of {', '.join(READERS)}")
    p.add_argument("--outputs", default="u8,float", help="u8 as it should be; float normalises on the CPU, measured for JPEG only")
    p.add_argument("--workers", default="1,all", help="worker processes (threads for DALI); all is every core, at most 16")
    p.add_argument("--videos", type=int, default=16)
    p.add_argument("--batch", type=int, default=8, help="clips")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=3, help="of each row in each round, after warm-up")
    p.add_argument("--time-limit", type=float, default=0, help="seconds after which no further round is started")
    p.add_argument("--json")
    p.add_argument("--markdown")
    p.add_argument("--self-test", action="store_true", help="check the sampling; time nothing")
    a = p.parse_args(argv)
    if not a.cache and not a.self_test:
        p.error("--cache names no folder: the videos have to be kept somewhere")
    cores = min(len(os.sched_getaffinity(0)), 16)
    try:
        a.kinds = chosen("--kinds", a.kinds, media.KINDS)
        a.readers = chosen("--readers", a.readers, READERS)
        a.outputs = chosen("--outputs", a.outputs, ("u8", "float"))
        a.workers = sorted({cores if w == "all" else int(w) for w in a.workers.split(",")})
        if min(a.workers + [a.videos, a.batch, a.rounds]) < 1 or a.seconds <= 0:
            raise ValueError("--workers, --videos, --batch, --rounds and --seconds must be above zero")
    except ValueError as e:
        p.error(str(e))
    return a


def chosen(option, text, known):
    for v in text.split(","):
        if v not in known:
            raise ValueError(f"{option}: {v!r} is not one of {', '.join(known)}")
    return text.split(",")


class Row:
    def __init__(self, a, kind, reader, output, workers, paths):
        import readers

        self.key = dict(kind=kind, reader=reader, output=output, workers=workers)
        self.batch, self.rates, self.cpu = a.batch, [], []
        args = (paths, media.KINDS[kind])
        if reader == "dali":
            self.start = lambda: readers.dali(*args, kind == "jpeg", output == "float", a.batch, workers)
        else:
            self.start = lambda: readers.loader(*args, reader, kind == "jpeg", output == "float", a.batch, workers)

    def first(self):
        """The first batch, as proof that the reader reads this kind of file."""
        it = self.start()
        batch = next(it).clone()
        stop(it)
        return batch

    def measure(self, seconds):
        it = self.start()
        for _ in range(self.key["workers"] + 1):  # every worker has begun, the queue is drained from here on
            next(it)
        workers = [p.pid for p in multiprocessing.active_children()]
        clips, cpu, began = 0, cpu_seconds(workers), time.perf_counter()
        while True:
            next(it)
            clips += self.batch
            took = time.perf_counter() - began
            if took >= seconds:
                break
        self.rates.append(clips / took)
        self.cpu.append((cpu_seconds(workers) - cpu) / clips)
        stop(it)

    def result(self):
        median = statistics.median(self.rates)
        return dict(self.key, clips_per_s=median, clips_per_s_per_worker=median / self.key["workers"], min_clips_per_s=min(self.rates),
                    max_clips_per_s=max(self.rates), clips_per_core_s=1 / statistics.median(self.cpu), samples=len(self.rates))


def stop(it):
    """Ends the workers or threads before the next row starts its own."""
    if hasattr(it, "_shutdown_workers"):
        it._shutdown_workers()
    else:
        it.close()
    gc.collect()


def cpu_seconds(pids):
    """CPU time so far of this process with its threads and of the given workers."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def plan(a):
    """(kind, reader, output, workers) of every row."""
    for kind in a.kinds:
        for reader in a.readers:
            if kind == "jpeg" and reader not in ("cv2", "dali"):
                continue
            for output in a.outputs:
                if output == "u8" or kind == "jpeg":
                    for workers in a.workers:
                        yield kind, reader, output, workers


def prepare(a, left_out):
    """The rows that can be measured, each with its difference from the first reader of its kind in grey levels."""
    from readers import why_missing

    missing, broken, paths, reference, rows = {}, {}, {}, {}, []
    for kind, reader, output, workers in plan(a):
        if reader not in missing:
            missing[reader] = why_missing(reader)
            if missing[reader]:
                left_out.append(dict(reader=reader, why=missing[reader]))
        if missing[reader] or (kind, reader) in broken:
            continue
        try:
            if kind not in paths:
                paths[kind] = media.make(a.cache, kind, a.videos)
            row = Row(a, kind, reader, output, workers, paths[kind])
            if workers == min(a.workers):
                batch = row.first()
                want = reference.setdefault((kind, output), batch)
                difference = (batch.float() - want.float()).abs().mean().item()
            row.key["difference"] = difference
            rows.append(row)
        except Exception as e:
            broken[kind, reader] = reason(e)
            left_out.append(dict(kind=kind, reader=reader, why=broken[kind, reader]))
            print(f"left out: {kind} {reader}: {broken[kind, reader]}", file=sys.stderr, flush=True)
    sizes = {kind: media.mean_bytes(p) for kind, p in paths.items()}
    return rows, sizes


def reason(error):
    """The line of an error that says most: DALI and the DataLoader wrap the cause in many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    telling = [x for x in lines if "not supported" in x] or [x for x in lines if "Error:" in x or x.startswith("Error")] or lines
    return f"{type(error).__name__}: {telling[-1].rpartition('] ')[2][:200]}"


def markdown(r):
    m = r["machine"]
    out = ["# PyTorch: clips per second from files", "", f"{r['date']}, {machine.headline(m)}.",
           "Readers: " + (", ".join(f"{k} {m[k]}" for k in PACKAGES if k in m) or "none") + ".",
           f"8 frames a clip to 224 x 224, batches of {r['batch']}, {r['seconds']} s a row and round, median of {r['rounds']} rounds in turn. The load was {m['load_1m']} at the start.", "",
           "Files: " + "; ".join(f"{k} ({media.KINDS[k]['like']}) {v / 1e3:.0f} KB a {'frame' if k == 'jpeg' else 'video'}" for k, v in r["mean_bytes"].items()) + ".", "",
           "| files | reader | output | workers | clips/s | min-max | per worker | per core-second | difference |", "|---|---|---|---|---|---|---|---|---|"]
    for x in r["rows"]:
        out.append(f"| {x['kind']} | {x['reader']} | {x['output']} | {x['workers']} | {x['clips_per_s']:.1f} | {x['min_clips_per_s']:.1f}-{x['max_clips_per_s']:.1f} | "
                   f"{x['clips_per_s_per_worker']:.1f} | {x['clips_per_core_s']:.1f} | {x['difference']:.2f} |")
    out += ["", "Per core-second: clips for each second of CPU time of the workers and the process that collects; other load touches it less than the rate.",
            "Difference: mean absolute difference from the first reader of the same files and output."]
    if r["left_out"]:
        out += ["", "Left out:", ""] + [f"- {x.get('kind', '')} {x['reader']}: {x['why']}".replace("-  ", "- ") for x in r["left_out"]]
    return "\n".join(out) + "\n"


def main():
    a = arguments()
    if a.self_test:
        import self_test

        return self_test.data()
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise SystemExit("error: the loaders hand over numpy arrays and numpy is not installed: pip install numpy opencv-python-headless") from None
    torch.set_num_threads(1)
    began, left_out = time.monotonic(), []
    rows, sizes = prepare(a, left_out)
    if not rows:
        raise SystemExit("error: nothing to measure: " + "; ".join(f"{x['reader']}: {x['why']}" for x in left_out))
    versions = machine.describe(torch, torch.device("cpu"), PACKAGES)
    rounds = 0
    for _ in range(a.rounds):
        if rounds and a.time_limit and (time.monotonic() - began) * (rounds + 1) / rounds > a.time_limit:
            break
        for row in rows:
            row.measure(a.seconds)
        rounds += 1
        result = dict(benchmark="pytorch_data", date=machine.today(), machine=versions, batch=a.batch, rounds=rounds, seconds=a.seconds, videos=a.videos,
                      mean_bytes=sizes, rows=[r.result() for r in rows], left_out=left_out)
        if a.json:
            machine.write_json(a.json, result)
    if not a.json:
        print(json.dumps(result, indent=1))
    if a.markdown:
        with open(a.markdown, "w") as f:
            f.write(markdown(result))
    for x in result["rows"]:
        print(f"{x['kind']} {x['reader']} {x['output']} {x['workers']} workers: {x['clips_per_s']:.1f} clips/s, {x['clips_per_core_s']:.1f} per core-second", file=sys.stderr)


if __name__ == "__main__":
    main()
