"""One way to run a TSM training step in PyTorch: build it, warm it, take steps, say what it costs."""

import contextlib
import time
import types

import torch

from tsm_model import TSM

ENGINES = ("eager", "compile", "graph", "compile-graph")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
LAYOUTS = ("nchw", "nhwc")
SHIFTS = ("cat", "onepass")
OPTIMIZERS = ("foreach", "fused")


def unusable(device_type, engine, precision, optimizer):
    """None, or why a combination does not exist on this device."""
    if device_type == "cpu" and engine.endswith("graph"):
        return "CUDA graphs need a GPU"
    if device_type == "cpu" and precision == "tf32":
        return "TF32 needs a GPU"
    if engine.endswith("graph") and precision == "fp16" and optimizer != "fused":
        return "GradScaler reads the overflow flag back to the host unless the optimizer is fused, and a graph cannot"
    return None


def own_code(net):
    """Gives `net` a class with a code object of its own.

    torch.compile caches by code object, at most 8 entries before it falls back to eager without an error; rows that
    shared TSM.forward would fill that cache together and walk each other's guards.
    """
    forward = types.FunctionType(TSM.forward.__code__.replace(), TSM.forward.__globals__, "forward")
    net.__class__ = type("TSM", (TSM,), {"forward": forward})
    return net


class Variant:
    """A model with its optimizer and its input; `run(n)` takes n steps and returns the seconds of each."""

    graph_pool = None  # shared: graphs are replayed one at a time and keep nothing between replays

    def __init__(self, device, ddp, segments, classes, model, size, clips, engine, precision, layout, shift, optimizer):
        self.key = dict(model=model, size=size, clips=clips, engine=engine, precision=precision, layout=layout, shift=shift, optimizer=optimizer)
        self.device, self.ddp = device, ddp
        self.cuda = device.type == "cuda"
        if self.cuda:
            # The memory of the rows built before is not this row's.
            self.base_bytes = torch.cuda.memory_allocated(device)
        torch.manual_seed(0)
        self._flags()
        memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        net = own_code(TSM(model, segments, classes, shift)).to(device).to(memory_format=memory_format).train()
        self.x = torch.randn(clips * segments, 3, size, size, device=device).to(memory_format=memory_format)
        self.y = torch.randint(classes, (clips,), device=device)
        self.captured = engine.endswith("graph")
        # DDP is captured only if it was built on a side stream as well.
        self.side = torch.cuda.Stream() if self.captured else None
        if ddp:
            with torch.cuda.stream(self.side) if self.captured else contextlib.nullcontext():
                ids = [device.index] if self.cuda else None
                net = torch.nn.parallel.DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)
        flags = dict(fused=True) if optimizer == "fused" else dict(foreach=True)
        self.opt = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, **flags)
        for p in net.parameters():
            # The same first step; without it a fused step that skips an overflow would leave the buffer uninitialised.
            self.opt.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
        # Every shape is met once: letting a second size turn the first into a dynamic one would cost speed.
        self.forward = torch.compile(net, dynamic=False) if engine.startswith("compile") else net
        self.graph = self.loss = None

    def _flags(self):
        """Process-wide switches, so set again before each turn of this row."""
        tf32 = self.key["precision"] == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32

    def _step(self, cast_cache=True):
        self.opt.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, cache_enabled=cast_cache) if self.dtype else contextlib.nullcontext():
            loss = torch.nn.functional.cross_entropy(self.forward(self.x), self.y)
        if self.scaler is None:
            loss.backward()
            self.opt.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.opt)
            self.scaler.update()
        return loss.detach()

    def prepare(self, warmup):
        """Warms up (compiles, captures), keeps the seconds it took and, on a GPU, measures the row's own peak memory."""
        began = time.monotonic()
        compiled = self.key["engine"].startswith("compile")
        graphs = dynamo_graphs() if compiled else 0
        if self.captured:
            self._capture(max(warmup, 11 if self.ddp else 3))  # DDP looks at its first ten steps with events
        else:
            self.run(max(warmup, 1))
            if self.cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
                self.run(1)
                self._keep_peak()
        if compiled:
            self.key["compiled_graphs"] = dynamo_graphs() - graphs
        if self.captured:
            self.run(max(warmup, 1))
        self.key["warmup_s"] = round(time.monotonic() - began, 2)

    def _keep_peak(self):
        self.key["peak_bytes"] = torch.cuda.max_memory_allocated(self.device) - self.base_bytes

    def _capture(self, warmup):
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for _ in range(warmup):
                self._step(cast_cache=False)
        torch.cuda.current_stream().wait_stream(self.side)
        self.opt.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        graph = torch.cuda.CUDAGraph()
        if Variant.graph_pool is None:
            Variant.graph_pool = torch.cuda.graph_pool_handle()
        # NCCL's watchdog thread asks for events meanwhile, which only the thread-local mode forgives.
        mode = "thread_local" if self.ddp else "global"
        with torch.cuda.graph(graph, pool=Variant.graph_pool, capture_error_mode=mode):
            # The cache of weight casts must not hand a tensor from before the capture to the graph.
            self.loss = self._step(cast_cache=False)
        self._keep_peak()  # a replay allocates nothing, so the capture is what shows the need
        self.opt.zero_grad(set_to_none=True)  # the next capture may use the memory of these gradients
        self.graph = graph

    def one(self):
        if self.graph is None:
            return self._step()
        self.graph.replay()
        return self.loss

    def run(self, n):
        """Takes `n` steps. On a GPU the host runs ahead as in training: each step is timed from the end of the step before."""
        self._flags()
        if self.cuda:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
            torch.cuda.synchronize()
            marks[0].record()
            for mark in marks[1:]:
                loss = self.one()
                mark.record()
            torch.cuda.synchronize()
            seconds = [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:])]
        else:
            seconds = []
            for _ in range(n):
                start = time.perf_counter()
                loss = self.one()
                seconds.append(time.perf_counter() - start)
        if not torch.isfinite(loss).item():
            raise RuntimeError(f"the loss became {loss.item()}")
        return seconds

    def launch_seconds(self):
        """Median host time until a step's last launch returned with an idle GPU before it."""
        self._flags()
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.one()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return sorted(times)[2]

    def count_kernels(self):
        """(kernels, copies and fills) on the GPU in one step, by the profiler."""
        from torch.profiler import ProfilerActivity, profile

        self._flags()
        self.one()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            self.one()
            torch.cuda.synchronize()
        return kernel_counts((e.name, e.device_type == torch.autograd.DeviceType.CUDA, getattr(e, "is_user_annotation", False)) for e in p.events())


def kernel_counts(events):
    """Splits a profile's (name, on the GPU, annotation) triples into launches of kernels and of copies or fills."""
    kernels = copies = 0
    for name, on_gpu, annotation in events:
        if not on_gpu or annotation or name.startswith(("Optimizer.", "ProfilerStep")):
            continue
        if name.lower().startswith(("memcpy", "memset")):
            copies += 1
        else:
            kernels += 1
    return kernels, copies


def dynamo_graphs():
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
