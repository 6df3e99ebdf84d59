#!/usr/bin/env python3
"""Times a full TSM training step in PyTorch, in the ways PyTorch offers; see README.md beside this file.

Alone:        python3 pytorch_step.py --preset cpu --json out.json --markdown out.md
Under DDP:    torchrun --nproc-per-node 2 pytorch_step.py --preset cpu-ddp ...
Any axis of a preset can be replaced: --models resnet50 --sizes 112 --clips 2 --precisions fp32,bf16 ...
"""

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import time

try:
    import torch
    import torch.distributed as dist
except Exception as e:  # a torch without its CUDA libraries fails in several ways
    print(f"error: this Python cannot import torch: {e}", file=sys.stderr)
    sys.exit(69)

from tsm_model import TSM

AXES = ("models", "sizes", "clips", "engines", "precisions", "layouts", "shifts", "optimizers")
PRESETS = {
    # seconds on two cores: does every branch run?
    "smoke": dict(models="mobilenetv2", sizes="32", clips="1", engines="eager", precisions="fp32,bf16", layouts="nchw,nhwc",
                  shifts="cat,onepass", optimizers="foreach,fused", rounds=1, steps=1, warmup=1),
    "cpu": dict(models="resnet50,mobilenetv2", sizes="224,112", clips="1,2", engines="eager", precisions="fp32,bf16",
                layouts="nchw,nhwc", shifts="cat,onepass", optimizers="foreach,fused", rounds=3, steps=3, warmup=1),
    "cpu-ddp": dict(models="resnet50,mobilenetv2", sizes="224,112", clips="1,2", engines="eager", precisions="fp32,bf16",
                    layouts="nchw,nhwc", shifts="cat,onepass", optimizers="fused", rounds=3, steps=3, warmup=1),
    # ordered so that the rows that matter most come first and a time limit cuts the rest
    "gpu": dict(models="resnet50,mobilenetv2", sizes="224,112", clips="8,16,32,64", engines="eager,graph,compile",
                precisions="bf16,fp16,tf32", layouts="nhwc,nchw", shifts="onepass,cat", optimizers="fused,foreach",
                rounds=5, steps=10, warmup=5),
}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="cpu")
    for axis in AXES:
        p.add_argument(f"--{axis}", help="comma-separated; replaces the preset's")
    for number in ("rounds", "steps", "warmup"):
        p.add_argument(f"--{number}", type=int)
    p.add_argument("--segments", type=int, default=8)
    p.add_argument("--classes", type=int, default=174)
    p.add_argument("--threads", type=int, help="CPU threads of this process; default: torch's own")
    p.add_argument("--time-limit", type=float, default=0, help="seconds after which no further group of rows is started")
    p.add_argument("--json", help="file for the result")
    p.add_argument("--markdown", help="file for the table")
    a = p.parse_args()
    for key, value in PRESETS[a.preset].items():
        if getattr(a, key) is None:
            setattr(a, key, value)
    for axis in AXES:
        setattr(a, axis, [int(v) if axis in ("sizes", "clips") else v for v in getattr(a, axis).split(",")])
    return a


class Variant:
    """One way to run a step. `run(n)` takes n steps and returns the seconds of each."""

    def __init__(self, a, device, world, model, size, clips, engine, precision, layout, shift, optimizer):
        self.key = dict(model=model, size=size, clips=clips, engine=engine, precision=precision, layout=layout, shift=shift, optimizer=optimizer)
        self.device = device
        torch.manual_seed(0)
        self._flags()
        net = TSM(model, a.segments, a.classes, shift).to(device)
        memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        net = net.to(memory_format=memory_format).train()
        self.x = torch.randn(clips * a.segments, 3, size, size, device=device).to(memory_format=memory_format)
        self.y = torch.randint(a.classes, (clips,), device=device)
        if world > 1:
            ids = [device.index] if device.type == "cuda" else None
            net = torch.nn.parallel.DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)
        self.net = net
        flags = dict(fused=True) if optimizer == "fused" else dict(foreach=True)
        self.opt = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, **flags)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
        self.forward = torch.compile(net) if engine == "compile" else net
        self.graph = None
        if engine == "graph":
            self._capture()

    def _flags(self):
        """Process-wide switches, so set again before each turn of this row."""
        tf32 = self.key["precision"] == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32

    def _autocast(self):
        # Under a graph the weight-cast cache must not outlive the capture.
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=self.graph is None)

    def _step(self):
        self.opt.zero_grad(set_to_none=True)
        with self._autocast():
            loss = torch.nn.functional.cross_entropy(self.forward(self.x), self.y)
        if self.scaler is None:
            loss.backward()
            self.opt.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.opt)
            self.scaler.update()
        return loss

    def _capture(self):
        if self.scaler is not None:
            raise NotImplementedError("a graph of GradScaler.step needs a host read-back")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.opt.zero_grad(set_to_none=True)
        self.graph = graph
        with torch.cuda.graph(graph):
            self.loss = self._step()

    def one(self):
        if self.graph is not None:
            self.graph.replay()
            return self.loss
        return self._step()

    def run(self, n):
        self._flags()
        cuda = self.device.type == "cuda"
        seconds = []
        for _ in range(n):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            loss = self.one()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if not torch.isfinite(loss).item():
            raise RuntimeError(f"the loss is {loss.item()}")
        return seconds

    def launch_cost(self):
        """Kernels of a step and the host seconds until its last launch returned; GPU only."""
        if self.device.type != "cuda":
            return {}
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.one()
        launch = time.perf_counter() - start
        torch.cuda.synchronize()
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as p:
            self.one()
            torch.cuda.synchronize()
        kernels = sum(1 for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        return dict(kernels_per_step=kernels, launch_ms=launch * 1e3)


def peak_memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process so far, not of one row


def usable(device, engine, precision):
    """None, or why a combination does not exist on this device."""
    if device.type == "cpu" and engine == "graph":
        return "CUDA graphs need a GPU"
    if device.type == "cpu" and precision == "tf32":
        return "TF32 needs a GPU"
    if engine == "graph" and precision == "fp16":
        return "GradScaler.step reads back to the host, which a graph cannot"
    return None


def machine(device):
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu)
    m = dict(cpu=cpu, cores=len(os.sched_getaffinity(0)), torch=torch.__version__, python=platform.python_version(), threads=torch.get_num_threads())
    if device.type == "cuda":
        m.update(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), nccl=".".join(map(str, torch.cuda.nccl.version())))
    return m


def main():
    a = arguments()
    if a.threads:
        torch.set_num_threads(a.threads)
    local, world, rank = (int(os.environ.get(k, d)) for k, d in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = (lambda *t: print(*t, file=sys.stderr, flush=True)) if rank == 0 else (lambda *t: None)
    rows, left_out, began = [], [], time.monotonic()
    # Rows of a group are timed in turn, round by round, so that drift of the machine hits all alike.
    for model, size, clips in itertools.product(a.models, a.sizes, a.clips):
        group = f"{model} {size} px {clips} clips"
        over = torch.tensor(float(bool(a.time_limit) and time.monotonic() - began > a.time_limit))
        if world > 1:
            over = over.to(device)
            dist.broadcast(over, 0)  # all ranks must skip the same groups
        if over.item():
            left_out.append(dict(group=group, why=f"time limit of {a.time_limit:.0f} s"))
            continue
        variants = []
        for rest in itertools.product(a.engines, a.precisions, a.layouts, a.shifts, a.optimizers):
            why = usable(device, rest[0], rest[1])
            if why is None:
                try:
                    v = Variant(a, device, world, model, size, clips, *rest)
                    started = time.monotonic()
                    v.run(a.warmup)
                    v.key["warmup_s"] = round(time.monotonic() - started, 2)
                    variants.append((v, []))
                    continue
                except Exception as e:
                    if world > 1:
                        raise
                    why = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
            left_out.append(dict(group=group, variant=" ".join(rest), why=why))
            say(f"left out: {group} {' '.join(rest)}: {why}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(a.rounds):
            for v, seconds in variants:
                if world > 1:
                    dist.barrier()
                seconds += v.run(a.steps)
        for v, seconds in variants:
            median = statistics.median(seconds)
            row = dict(v.key, world_size=world, clips_per_s=world * clips / median, step_ms=median * 1e3, min_ms=min(seconds) * 1e3,
                       max_ms=max(seconds) * 1e3, sd_ms=statistics.pstdev(seconds) * 1e3, samples=len(seconds), peak_bytes=peak_memory(device))
            row.update(v.launch_cost())
            rows.append(row)
            say(f"{group} {row['engine']} {row['precision']} {row['layout']} {row['shift']} {row['optimizer']}: {row['clips_per_s']:.2f} clips/s ({row['step_ms']:.1f} ms)")
        del variants
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result = dict(benchmark="pytorch_step", date=datetime.date.today().isoformat(), segments=a.segments, world_size=world,
                  machine=machine(device), rounds=a.rounds, steps=a.steps, warmup=a.warmup, rows=rows, left_out=left_out)
    if rank == 0:
        text = json.dumps(result, indent=1)
        if a.json:
            with open(a.json, "w") as f:
                f.write(text + "\n")
        else:
            print(text)
        if a.markdown:
            with open(a.markdown, "w") as f:
                f.write(markdown(result))
    if world > 1:
        dist.destroy_process_group()


def markdown(r):
    m = r["machine"]
    out = [f"# PyTorch {m['torch']}: TSM training step", "",
           f"{r['date']}, {m.get('gpu', m['cpu'])}, {m['cores']} cores, {m['threads']} threads a process, world size {r['world_size']}, {r['segments']} frames a clip.",
           f"Median of {r['rounds']} x {r['steps']} steps in turn with the other rows of its group, after {r['warmup']} warm-up steps.", "",
           "| model | px | clips | engine | precision | layout | shift | SGD | clips/s | ms/step | min-max ms | peak GB | kernels | launch ms |",
           "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for x in r["rows"]:
        out.append(f"| {x['model']} | {x['size']} | {x['clips']} | {x['engine']} | {x['precision']} | {x['layout']} | {x['shift']} | {x['optimizer']} | "
                   f"{x['clips_per_s']:.2f} | {x['step_ms']:.1f} | {x['min_ms']:.1f}-{x['max_ms']:.1f} | {x['peak_bytes'] / 1e9:.2f} | "
                   f"{x.get('kernels_per_step', '-')} | {round(x['launch_ms'], 2) if 'launch_ms' in x else '-'} |")
    if r["left_out"]:
        out += ["", "Left out:", ""] + [f"- {x['group']} {x.get('variant', '')}: {x['why']}" for x in r["left_out"]]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
