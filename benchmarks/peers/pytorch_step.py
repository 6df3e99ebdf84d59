#!/usr/bin/env python3
"""Times a full TSM training step in PyTorch, in the ways PyTorch offers; see README.md beside this file.

Alone:        python3 pytorch_step.py --preset cpu --json out.json --markdown out.md
Under DDP:    torchrun --nproc-per-node 2 pytorch_step.py --preset cpu --json out.json
Any axis of a preset can be replaced: --models resnet50 --sizes 112 --clips 2 --precisions fp32,bf16 ...
or the product of the last five by a list:  --variants eager/bf16/nhwc/onepass/fused,eager/fp32/nchw/cat/foreach
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time

try:
    import torch
    import torch.distributed as dist
except Exception as e:  # a torch without its CUDA libraries fails in several ways
    print(f"error: this Python cannot import torch: {e}", file=sys.stderr)
    sys.exit(69)

import machine
from step_variant import ENGINES, LAYOUTS, OPTIMIZERS, PRECISIONS, SHIFTS, Variant, unusable

MODELS = ("resnet50", "mobilenetv2")
GROUP = dict(models=MODELS, sizes=None, clips=None)
AXES = dict(engines=ENGINES, precisions=PRECISIONS, layouts=LAYOUTS, shifts=SHIFTS, optimizers=OPTIMIZERS)
# What an MMAction2 user runs, then the best forms; the order is the order of importance.
CPU_VARIANTS = "eager/fp32/nchw/cat/foreach,eager/fp32/nhwc/onepass/fused,eager/bf16/nchw/cat/foreach,eager/bf16/nhwc/onepass/fused"
SMOKE_VARIANTS = "eager/fp32/nchw/cat/foreach,eager/bf16/nhwc/onepass/fused,eager/fp16/nhwc/cat/fused,graph/bf16/nhwc/onepass/fused"
GPU_VARIANTS = ("eager/tf32/nchw/cat/foreach,eager/bf16/nhwc/onepass/fused,graph/bf16/nhwc/onepass/fused,eager/fp16/nhwc/onepass/fused,"
                "eager/fp16/nchw/cat/foreach,eager/bf16/nhwc/cat/fused,eager/bf16/nchw/onepass/fused,eager/tf32/nhwc/onepass/fused,graph/tf32/nhwc/onepass/fused")
GPU_COMPILED = "compile/bf16/nhwc/onepass/fused,compile-graph/bf16/nhwc/onepass/fused,compile/fp16/nhwc/onepass/fused,compile/bf16/nchw/cat/foreach"
EVERYTHING = dict(engines="eager,compile", precisions="fp32,bf16", layouts="nchw,nhwc", shifts="cat,onepass", optimizers="foreach,fused")
PRESETS = {
    # seconds on two cores: does every branch run?
    "smoke": dict(models="mobilenetv2", sizes="32", clips="1", variants=SMOKE_VARIANTS, rounds=2, steps=1, warmup=1),
    "cpu": dict(models="resnet50,mobilenetv2", sizes="224,112", clips="1,2", variants=CPU_VARIANTS, rounds=5, steps=3, warmup=1),
    # every way there is: an hour and more on two cores
    "cpu-all": dict(EVERYTHING, models="resnet50,mobilenetv2", sizes="224,112", clips="1,2", rounds=4, steps=2, warmup=1),
    "gpu": dict(models="resnet50,mobilenetv2", sizes="224,112", clips="8,32,16,64", variants=GPU_VARIANTS, rounds=5, steps=8, warmup=4),
    "gpu-compile": dict(models="resnet50", sizes="224", clips="8,32", variants=GPU_COMPILED, rounds=5, steps=8, warmup=4),
    "gpu-all": dict(EVERYTHING, models="resnet50,mobilenetv2", sizes="224,112", clips="8,16,32,64", engines=",".join(ENGINES),
                    precisions="bf16,fp16,tf32,fp32", rounds=5, steps=8, warmup=4),
}


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="cpu")
    for axis, known in {**GROUP, **AXES}.items():
        p.add_argument(f"--{axis}", help="comma-separated" + (f", of {', '.join(known)}" if known else "") + "; replaces the preset's")
    p.add_argument("--variants", help="comma-separated engine/precision/layout/shift/optimizer; replaces the product of these axes")
    for number in ("rounds", "steps", "warmup"):
        p.add_argument(f"--{number}", type=int)
    p.add_argument("--segments", type=int, default=8)
    p.add_argument("--classes", type=int, default=174)
    p.add_argument("--threads", type=int, help="CPU threads of this process; default: torch's own")
    p.add_argument("--time-limit", type=float, default=0, help="seconds after which no further row is started")
    p.add_argument("--no-kernels", action="store_true", help="do not count a step's kernels with the profiler (GPU)")
    p.add_argument("--json", help="file for the result, rewritten after each group of rows")
    p.add_argument("--markdown", help="file for the table")
    p.add_argument("--self-test", action="store_true", help="check the model, the shifts and this script's arithmetic; time nothing")
    a = p.parse_args(argv)
    preset = PRESETS[a.preset]
    picked_axes = any(getattr(a, axis) for axis in AXES)
    if a.variants and picked_axes:
        p.error(f"--variants replaces --{', --'.join(AXES)}: give the one or the others")
    for key, value in preset.items():
        if getattr(a, key) is None and not (key == "variants" and picked_axes):
            setattr(a, key, value)
    try:
        a.models = words("--models", a.models, MODELS)
        a.sizes = [whole("--sizes", v, least=32) for v in a.sizes.split(",")]
        a.clips = [whole("--clips", v) for v in a.clips.split(",")]
        for option in ("rounds", "steps", "segments", "classes"):
            whole(f"--{option}", getattr(a, option))
        whole("--warmup", a.warmup, least=0)
        if a.threads is not None:
            whole("--threads", a.threads)
        if a.variants:
            a.variants = [variant(v) for v in a.variants.split(",")]
        else:
            everything = {axis: ",".join(known[:1]) for axis, known in AXES.items()}
            a.variants = list(itertools.product(*(words(f"--{axis}", getattr(a, axis) or everything[axis], known) for axis, known in AXES.items())))
    except ValueError as e:
        p.error(str(e))
    return a


def words(option, text, known):
    values = text.split(",")
    for v in values:
        if v not in known:
            raise ValueError(f"{option}: {v!r} is not one of {', '.join(known)}")
    return values


def whole(option, value, least=1):
    try:
        n = int(value)
    except ValueError:
        raise ValueError(f"{option}: {value!r} is not a whole number") from None
    if n < least:
        raise ValueError(f"{option}: {n} is below {least}")
    return n


def variant(text):
    parts = tuple(text.split("/"))
    if len(parts) != len(AXES):
        raise ValueError(f"--variants: {text!r} has {len(parts)} parts, not engine/precision/layout/shift/optimizer")
    for part, (axis, known) in zip(parts, AXES.items()):
        words(f"--variants {text!r}, {axis}", part, known)
    return parts


class World:
    """The ranks of torchrun, or one process alone; `agree` goes over gloo, apart from what is timed."""

    def __init__(self):
        self.rank, self.size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise SystemExit(f"error: local rank {local} has no GPU: {torch.cuda.device_count()} are visible; start that many processes")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        self.ddp = "WORLD_SIZE" in os.environ  # torchrun with one rank shows what DDP's machinery costs
        self.control = None
        if self.ddp:
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # its watchdog would break the capture of a graph
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.control = dist.new_group(backend="gloo")

    def any(self, flag):
        """Whether the flag is set on any rank, the same answer on all."""
        if self.control is None:
            return flag
        t = torch.tensor(int(flag))
        dist.all_reduce(t, dist.ReduceOp.MAX, group=self.control)
        return bool(t.item())

    def barrier(self):
        if self.control is not None:
            dist.barrier(group=self.control)

    def say(self, text):
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)


class Run:
    def __init__(self, a):
        self.a, self.world = a, World()
        self.began = time.monotonic()
        self.rows, self.left_out = [], []
        self.machine = machine.describe(torch, self.world.device, ("triton",))

    def late(self):
        return self.world.any(bool(self.a.time_limit) and time.monotonic() - self.began > self.a.time_limit)

    def leave_out(self, group, rest, why):
        self.left_out.append(dict(group=group, variant="/".join(rest), why=why))
        self.world.say(f"left out: {group} {'/'.join(rest)}: {why}")

    def build(self, model, size, clips, rest):
        """A warm row, or why there is none; all ranks give the same answer."""
        why, v = unusable(self.world.device.type, rest[0], rest[1], rest[4]), None
        if why is None and self.late():
            why = f"time limit of {self.a.time_limit:.0f} s"
        if why is not None:
            return None, why
        try:
            v = Variant(self.world.device, self.world.ddp, self.a.segments, self.a.classes, model, size, clips, *rest)
            v.prepare(self.a.warmup)
        except Exception as e:
            why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
        if self.world.any(why is not None):
            return None, why or "another rank could not"
        return v, None

    def group(self, model, size, clips):
        """Times the rows of one model, size and batch in turn, round by round, so that drift of the machine hits all alike."""
        name = f"{model} {size} px {clips} clips"
        if self.world.device.type == "cuda":
            Variant.graph_pool = None
        variants = []
        for rest in self.a.variants:
            v, why = self.build(model, size, clips, rest)
            if v is None:
                self.leave_out(name, rest, why)
                gc.collect()
            else:
                variants.append((v, []))
        for _ in range(self.a.rounds):
            for v, seconds in list(variants):
                self.world.barrier()
                try:
                    seconds += v.run(self.a.steps)
                except RuntimeError as e:
                    if self.world.ddp:
                        raise  # the other ranks may be inside a collective
                    variants.remove((v, seconds))
                    self.leave_out(name, variant_of(v.key), f"in a later round: {str(e).splitlines()[0][:200]}")
        for v, seconds in variants:
            row = dict(v.key, world_size=self.world.size, ddp=self.world.ddp, **summary(seconds, self.world.size * clips))
            if self.world.device.type == "cuda":
                row.update(launch_ms=v.launch_seconds() * 1e3, peak_of="row")
            else:
                row.update(peak_bytes=process_peak(), peak_of="process so far")
            self.rows.append(row)
            self.world.say(f"{name} {variant_name(row)}: {row['clips_per_s']:.2f} clips/s ({row['step_ms']:.1f} ms)")

    def count_kernels(self):
        """Once per row of the smallest batch, after all timing: the profiler's hooks stay in the process and cost time."""
        counts = {}
        for row in sorted(self.rows, key=lambda r: r["clips"]):
            key = (row["model"], row["size"], *variant_of(row))
            if key not in counts:
                v, why = self.build(row["model"], row["size"], row["clips"], variant_of(row))
                counts[key] = (None, why)
                try:
                    if v is not None:
                        counts[key] = (v.count_kernels(), None)
                except Exception as e:  # CUPTI is forbidden on some hosts
                    counts[key] = (None, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}")
                v = None
                clean_up(self.world.device)
            found, why = counts[key]
            if found is not None:
                row["kernels_per_step"], row["copies_per_step"] = found
            else:
                row["kernels_why_not"] = why

    def result(self):
        a = self.a
        return dict(benchmark="pytorch_step", date=machine.today(), preset=a.preset, segments=a.segments, world_size=self.world.size, ddp=self.world.ddp,
                    machine=self.machine, rounds=a.rounds, steps=a.steps, warmup=a.warmup, rows=self.rows, left_out=self.left_out)

    def write(self):
        if self.world.rank == 0 and self.a.json:
            machine.write_json(self.a.json, self.result())


def clean_up(device):
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def process_peak():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary(seconds, clips):
    """Median and spread of the seconds of each step."""
    median = statistics.median(seconds)
    return dict(clips_per_s=clips / median, step_ms=median * 1e3, mean_ms=statistics.fmean(seconds) * 1e3, sd_ms=statistics.pstdev(seconds) * 1e3,
                min_ms=min(seconds) * 1e3, max_ms=max(seconds) * 1e3, samples=len(seconds))


def variant_of(row):
    return tuple(row[k] for k in ("engine", "precision", "layout", "shift", "optimizer"))


def variant_name(row):
    return "/".join(variant_of(row))


def markdown(r):
    m = r["machine"]
    out = ["# PyTorch: TSM training step", "", f"{r['date']}, {machine.headline(m)}.",
           f"{'DDP, world size ' + str(r['world_size']) if r['ddp'] else 'One process without DDP'}, threads per process {m['threads']}, {r['segments']} frames a clip, clips per rank.",
           f"Median of {r['rounds']} x {r['steps']} steps, each row in turn with the others of its group. The load of the machine was {m['load_1m']} at the start.", "",
           "| model | px | clips | engine | precision | layout | shift | SGD | clips/s | ms/step | sd | min-max ms | peak GB | kernels | launch ms | warm-up s |",
           "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for x in r["rows"]:
        launch = f"{x['launch_ms']:.2f}" if "launch_ms" in x else "-"
        out.append(f"| {x['model']} | {x['size']} | {x['clips']} | {x['engine']} | {x['precision']} | {x['layout']} | {x['shift']} | {x['optimizer']} | "
                   f"{x['clips_per_s']:.2f} | {x['step_ms']:.1f} | {x['sd_ms']:.1f} | {x['min_ms']:.1f}-{x['max_ms']:.1f} | {x['peak_bytes'] / 1e9:.2f} | "
                   f"{x.get('kernels_per_step', '-')} | {launch} | {x['warmup_s']:.0f} |")
    if r["rows"] and r["rows"][0]["peak_of"] != "row":
        out += ["", "Peak memory is that of the whole process up to the row: only a group's first rows can show a row's own."]
    if r["left_out"]:
        out += ["", "Left out:", ""] + [f"- {x['group']} {x['variant']}: {x['why']}" for x in r["left_out"]]
    return "\n".join(out) + "\n"


def main():
    a = arguments()
    if a.self_test:
        import self_test

        return self_test.step()
    if a.threads:
        torch.set_num_threads(a.threads)
    run = Run(a)
    for model, size, clips in itertools.product(a.models, a.sizes, a.clips):
        run.group(model, size, clips)
        clean_up(run.world.device)
        run.write()
    if run.world.device.type == "cuda" and not a.no_kernels:
        run.count_kernels()
        run.write()
    if run.world.rank == 0:
        if not a.json:
            print(json.dumps(run.result(), indent=1))
        if a.markdown:
            with open(a.markdown, "w") as f:
                f.write(markdown(run.result()))
    if run.world.ddp:
        dist.destroy_process_group()
    if not run.rows:
        raise SystemExit("error: no row could be run; the reasons are above")


if __name__ == "__main__":
    main()
