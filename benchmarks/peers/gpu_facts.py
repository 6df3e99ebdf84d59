#!/usr/bin/env python3
"""What a GPU can do at best, and which roads exist on it: the ceilings beside which a step's speed is read.

python3 gpu_facts.py --json facts.json [--parts ceilings,transfer,nccl]
Every part runs in a process of its own under its own time limit; one that fails is recorded with its reason.
"""

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import machine

PARTS = {"device": 30, "ceilings": 60, "transfer": 60, "launch": 60, "nvcuvid": 30, "nccl": 90, "cudnn": 90}  # seconds each


class NotMeasured(Exception):
    """A part that this machine cannot answer; the message says what it lacks."""


def seconds_of(torch, device, work, repeat, rounds=5):
    """Median seconds of one `work()`, `repeat` of them between two clock reads."""
    cuda = device.type == "cuda"
    for _ in range(3 if cuda else 1):
        work()
    times = []
    for _ in range(rounds):
        if cuda:
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            a.record()
        else:
            start = time.perf_counter()
        for _ in range(repeat):
            work()
        if cuda:
            b.record()
            torch.cuda.synchronize()
            times.append(a.elapsed_time(b) / 1e3 / repeat)
        else:
            times.append((time.perf_counter() - start) / repeat)
    return statistics.median(times)


def part_device(torch, device):
    out = machine.describe(torch, device, ("nvidia-cudnn-frontend", "triton"))
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        out.update(multiprocessors=p.multi_processor_count, memory_bytes=p.total_memory, capability=f"{p.major}.{p.minor}", l2_bytes=getattr(p, "L2_cache_size", None))
        query = "clocks.max.sm,clocks.max.mem,power.limit,compute_mode,mig.mode.current"
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
        out["nvidia_smi"] = dict(zip(query.split(","), done.stdout.strip().split(", ")))
    return out


def part_ceilings(torch, device):
    """Matrix rate of square products of random numbers (zeros would draw less power and run faster) and copy bandwidth."""
    cuda = device.type == "cuda"
    n, repeat = (8192, 10) if cuda else (256, 2)
    out = dict(matmul_n=n)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        c = torch.empty_like(a)
        s = seconds_of(torch, device, lambda: torch.matmul(a, b, out=c), repeat)
        out[f"matmul_{name}_tflops"] = 2 * n**3 / s / 1e12
        del a, b, c
    size = 4 << 30 if cuda else 16 << 20
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    s = seconds_of(torch, device, lambda: a.copy_(b), repeat)
    out.update(copy_bytes=size, copy_read_plus_write_gb_per_s=2 * size / s / 1e9)
    return out


def part_transfer(torch, device):
    """Host and device, pinned and pageable, in the size of a batch of u8 clips and in a large block."""
    need_gpu(device)
    out = {}
    for label, size in (("32_clips", 32 * 8 * 3 * 224 * 224), ("1_gib", 1 << 30)):
        on_device = torch.empty(size, dtype=torch.uint8, device=device)
        for kind, pin in (("pinned", True), ("pageable", False)):
            on_host = torch.zeros(size, dtype=torch.uint8, pin_memory=pin)
            up = seconds_of(torch, device, lambda: on_device.copy_(on_host, non_blocking=True), 4)
            down = seconds_of(torch, device, lambda: on_host.copy_(on_device, non_blocking=True), 4)
            out[f"{kind}_{label}"] = dict(bytes=size, to_device_gb_per_s=size / up / 1e9, to_host_gb_per_s=size / down / 1e9)
    return out


def part_launch(torch, device):
    """What one small kernel costs: launched one by one from Python, and from a CUDA graph."""
    need_gpu(device)
    x, n = torch.zeros(1024, device=device), 1000

    def many():
        for _ in range(n):
            x.add_(1)

    eager = seconds_of(torch, device, many, 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    return dict(eager_us=eager / n * 1e6, graph_us=seconds_of(torch, device, graph.replay, 1) / n * 1e6)


def part_nvcuvid(torch, device):
    """Whether the driver brings the video decoder's library; loading needs no context."""
    out = {}
    for library, symbol in (("libnvcuvid.so.1", "cuvidCreateDecoder"), ("libnvidia-encode.so.1", "NvEncodeAPICreateInstance"), ("libcuda.so.1", "cuInit")):
        try:
            out[library] = "present" if hasattr(ctypes.CDLL(library), symbol) else f"present, without {symbol}"
        except OSError as e:
            out[library] = f"absent: {e}"
    return out


def part_nccl(torch, device):
    """Two ranks on one card: NCCL refuses two of one host, and NCCL_HOSTID makes it see two. Correctness only; the speed means nothing."""
    gpu = device.type == "cuda"
    out = dict(with_hostid=two_ranks(gpu, True))
    if gpu:
        out["without_hostid"] = two_ranks(gpu, False)
    return out


def two_ranks(gpu, hostid):
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(2):
            env = dict(os.environ, NCCL_MNNVL_ENABLE="0", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1", NCCL_MAX_CTAS="4", GLOO_SOCKET_IFNAME="lo", NCCL_DEBUG="WARN")
            if hostid:
                env["NCCL_HOSTID"] = f"rank{rank}"
            command = [sys.executable, os.path.abspath(__file__), "--device", "cuda" if gpu else "cpu", "--rank", str(rank), "--store", os.path.join(folder, "store")]
            ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        results, end = [], time.monotonic() + 35
        for process in ranks:
            try:
                stdout, stderr = process.communicate(timeout=max(end - time.monotonic(), 1))
                results.append(last_json(stdout) if process.returncode == 0 else dict(failed=process.returncode, last_lines=tail(stderr + stdout)))
            except subprocess.TimeoutExpired:
                process.kill()
                stdout, stderr = process.communicate()
                results.append(dict(failed="no end within 35 s", last_lines=tail(stderr + stdout)))
    return dict(works=all("failed" not in r for r in results), ranks=results)


def one_rank(torch, device, rank, store):
    import datetime

    import torch.distributed as dist

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30))
    x = torch.full((1 << 20,), float(rank + 1), device=device)
    dist.all_reduce(x)
    if not bool((x == 3).all()):
        raise RuntimeError(f"the sum of 1 and 2 over two ranks is {x[0].item()}")
    big = torch.ones(25 << 18, device=device)  # 25 MiB, DDP's bucket
    s = seconds_of(torch, device, lambda: dist.all_reduce(big), 2, rounds=3)
    dist.destroy_process_group()
    print(json.dumps(dict(sum_is_right=True, ms_per_25_mib=s * 1e3)))


def resnet_shapes(torch, frames=64):
    """Every distinct convolution of TSM-ResNet-50 at 224 x 224 as (count, n, c, h, w, k, kernel, stride), from the model itself."""
    from tsm_model import TSM

    counts = {}

    def note(module, args, _output):
        key = (*args[0].shape, module.out_channels, module.kernel_size[0], module.stride[0])
        counts[key] = counts.get(key, 0) + 1

    with torch.device("meta"):
        net = TSM("resnet50")
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.register_forward_hook(note)
        net(torch.empty(frames, 3, 224, 224))
    return [(count, *key) for key, count in counts.items()]


def part_cudnn(torch, device):
    """Which of cuDNN's fused patterns have a plan for ResNet-50's shapes, fp16 and bf16 in NHWC, and how long each takes."""
    need_gpu(device)
    try:
        import cudnn
    except Exception as e:
        raise NotMeasured(f"package missing: import cudnn (nvidia-cudnn-frontend): {type(e).__name__}: {e}") from None
    end = time.monotonic() + PARTS["cudnn"] - 20
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    out = dict(frontend=cudnn.__version__, backend=cudnn.backend_version(), plans=[])
    if not hasattr(cudnn.pygraph, "dbn_weight"):
        out["dgrad_drelu_dbn"] = "not measured: the Python front end has no dbn_weight; dgrad_drelu below is the part that it can express"
    fused, plain = ("conv_genstats", "sbr_conv_genstats", "dgrad_drelu", "sbr_wgrad"), ("conv", "dgrad", "wgrad", "sbr_conv")
    shapes = resnet_shapes(torch)
    # Pattern by pattern, so that a time limit leaves whole answers.
    for dtype, patterns in ((torch.float16, fused), (torch.float16, plain), (torch.bfloat16, fused)):
        for pattern, (count, *shape) in itertools.product(patterns, shapes):
            row = dict(dtype=str(dtype).removeprefix("torch."), count=count, shape=dict(zip(("n", "c", "h", "w", "k", "kernel", "stride"), shape)), pattern=pattern)
            if time.monotonic() > end:
                out["cut"] = f"time limit before {row['dtype']} {pattern} {shape}"
                return out
            try:
                row.update(try_plan(torch, cudnn, handle, device, dtype, shape, pattern))
            except Exception as e:
                row.update(plan=False, why=f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}")
            out["plans"].append(row)
    return out


def try_plan(torch, cudnn, handle, device, dtype, shape, pattern):
    n, c, h, w, k, kernel, stride = shape
    half = cudnn.data_type.HALF if dtype == torch.float16 else cudnn.data_type.BFLOAT16
    full = cudnn.data_type.FLOAT
    g = cudnn.pygraph(handle=handle, io_data_type=half, intermediate_data_type=full, compute_data_type=full)
    pad = kernel // 2
    p, q = (h + 2 * pad - kernel) // stride + 1, (w + 2 * pad - kernel) // stride + 1
    geometry = dict(padding=[pad, pad], stride=[stride, stride], dilation=[1, 1])
    tensors = {}

    def given(name, *dim):
        t = torch.randn(*dim, device=device).to(dtype).to(memory_format=torch.channels_last)
        handle_to = g.tensor(name=name, dim=list(dim), stride=nhwc_strides(*dim), data_type=half)
        tensors[handle_to] = t
        return handle_to

    def wanted(symbol, dim, kind):
        symbol.set_output(True).set_data_type(kind).set_dim(list(dim)).set_stride(nhwc_strides(*dim))
        tensors[symbol] = torch.empty(*dim, device=device, dtype=dtype if kind == half else torch.float32).to(memory_format=torch.channels_last)

    x_shape, w_shape, y_shape = (n, c, h, w), (k, c, kernel, kernel), (n, k, p, q)
    if "dgrad" in pattern:
        dx = g.conv_dgrad(loss=given("dy", *y_shape), filter=given("w", *w_shape), **geometry)
        if pattern == "dgrad_drelu":
            dx.set_dim(list(x_shape)).set_stride(nhwc_strides(*x_shape))
            dx = g.relu_backward(loss=dx, input=given("x", *x_shape))
        wanted(dx, x_shape, half)
    else:
        x = given("x", *x_shape)
        if pattern.startswith("sbr"):
            x = g.relu(input=g.bias(input=g.scale(input=x, scale=given("scale", 1, c, 1, 1)), bias=given("bias", 1, c, 1, 1)))
        if pattern.endswith("wgrad"):
            wanted(g.conv_wgrad(image=x, loss=given("dy", *y_shape), **geometry), w_shape, half)
        else:
            y = g.conv_fprop(image=x, weight=given("w", *w_shape), **geometry)
            wanted(y, y_shape, half)
            if pattern.endswith("genstats"):
                for statistic in g.genstats(input=y, compute_data_type=full):
                    wanted(statistic, (1, k, 1, 1), full)
    g.validate()
    g.build_operation_graph()
    g.create_execution_plans([cudnn.heur_mode.A])
    g.check_support()
    g.build_plans()
    row = dict(plan=True)
    try:
        workspace = torch.empty(max(g.get_workspace_size(), 1), device=device, dtype=torch.uint8)
        row["us"] = seconds_of(torch, device, lambda: g.execute(tensors, workspace, handle=handle), 10, rounds=3) * 1e6
    except Exception as e:  # that the plan exists is an answer as well
        row["not_run"] = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
    return row


def nhwc_strides(n, c, h, w):
    return [c * h * w, 1, w * c, c]


def need_gpu(device):
    if device.type != "cuda":
        raise NotMeasured("no GPU")


def last_json(text):
    """The last line that is a JSON object: libraries write to stdout as well."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return dict(failed="no result", last_lines=tail(text))


def tail(text, lines=4):
    return [line[:200] for line in text.strip().splitlines()[-lines:]]


def run_part(name, device):
    """The part's result from a process of its own, or why there is none."""
    command = [sys.executable, os.path.abspath(__file__), "--device", device, "--part", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PARTS[name])
    except subprocess.TimeoutExpired:
        return dict(not_measured=f"did not end within {PARTS[name]} s")
    if done.returncode:
        return dict(not_measured=f"exit status {done.returncode}", last_lines=tail(done.stderr))
    return last_json(done.stdout)


def markdown(r):
    out = ["# What the GPU can do", "", f"{r['date']}, {machine.headline(r['machine'])}.", "", "| part | fact | value |", "|---|---|---|"]
    for part, facts in r["parts"].items():
        for key, value in facts.items():
            if key in ("plans", "last_lines") or part == "device":
                continue
            text = f"{value:.3g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, dict) else value
            out.append(f"| {part} | {key} | {text} |")
    plans = r["parts"].get("cudnn", {}).get("plans")
    if plans:
        patterns = list(dict.fromkeys(p["pattern"] for p in plans))
        table = {}
        for p in plans:
            s = p["shape"]
            name = f"{p['dtype']} {p['count']} x {s['c']}->{s['k']} {s['kernel']}x{s['kernel']}/{s['stride']} {s['h']}x{s['w']}"
            table.setdefault(name, {})[p["pattern"]] = (f"{p['us']:.0f}" if "us" in p else "plan") if p["plan"] else "none"
        out += ["", "cuDNN plans at 64 frames, microseconds where run:", "", "| convolution | " + " | ".join(patterns) + " |", "|---" * (len(patterns) + 1) + "|"]
        out += [f"| {name} | " + " | ".join(cells.get(p, "-") for p in patterns) + " |" for name, cells in table.items()]
    return "\n".join(out) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs what it can, in toy sizes: a test of this script")
    p.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    p.add_argument("--json", help="file for the result, rewritten after each part")
    p.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    p.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    p.add_argument("--store", help=argparse.SUPPRESS)
    a = p.parse_args()
    parts = a.parts.split(",")
    for part in parts:
        if part not in PARTS:
            p.error(f"--parts: {part!r} is not one of {', '.join(PARTS)}")
    try:
        import torch
    except Exception as e:
        print(f"error: this Python cannot import torch: {e}", file=sys.stderr)
        sys.exit(69)
    if a.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; --device cpu tests the script without one", file=sys.stderr)
        sys.exit(69)
    device = torch.device("cuda", 0) if a.device == "cuda" else torch.device("cpu")
    if a.rank is not None:
        return one_rank(torch, device, a.rank, a.store)
    if a.part:
        try:
            print(json.dumps(globals()[f"part_{a.part}"](torch, device)))
        except NotMeasured as e:
            print(json.dumps(dict(not_measured=str(e))))
        return
    result = dict(benchmark="gpu_facts", date=machine.today(), machine=machine.describe(torch, device, ("nvidia-cudnn-frontend",)), parts={})
    for part in parts:
        result["parts"][part] = run_part(part, a.device)
        print(f"{part}: {json.dumps(result['parts'][part])[:300]}", file=sys.stderr, flush=True)
        if a.json:
            machine.write_json(a.json, result)
    if not a.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
