use super::*;
use proptest::prelude::*;

/// Real messages of the libraries. Class, what to expect of a restart, how it ended, a part of the evidence, stderr.
const SAMPLES: &[(Class, Again, End, &str, &str)] = &[
    (Class::GpuOutOfMemory, Again::Fails, End::Code(1), "CUDA out of memory. Tried to allocate 22.00 MiB",
"Traceback (most recent call last):
  File \"/home/me/train.py\", line 91, in <module>
    main()
  File \"/home/me/train.py\", line 85, in main
    loss.backward()
  File \"/opt/conda/lib/python3.11/site-packages/torch/_tensor.py\", line 626, in backward
    torch.autograd.backward(
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a total capacity of 23.65 GiB of which 11.06 MiB is free. Including non-PyTorch memory, this process has 23.60 GiB memory in use. Of the allocated memory 22.90 GiB is allocated by PyTorch, and 194.87 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"),
    (Class::GpuOutOfMemory, Again::Fails, End::Code(1), "Tried to allocate 55.57 GiB",
"    return torch.grid_sampler(input, grid, mode_enum, padding_mode_enum, align_corners)
torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 55.57 GiB. GPU 0 has a total capacty of 12.00 GiB of which 9.02 GiB is free."),
    (Class::GpuOutOfMemory, Again::Fails, End::Code(1), "CUBLAS_STATUS_ALLOC_FAILED",
"Traceback (most recent call last):
  File \"train.py\", line 459, in <module>
    num_epochs=60)
RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (Class::GpuOutOfMemory, Again::Fails, End::Code(101), "CUDA out of memory. Tried to allocate 100.00 MiB",
"thread 'main' panicked at 'called `Result::unwrap()` on an `Err` value: Torch(\"CUDA out of memory. Tried to allocate 100.00 MiB (GPU 0; 7.78 GiB total capacity; 6.32 GiB already allocated; 107.25 MiB free; 6.34 GiB reserved in total by PyTorch)\")', src/main.rs:17:9"),
    (Class::GpuOutOfMemory, Again::Fails, End::Code(101), "CUDA_ERROR_OUT_OF_MEMORY",
"thread 'main' (4711) panicked at src/storage.rs:132:87:
called `Result::unwrap()` on an `Err` value: DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")
stack backtrace:
   0: std::panicking::begin_panic_handler"),
    // The peers' complaints come after the cause.
    (Class::GpuOutOfMemory, Again::Fails, End::Signal(6), "CUDA out of memory",
"[rank3]: Traceback (most recent call last):
[rank3]:   File \"/home/me/train.py\", line 12, in <module>
[rank3]:     x = torch.empty(1 << 40, device='cuda')
[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1024.00 GiB.
[rank3]:[E626 06:24:44.159932949 ProcessGroupNCCL.cpp:616] [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, NumelOut=9801523, Timeout(ms)=600000) ran for 600030 milliseconds before timing out.
terminate called after throwing an instance of 'c10::DistBackendError'
  what():  [PG ID 0 PG GUID 0(default_pg) Rank 3] Process group watchdog thread terminated with exception: NCCL communicator was aborted on rank 3."),
    (Class::Hardware, Again::Elsewhere, End::Code(1), "uncorrectable ECC error encountered",
"RuntimeError: CUDA error: uncorrectable ECC error encountered
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
    (Class::Hardware, Again::Elsewhere, End::Code(1), "system not yet initialized",
"Traceback (most recent call last):
  File \"t.py\", line 3, in <module>
    torch.zeros(1).cuda()
RuntimeError: CUDA error: system not yet initialized"),
    (Class::Hardware, Again::Elsewhere, End::Code(1), "too old (found version 11040)",
"Traceback (most recent call last):
  File \"t.py\", line 3, in <module>
    torch.cuda.set_device(0)
  File \"/usr/lib/python3/dist-packages/torch/cuda/__init__.py\", line 326, in _lazy_init
    torch._C._cuda_init()
RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading and installing a new version"),
    (Class::Config, Again::Fails, End::Code(1), "no kernel image",
"Traceback (most recent call last):
  File \"predict.py\", line 201, in <module>
    main()
RuntimeError: CUDA error: no kernel image is available for execution on the device
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1."),
    (Class::Config, Again::Fails, End::Code(1), "invalid device ordinal",
"Traceback (most recent call last):
  File \"t.py\", line 3, in <module>
    torch.cuda.set_device(8)
RuntimeError: CUDA error: invalid device ordinal"),
    (Class::Config, Again::Fails, End::Code(1), "Duplicate GPU detected",
"Traceback (most recent call last):
  File \"t.py\", line 3, in <module>
    dist.barrier()
torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1251, invalid usage, NCCL version 2.19.3
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000"),
    (Class::Program, Again::MayWork, End::Code(1), "Assertion `t >= 0 && t < n_classes` failed.",
"../aten/src/ATen/native/cuda/Loss.cu:250: nll_loss_forward_reduce_cuda_kernel_2d: block: [0,0,0], thread: [3,0,0] Assertion `t >= 0 && t < n_classes` failed."),
    (Class::Program, Again::MayWork, End::Code(1), "device-side assert triggered, at train.py:9 in <module>",
"Traceback (most recent call last):
  File \"train.py\", line 9, in <module>
    loss.backward()
RuntimeError: CUDA error: device-side assert triggered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect."),
    (Class::Program, Again::MayWork, End::Code(1), "an illegal memory access",
"RuntimeError: CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
    (Class::OutOfMemory, Again::MayWork, End::Code(1), "Bus error",
"ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).
Traceback (most recent call last):
  File \"/usr/lib/python3.10/selectors.py\", line 416, in select
    fd_event_list = self._selector.poll(timeout)
  File \"/usr/local/lib/python3.10/dist-packages/torch/utils/data/_utils/signal_handling.py\", line 66, in handler
    _error_if_any_worker_fails()
RuntimeError: DataLoader worker (pid 56811) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory. Please try to raise your shared memory limit."),
    (Class::OutOfMemory, Again::MayWork, End::Code(1), "</torch_1234_567_0>",
"RuntimeError: unable to write to file </torch_1234_567_0>: No space left on device (28)"),
    (Class::Program, Again::MayWork, End::Code(1), "Too many open files (24)",
"RuntimeError: unable to open shared memory object </torch_710863_755204907_419> in read-write mode: Too many open files (24)"),
    (Class::DiskFull, Again::MayWork, End::Code(1), "No space left on device",
"Traceback (most recent call last):
  File \"/home/me/train.py\", line 33, in save
    torch.save(state, path)
  File \"/opt/conda/lib/python3.11/site-packages/torch/serialization.py\", line 944, in save
    with _open_zipfile_writer(f) as opened_zipfile:
OSError: [Errno 28] No space left on device: '/scratch/c.pt'"),
    (Class::DiskFull, Again::MayWork, End::Code(1), "Disk quota exceeded",
"OSError: [Errno 122] Disk quota exceeded"),
    (Class::Data, Again::Fails, End::Code(1), "'/data/x.jpg', at /home/me/data.py:17 in __getitem__",
"Traceback (most recent call last):
  File \"/home/me/train.py\", line 20, in <module>
    for batch in loader:
  File \"/opt/conda/lib/python3.11/site-packages/torch/utils/data/dataloader.py\", line 701, in __next__
    data = self._next_data()
  File \"/opt/conda/lib/python3.11/site-packages/torch/_utils.py\", line 722, in reraise
    raise exception
FileNotFoundError: Caught FileNotFoundError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File \"/opt/conda/lib/python3.11/site-packages/torch/utils/data/_utils/worker.py\", line 308, in _worker_loop
    data = fetcher.fetch(index)  # type: ignore[possibly-undefined]
           ^^^^^^^^^^^^^^^^^^^^
  File \"/home/me/data.py\", line 17, in __getitem__
    return Image.open(path)
  File \"/opt/conda/lib/python3.11/site-packages/PIL/Image.py\", line 3431, in open
    fp = builtins.open(filename, \"rb\")
FileNotFoundError: [Errno 2] No such file or directory: '/data/x.jpg'"),
    (Class::Data, Again::Fails, End::Code(1), "failed finding central directory",
"Traceback (most recent call last):
  File \"train.py\", line 3, in <module>
    torch.load('c.pt')
RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory"),
    (Class::Data, Again::MayWork, End::Code(1), "Stale file handle",
"Traceback (most recent call last):
  File \"train.py\", line 3, in <module>
    open('/nfs/list.txt')
OSError: [Errno 116] Stale file handle: '/nfs/list.txt'"),
    (Class::Config, Again::Fails, End::Code(1), "Permission denied",
"Traceback (most recent call last):
  File \"train.py\", line 3, in <module>
    open('/root/x')
PermissionError: [Errno 13] Permission denied: '/root/x'"),
    (Class::Config, Again::Fails, End::Code(2), "can't open file",
"/usr/bin/python3: can't open file '/home/me/nofile.py': [Errno 2] No such file or directory"),
    (Class::Program, Again::Fails, End::Code(1), "No module named 'decord', at train.py:1 in <module>",
"Traceback (most recent call last):
  File \"train.py\", line 1, in <module>
    import decord
ModuleNotFoundError: No module named 'decord'"),
    (Class::Program, Again::Fails, End::Code(127), "libtorch_cpu.so",
"./trainer: error while loading shared libraries: libtorch_cpu.so: cannot open shared object file: No such file or directory"),
    (Class::Program, Again::Fails, End::Code(1), "SyntaxError: invalid syntax, at /tmp/b.py:1",
"  File \"/tmp/b.py\", line 1
    def
       ^
SyntaxError: invalid syntax"),
    (Class::Config, Again::Fails, End::Code(127), "exit code 127", "bash: nosuchprogram: No such file or directory"),
    (Class::Network, Again::MayWork, End::Code(1), "EADDRINUSE",
"Traceback (most recent call last):
  File \"t.py\", line 74, in setup
    dist.init_process_group('nccl')
torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"),
    (Class::Network, Again::MayWork, End::Code(1), "Address already in use",
"RuntimeError: The server socket has failed to listen on any local network address. The server socket has failed to bind to [::]:44796 (errno: 98 - Address already in use). The server socket has failed to bind to 0.0.0.0:44796 (errno: 98 - Address already in use)."),
    (Class::Network, Again::MayWork, End::Code(1), "client socket has timed out",
"torch.distributed.DistNetworkError: The client socket has timed out after 600000ms while trying to connect to (172.17.0.9, 46229)."),
    (Class::Hang, Again::MayWork, End::Signal(6), "Watchdog caught collective operation timeout",
"[rank1]:[E626 06:24:44.903881913 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, NumelOut=9801523, Timeout(ms)=600000) ran for 600020 milliseconds before timing out.
[rank1]:[E626 06:24:44.906457629 ProcessGroupNCCL.cpp:1785] [PG ID 0 PG GUID 0(default_pg) Rank 1] Exception (either an error or timeout) detected by watchdog at work: 808, last enqueued NCCL work: 811, last completed NCCL work: 807.
terminate called after throwing an instance of 'c10::DistBackendError'
  what():  [PG ID 0 PG GUID 0(default_pg) Rank 1] Process group watchdog thread terminated with exception: [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, NumelOut=9801523, Timeout(ms)=600000) ran for 600020 milliseconds before timing out."),
    (Class::Hang, Again::MayWork, End::Code(1), "Timed out waiting 1800000ms for recv",
"Traceback (most recent call last):
  File \"t.py\", line 7, in <module>
    dist.all_reduce(x)
RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"),
    (Class::Network, Again::MayWork, End::Code(1), "Connection closed by peer [127.0.0.1]:10895",
"RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:10895"),
    (Class::Network, Again::MayWork, End::Code(1), "Read error [192.168.70.92]:25266",
"RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:589] Read error [192.168.70.92]:25266: Connection reset by peer"),
    (Class::Network, Again::MayWork, End::Code(1), "ncclSystemError: System call",
"torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1970, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.25.1
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
"),
    (Class::Network, Again::MayWork, End::Signal(6), "ncclRemoteError",
"terminate called after throwing an instance of 'c10::DistBackendError'
  what():  NCCL error: remote process exited or there was a network error, NCCL version 2.21.5
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
NET/IB : Got completion from peer 10.216.210.236<54862> with status=12 opcode=0 len=0 vendor err 129 (Recv)"),
    (Class::Diverged, Again::Fails, End::Code(1), "Loss is nan", "Loss is nan, stopping training"),
    (Class::OutOfMemory, Again::MayWork, End::Signal(6), "memory allocation of 68719476736 bytes failed", "memory allocation of 68719476736 bytes failed"),
    (Class::Program, Again::MayWork, End::Signal(11), "Fatal Python error: Segmentation fault, at /home/me/ops.py:4 in shift",
"Fatal Python error: Segmentation fault

Current thread 0x00007fb019482b80 (most recent call first):
  File \"/root/.pyenv/versions/3.11.7/lib/python3.11/ctypes/__init__.py\", line 519 in string_at
  File \"/home/me/ops.py\", line 4 in shift
  File \"/home/me/train.py\", line 1 in <module>"),
    (Class::Program, Again::MayWork, End::Code(1), "ValueError: broken clip 7, at /tmp/a.py:7 in g",
"Traceback (most recent call last):
  File \"/tmp/a.py\", line 5, in g
    f(1)
  File \"/tmp/a.py\", line 2, in f
    return {}[x]
           ~~^^^
KeyError: 1

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File \"/tmp/a.py\", line 8, in <module>
    g()
  File \"/tmp/a.py\", line 7, in g
    raise ValueError(\"broken clip 7\\nsecond line\") from e
ValueError: broken clip 7
second line
Exception ignored in: <function _MultiProcessingDataLoaderIter.__del__ at 0x7fc7fa34f7f0>
Traceback (most recent call last):
  File \"/usr/local/lib/python3.10/dist-packages/torch/utils/data/dataloader.py\", line 1478, in __del__
    self._shutdown_workers()
AssertionError: can only join a started process"),
    (Class::Program, Again::MayWork, End::Code(101), "panic: index out of bounds: the len is 7 but the index is 7, at src/clip.rs:4:5",
"thread 'decoder-3' panicked at src/clip.rs:4:5:
index out of bounds: the len is 7 but the index is 7
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace"),
    (Class::Program, Again::MayWork, End::Signal(6), "Assertion `n > 0' failed.", "a.out: x.c:12: main: Assertion `n > 0' failed."),
    (Class::Program, Again::MayWork, End::Code(17), "exit code 17", "epoch 3 done"),
    // Not certain enough to end a job for good.
    (
        Class::Data,
        Again::MayWork,
        End::Code(1),
        "cannot stat",
        "cp: cannot stat 'x': No such file or directory\ngiving up",
    ),
    // What was logged and survived is no cause.
    (Class::Program, Again::MayWork, End::Signal(11), "signal 11 (SIGSEGV)", "download failed: Connection reset by peer\nretry 1\nOSError: [Errno 28] No space left on device"),
    (Class::Program, Again::MayWork, End::Code(3), "exit code 3",
"UserWarning: CUDA initialization: Found no NVIDIA driver on your system. (Triggered internally at ../c10/cuda/CUDAFunctions.cpp:108.)"),
];

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

#[test]
fn real_messages_are_recognised() {
    for (class, again, end, evidence, stderr) in SAMPLES {
        let stderr = lines(stderr);
        let facts = Facts {
            end: Some(*end),
            stderr: &stderr,
            ..Facts::default()
        };
        let verdict = classify(&facts);
        assert_eq!(
            (verdict.class, verdict.again),
            (*class, *again),
            "{verdict:?}\n{stderr:#?}"
        );
        assert!(
            verdict.evidence.contains(evidence),
            "{verdict:?}\nlacks {evidence}"
        );
        let advised = *class == Class::Program || !verdict.hint.is_empty();
        assert!(advised, "{verdict:?} says not what to do");
    }
}

fn record(code: i32, cause: &str, message: &str) -> FailureRecord {
    FailureRecord {
        rank: 0,
        step: None,
        code,
        cause: cause.into(),
        message: message.into(),
        backtrace: None,
    }
}

#[test]
fn a_documented_code_decides_before_any_text() {
    let text = lines("error: rank 0: cannot read list.txt: Connection reset by peer");
    let cases = [
        (exit::CONFIG, Class::Config, Again::Fails),
        (exit::USAGE, Class::Config, Again::Fails),
        (exit::DATA, Class::Data, Again::Fails),
        (exit::PREFLIGHT, Class::Hardware, Again::Elsewhere),
        (exit::CANNOT_WRITE, Class::DiskFull, Again::MayWork),
        (exit::PEER, Class::Network, Again::MayWork),
        (exit::DIVERGED, Class::Diverged, Again::Fails),
        (exit::DO_NOT_REQUEUE, Class::Program, Again::Fails),
    ];
    for (code, class, again) in cases {
        let said = record(code, "error", "lists differ\n  hint: look");
        for (record, evidence) in [(Some(&said), "lists differ"), (None, "error: rank 0")] {
            let end = Some(End::Code(code));
            let verdict = classify(&Facts {
                end,
                record,
                stderr: &text,
                ..Facts::default()
            });
            assert_eq!((verdict.class, verdict.again), (class, again), "{code}");
            assert!(verdict.evidence.starts_with(evidence), "{verdict:?}");
        }
    }
    let away = record(
        exit::DATA,
        "error",
        "cannot read clip 7: Stale file handle (os error 116)",
    );
    let verdict = classify(&Facts {
        record: Some(&away),
        ..Facts::default()
    });
    assert_eq!(
        (verdict.class, verdict.again),
        (Class::Data, Again::MayWork)
    );
}

#[test]
fn a_panic_of_ours_is_told_by_its_message() {
    let class = |message: &str| {
        let record = record(exit::BUG, "panic", message);
        classify(&Facts {
            record: Some(&record),
            ..Facts::default()
        })
        .class
    };
    assert_eq!(
        class(
            "called unwrap on Torch(\"CUDA out of memory. Tried to allocate 2.00 GiB\") at src/a.rs:1:2"
        ),
        Class::GpuOutOfMemory
    );
    assert_eq!(
        class("index 7 out of range at src/a.rs:1:2"),
        Class::Program
    );
}

#[test]
fn a_kill_is_told_by_the_kernel() {
    let kill = |end, all, unnamed, sent: &[i32], oom_kill: Option<&'static str>| {
        let facts = Facts {
            end: Some(end),
            oom_kill,
            oom_kills: OomKills { all, unnamed },
            sent,
            ..Facts::default()
        };
        classify(&facts)
    };
    let class = |end, all, unnamed, sent| kill(end, all, unnamed, sent, None).class;
    for end in [End::Signal(9), End::Code(137)] {
        assert_eq!(class(end, 1, 1, &[]), Class::OutOfMemory);
        assert_eq!(class(end, 0, 0, &[]), Class::Killed);
    }
    assert_eq!(class(End::Signal(9), 2, 0, &[]), Class::Killed, "others");
    let child = class(End::Code(137), 1, 0, &[]);
    assert_eq!(child, Class::OutOfMemory, "perhaps its own");
    let told = kill(
        End::Signal(9),
        0,
        0,
        &[],
        Some("Out of memory: Killed 4711"),
    );
    assert_eq!(told.class, Class::OutOfMemory);
    assert!(
        told.evidence
            .ends_with(", and the kernel logged: Out of memory: Killed 4711")
    );
    assert_eq!(
        class(End::Signal(9), 1, 1, &[15, 9]),
        Class::Unknown,
        "ours"
    );
    assert_eq!(class(End::Signal(15), 3, 3, &[]), Class::Killed);
    let bus = class(End::Signal(libc::SIGBUS), 0, 0, &[]);
    assert_eq!(bus, Class::Unknown);
}

#[test]
fn a_loader_worker_that_the_kernel_killed_ran_out_of_memory() {
    let unexpected = "RuntimeError: DataLoader worker (pid(s) 7) exited unexpectedly".to_string();
    let class = |stderr: &[String], exception, all| {
        let facts = Facts {
            end: Some(End::Code(1)),
            stderr,
            exception,
            oom_kills: OomKills { all, unnamed: 0 },
            ..Facts::default()
        };
        classify(&facts)
    };
    let told = class(std::slice::from_ref(&unexpected), None, 1);
    assert_eq!(told.class, Class::OutOfMemory);
    let killer = "exited unexpectedly, and the kernel's out-of-memory killer ended 1 process(es)";
    assert!(told.evidence.ends_with(killer), "{}", told.evidence);
    let told = class(&[], Some(unexpected.as_str()), 2);
    assert_eq!(told.class, Class::OutOfMemory);
    let uncounted = class(std::slice::from_ref(&unexpected), None, 0);
    assert_eq!(uncounted.class, Class::Program);
    assert_eq!(
        class(&["RuntimeError: x".into()], None, 1).class,
        Class::Program
    );
}

#[test]
fn a_node_that_gave_up_a_coordinator_that_did_not_run_may_be_well() {
    let lost = |how| {
        classify(&Facts {
            node_lost: Some(how),
            ..Facts::default()
        })
    };
    let silent = lost("silent for 1400ms");
    assert_eq!(
        (silent.class, silent.again),
        (Class::NodeLost, Again::Elsewhere)
    );
    let innocent =
        lost("silent for 1400ms, after the coordinator itself, on a, had not run for 3.7 s");
    assert_eq!(
        (innocent.class, innocent.again),
        (Class::NodeLost, Again::MayWork)
    );
    assert!(
        innocent
            .hint
            .contains("whether the launcher there was stopped")
    );
}

#[test]
fn xids_are_read_as_the_driver_writes_them() {
    use xid::Fault::*;
    let cases = [
        (
            "NVRM: Xid (PCI:0000:00:06): 31, pid=79749, name=exe, Ch 0000000a, intr 00000000. MMU Fault: ENGINE GRAPHICS GPC2 GPCCLIENT_T1_7 faulted @ 0x2b57_b3000000. Fault is of type FAULT_PDE ACCESS_TYPE_VIRT_WRITE",
            Some((31, Program)),
        ),
        (
            "NVRM: Xid (0000:03:00): 13, Graphics Exception",
            Some((13, Program)),
        ),
        (
            "[ 12.5] NVRM: Xid (PCI:0000:01:00): 43, pid=1, name=python3, Ch 00000008",
            Some((43, Program)),
        ),
        (
            "NVRM: Xid (PCI:0000:01:00): 45, pid=1, name=python3, Ch 00000008",
            Some((45, Consequence)),
        ),
        (
            "NVRM: Xid (PCI:0000:9c:00): 48, pid=1, name=python3, DBE",
            Some((48, Node)),
        ),
        (
            "NVRM: Xid (PCI:0000:04:00): 63, Row remapping event: Rows 0x1a and 0x2b have been remapped",
            Some((63, Repaired)),
        ),
        (
            "NVRM: Xid (PCI:0000:04:00): 64, Failed to persist row remap table",
            Some((64, Node)),
        ),
        (
            "NVRM: Xid (PCI:0000:04:00): 74, pid=1234, NVLink: fatal error detected on link 4",
            Some((74, Node)),
        ),
        (
            "Okt 06 17:59:27 balrog kernel: NVRM: Xid (PCI:0000:01:00): 79, pid=1122, GPU has fallen off the bus.",
            Some((79, Node)),
        ),
        (
            "               NVRM: fallen off the bus and is not responding to commands.",
            Some((79, Node)),
        ),
        (
            "NVRM: Xid (PCI:0000:9b:00): 94, pid=1234, name=python3, Contained ECC error",
            Some((94, Repaired)),
        ),
        (
            "NVRM: Xid (PCI:0000:9b:00): 95, pid=1234, name=python3, Uncontained ECC error",
            Some((95, Node)),
        ),
        (
            "NVRM: Xid (PCI:0000:0f:00): 119, pid=2, Timeout waiting for RPC from GSP!",
            Some((119, Node)),
        ),
        (
            "NVRM: Xid (PCI:0000:0b:00): 154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)",
            Some((154, Node)),
        ),
        (
            "NVRM: Xid (PCI:0000:0b:00): 154, GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)",
            None,
        ),
        (
            "NVRM: Xid (PCI:0019:01:00): 149, NETIR Fatal XC0 i0 Link -1 (0x000fe406)",
            Some((149, Node)),
        ),
        (
            "NVRM: Xid (PCI:0018:01:00): 145, RLW_RXPIPE Nonfatal XC0 i0 Link 13 (0x0409a0c2)",
            Some((145, Repaired)),
        ),
        ("NVRM: Xid (PCI:0000:0b:00): 7, unused", None),
        ("eth0: link up", None),
    ];
    for (line, expected) in cases {
        assert_eq!(
            xid::kind(line).map(|xid| (xid.number, xid.fault)),
            expected,
            "{line}"
        );
    }
}

#[test]
fn a_broken_gpu_explains_whatever_the_rank_says() {
    let xids = lines(
        "NVRM: Xid (PCI:0000:01:00): 45, pid=1\nNVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.",
    );
    let stderr = lines("RuntimeError: CUDA error: unspecified launch failure");
    let facts = Facts {
        end: Some(End::Code(1)),
        xids: &xids,
        stderr: &stderr,
        hung: true,
        ..Facts::default()
    };
    let verdict = classify(&facts);
    assert_eq!(
        (verdict.class, verdict.again),
        (Class::Hardware, Again::Elsewhere)
    );
    assert_eq!(
        (
            verdict.evidence.as_str(),
            signature(&verdict, &facts).as_str()
        ),
        (xids[1].as_str(), "hardware: Xid 79")
    );

    // The program's own fault is not the GPU's.
    let xids = lines("NVRM: Xid (PCI:0000:01:00): 31, pid=1, MMU Fault");
    let own = classify(&Facts {
        xids: &xids,
        hung: false,
        ..facts
    });
    assert_eq!(own.class, Class::Program);
    // A wrong configuration is not explained by it.
    let config = Facts {
        end: Some(End::Code(exit::CONFIG)),
        ..facts
    };
    assert_eq!(classify(&config).class, Class::Config);
}

#[test]
fn a_lost_node_and_a_hang_are_what_they_are() {
    let stderr = lines("Traceback (most recent call last):\nValueError: x");
    let lost = Facts {
        node_lost: Some("no sign of life for 1.5 s"),
        stderr: &stderr,
        ..Facts::default()
    };
    let verdict = classify(&lost);
    assert_eq!(
        (verdict.class, verdict.evidence.as_str()),
        (Class::NodeLost, "no sign of life for 1.5 s")
    );
    let hung = classify(&Facts {
        end: Some(End::Signal(15)),
        sent: &[15],
        hung: true,
        ..Facts::default()
    });
    assert_eq!(hung.class, Class::Hang);
}

#[test]
fn torchs_error_file_tells_without_a_traceback() {
    let exception = Some("ValueError: broken clip");
    let verdict = classify(&Facts {
        end: Some(End::Code(1)),
        exception,
        ..Facts::default()
    });
    assert_eq!(
        (verdict.class, verdict.evidence.as_str()),
        (Class::Program, "ValueError: broken clip")
    );
    let stderr = lines("  File \"a.py\", line 1, in f\nValueError: broken clip");
    let verdict = classify(&Facts {
        end: Some(End::Code(1)),
        exception,
        stderr: &stderr,
        ..Facts::default()
    });
    assert_eq!(verdict.evidence, "ValueError: broken clip, at a.py:1 in f");
}

fn signature_of(end: End, stderr: &str) -> String {
    let stderr = lines(stderr);
    let facts = Facts {
        end: Some(end),
        stderr: &stderr,
        ..Facts::default()
    };
    signature(&classify(&facts), &facts)
}

#[test]
fn two_runs_of_one_error_have_one_signature() {
    let same = [
        (
            "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:10895",
            "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.12]:7",
        ),
        (
            "error: DataLoader worker (pid 56811) died at 0x7f3b6e7236fc",
            "error: DataLoader worker (pid 9) died at 0x1",
        ),
        (
            "error: cannot open /tmp/tmpab_12cd/x.pt at 2026-01-02 12:30:01.5",
            "error: cannot open /tmp/tmpzzzzzz/x.pt at 2026-02-11 1:30:01",
        ),
        (
            "error: run 550e8400-e29b-41d4-a716-446655440000 failed",
            "error: run 9f0d1c2b-0000-4aaa-bbbb-00000000000a failed",
        ),
        (
            "error: rank 3 on gpu-02: loss 1.25",
            "error: rank 11 on gpu-17: loss 7",
        ),
    ];
    for (one, other) in same {
        assert_eq!(
            signature_of(End::Code(1), one),
            signature_of(End::Signal(6), other)
        );
    }
    let different = ["error: no clip", "error: no list", "Error: no clip", ""];
    for (i, one) in different.iter().enumerate() {
        for other in &different[i + 1..] {
            assert_ne!(
                signature_of(End::Code(1), one),
                signature_of(End::Code(1), other)
            );
        }
    }
    assert_ne!(
        signature_of(End::Code(17), ""),
        signature_of(End::Code(3), "")
    );
    assert_eq!(
        signature_of(End::Code(17), ""),
        "program error: exit code 17"
    );
}

proptest! {
    #[test]
    fn any_text_is_answered(
        texts in proptest::collection::vec(".{0,60}", 0..12),
        samples in proptest::collection::vec((0..SAMPLES.len(), 0usize..40, 0usize..200), 0..4),
        end in proptest::option::of(prop_oneof![(-1..260).prop_map(End::Code), (0..70).prop_map(End::Signal)]),
        xids in proptest::collection::vec("(NVRM: Xid \\()?.{0,9}(\\): )?[0-9]{0,12}.{0,9}", 0..3),
        all in 0u64..2,
        oom_kill in proptest::option::of(".{0,20}"),
        hung: bool,
        code in proptest::option::of(-1..260),
    ) {
        let mut stderr = texts.clone();
        // Pieces of real messages, cut anywhere.
        for (sample, line, cut) in samples {
            let line = SAMPLES[sample].4.lines().nth(line).unwrap_or("Traceback (most recent call last):");
            stderr.push(line.chars().take(cut).collect());
        }
        let record = code.map(|code| record(code, "error", &texts.join("\n")));
        let facts = Facts {
            end,
            record: record.as_ref(),
            exception: stderr.first().map(String::as_str),
            stderr: &stderr,
            oom_kill: oom_kill.as_deref(),
            oom_kills: OomKills { all, unnamed: all },
            xids: &xids,
            node_lost: None,
            hung,
            sent: &[15],
        };
        let verdict = classify(&facts);
        prop_assert!(verdict.evidence.chars().count() <= WIDTH + 3);
        prop_assert!(!verdict.evidence.contains('\n'));
        let signature = signature(&verdict, &facts);
        prop_assert!(!signature.is_empty() && signature.len() < 1000);
    }
}

#[test]
fn a_long_line_is_cut_between_characters() {
    let stderr = [format!("error: x{}", "é".repeat(1000))];
    let facts = Facts {
        end: Some(End::Code(1)),
        stderr: &stderr,
        ..Facts::default()
    };
    let verdict = classify(&facts);
    assert_eq!(verdict.evidence.chars().count(), WIDTH + 3);
}
