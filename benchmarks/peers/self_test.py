"""Checks of the peers' own correctness: a wrong yardstick measures nothing. Run through the scripts' --self-test."""

import itertools

import torch

from tsm_model import TSM, ShiftOnePass, shift_cat


def reference_shift(x, segments, fold):
    """The definition, element by element over segments."""
    out = torch.zeros_like(x)
    for i in range(x.shape[0]):
        t = i % segments
        if t + 1 < segments:
            out[i, :fold] = x[i + 1, :fold]
        if t > 0:
            out[i, fold : 2 * fold] = x[i - 1, fold : 2 * fold]
        out[i, 2 * fold :] = x[i, 2 * fold :]
    return out


def shifts_agree():
    torch.manual_seed(1)
    for (clips, segments, c), nhwc, dtype in itertools.product(((2, 8, 16), (3, 4, 24), (1, 1, 8), (2, 2, 7)), (False, True), (torch.float32, torch.bfloat16)):
        fold = c // 8
        fmt = torch.channels_last if nhwc else torch.contiguous_format
        x = torch.randn(clips * segments, c, 5, 3).to(dtype).to(memory_format=fmt)
        g = torch.randn(clips * segments, c, 5, 3).to(dtype).to(memory_format=fmt)
        want = reference_shift(x, segments, fold)
        grads = []
        for how in (shift_cat, ShiftOnePass.apply):
            leaf = x.detach().requires_grad_()
            y = how(leaf, segments, fold)
            assert torch.equal(y, want), f"{how} differs from the definition for {clips} x {segments} x {c}, {dtype}, nhwc={nhwc}"
            y.backward(g)
            grads.append(leaf.grad)
            if how is not shift_cat:
                assert y.is_contiguous(memory_format=fmt) and leaf.grad.is_contiguous(memory_format=fmt), f"the one-pass shift left {fmt}"
        assert torch.equal(*grads), "the backward passes differ"
    leaf = torch.randn(8, 16, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: ShiftOnePass.apply(v, 4, 2), leaf)


def models_are_right():
    # torchvision's counts without the classifier, plus 174 classes.
    for arch, features, width in (("resnet50", 23_508_032, 2048), ("mobilenetv2", 2_223_872, 1280)):
        count = sum(p.numel() for p in TSM(arch).parameters())
        assert count == features + width * 174 + 174, f"{arch} has {count} parameters"


def model_keeps_channels_last():
    """Of the one-pass form every convolution's input must be channels-last, or the layout axis measures conversions."""
    for arch in ("resnet50", "mobilenetv2"):
        net = TSM(arch, 4, 5, "onepass").to(memory_format=torch.channels_last)
        lost = []

        def look(module, args):
            if not args[0].is_contiguous(memory_format=torch.channels_last):
                lost.append(module)

        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.register_forward_pre_hook(look)
        net(torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)).sum().backward()
        assert not lost, f"{arch}: {len(lost)} convolutions were given another layout, first {lost[0]}"


def forms_train_alike():
    """Cat in NCHW and one-pass in NHWC take the same steps."""
    for arch in ("resnet50", "mobilenetv2"):
        losses = []
        for how, fmt in (("cat", torch.contiguous_format), ("onepass", torch.channels_last)):
            torch.manual_seed(2)
            net = TSM(arch, 4, 5, how).to(torch.float64).to(memory_format=fmt)
            opt = torch.optim.SGD(net.parameters(), 0.01, 0.9)
            x, y = torch.randn(8, 3, 32, 32, dtype=torch.float64).to(memory_format=fmt), torch.tensor([1, 3])
            for _ in range(3):
                opt.zero_grad()
                loss = torch.nn.functional.cross_entropy(net(x), y)
                loss.backward()
                opt.step()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[0]), f"{arch}: {losses}"  # the logits' mean is taken in fp32


def arithmetic():
    from pytorch_step import arguments, summary
    from step_variant import kernel_counts, unusable

    s = summary([0.2, 0.1, 0.4], 8)
    assert s["clips_per_s"] == 40 and s["samples"] == 3 and s["min_ms"] == 100
    assert kernel_counts([("gemm", True, False), ("Memset (Device)", True, False), ("cudaLaunchKernel", False, False),
                          ("Optimizer.step#SGD.step", True, True), ("bn", True, False)]) == (2, 1)
    assert unusable("cuda", "graph", "fp16", "foreach") and unusable("cpu", "graph", "fp32", "fused") and not unusable("cuda", "graph", "fp16", "fused")
    a = arguments(["--preset", "gpu", "--precisions", "bf16"])
    assert a.variants == [("eager", "bf16", "nchw", "cat", "foreach")], a.variants


def gpu_paths():
    """Capture, replay, event timing and peak memory run in the right order against stand-ins for torch.cuda."""
    from unittest import mock

    from step_variant import Variant

    calls, clock = [], itertools.count()

    class Stream:
        def wait_stream(self, _other):
            calls.append("wait")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, other):
            return 1000.0 * (other.at - self.at)

    class Recording:
        def __init__(self, graph, pool, capture_error_mode):
            assert pool == "pool" and capture_error_mode == "global"

        def __enter__(self):
            calls.append("capture")

        def __exit__(self, *_error):
            calls.append("captured")

    class Graph:
        def replay(self):
            calls.append("replay")

    stand_ins = dict(Stream=Stream, Event=Event, CUDAGraph=Graph, graph=Recording, current_stream=Stream, graph_pool_handle=lambda: "pool",
                     stream=lambda s: mock.MagicMock(), synchronize=lambda: calls.append("sync"), reset_peak_memory_stats=lambda d: calls.append("reset"),
                     max_memory_allocated=lambda d: 700)
    for captured in (False, True):
        v = Variant(torch.device("cpu"), False, 2, 5, "mobilenetv2", 32, 1, "eager", "fp32", "nhwc", "onepass", "fused")
        v.cuda, v.captured, v.side, v.base_bytes = True, captured, Stream(), 200
        calls.clear()
        with mock.patch.multiple(torch.cuda, **stand_ins), mock.patch.object(Variant, "graph_pool", None):
            v.prepare(2)
            seconds = v.run(3)
            v.launch_seconds()
        assert v.key["peak_bytes"] == 500 and seconds == [1, 1, 1], (v.key, seconds)
        # Warm-up and check runs replay twice, the timed run three times, the launches five.
        assert calls.count("replay") == (10 if captured else 0) and calls.count("capture") == captured, calls
        assert calls.index("reset") < (calls.index("capture") if captured else len(calls))
        assert all(p.grad is None for p in v.opt.param_groups[0]["params"]) or not captured


def gpu_report():
    import gpu_facts

    found = gpu_facts.resnet_shapes(torch, 8)
    assert sum(count for count, *_ in found) == 53 and len(found) == 23 and (1, 8, 3, 224, 224, 64, 7, 2) in found, found
    plan = dict(dtype="float16", count=3, shape=dict(n=64, c=64, h=56, w=56, k=64, kernel=3, stride=1), pattern="conv_genstats", plan=True, us=21.4)
    facts = dict(date="d", machine=dict(cpu="c", cores=2, torch="t"), parts=dict(nccl=dict(works=True), cudnn=dict(plans=[plan, dict(plan, pattern="dgrad", plan=False)])))
    text = gpu_facts.markdown(facts)
    assert "| float16 3 x 64->64 3x3/1 56x56 | 21 | none |" in text and "| nccl | works | True |" in text, text
    assert gpu_facts.last_json('noise\n{"a": 1}\nmore') == {"a": 1}


def step():
    torch.set_num_threads(1)  # the tensors are small
    for check in (shifts_agree, models_are_right, model_keeps_channels_last, forms_train_alike, arithmetic, gpu_paths, gpu_report):
        check()
        print(f"ok: {check.__name__}", flush=True)


def data():
    from pytorch_data import arguments, plan
    from readers import SEGMENTS, recipe

    for i in range(300):
        frames = (8, 48, 300)[i % 3]
        numbers, (x, y, w, h), _ = recipe(i, frames, 340, 256)
        assert len(numbers) == SEGMENTS and numbers == sorted(numbers) and 0 <= numbers[0] and numbers[-1] < frames
        assert all(s * frames // SEGMENTS <= n <= (s + 1) * frames // SEGMENTS for s, n in enumerate(numbers)), numbers
        assert 0 <= x and x + w <= 340 and 0 <= y and y + h <= 256 and min(w, h) >= 168
    assert recipe(5, 300, 340, 256) == recipe(5, 300, 340, 256) != recipe(6, 300, 340, 256)
    rows = list(plan(arguments(["--cache", "x", "--workers", "1"])))
    assert ("jpeg", "cv2", "float", 1) in rows and ("kinetics", "decord", "float", 1) not in rows and ("jpeg", "decord", "u8", 1) not in rows
    print("ok: data")
