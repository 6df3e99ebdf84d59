//! The texts themselves, in the order in which they count.

use super::super::Again::{Elsewhere, Fails, MayWork};
use super::super::{Again, Class};
use super::Rule;
use super::Weight::{self, Anywhere, AtEnd, InWords};
use crate::blame::LOST_PEER;

pub const LOST_PEER_HINT: &str = "no rank is known to have failed first: see the network between the nodes, and the kernel's log of each";
pub const MEMORY_HINT: &str = "less memory is needed: fewer loader workers (data.workers), less that they read ahead (data.prefetch), or fewer ranks on this node";

const GPU_MEMORY_HINT: &str = "a smaller batch per rank needs less; where much is \"reserved but unallocated\", set \
     PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; nvidia-smi shows whether somebody else uses the GPU";
const REPAIR_HINT: &str = "leave this node out until its GPU was reset or replaced; see `nvidia-smi -q -d ECC,ROW_REMAPPER`";
const DRIVER_HINT: &str = "compare the driver on this node (`nvidia-smi`) with the CUDA version of the program; after an \
     update of the driver the node must be rebooted";
const SHM_HINT: &str = "/dev/shm is too small: enlarge it (docker run --shm-size, or mount -o remount,size=), or use fewer \
     workers";
const SANITIZE_HINT: &str = "CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer shows which operation; when only one GPU does it, \
     suspect that GPU";
const ASSERT_HINT: &str =
    "an index or a class label is out of range; CUDA_LAUNCH_BLOCKING=1 shows where";
const SPACE_HINT: &str = "free some space, or write to another disk (also see `df -i` and quotas)";
const HANG_HINT: &str =
    "one rank did not come to this operation: see which rank stepped last, and what it was doing";

const fn rule(
    class: Class,
    again: Again,
    weight: Weight,
    phrases: &'static [&'static str],
    hint: &'static str,
) -> Rule {
    Rule {
        phrases,
        weight,
        class,
        again,
        hint,
    }
}

pub const RULES: &[Rule] = &[
    rule(
        Class::GpuOutOfMemory,
        Fails,
        Anywhere,
        &[
            "CUDA out of memory.",
            "torch.OutOfMemoryError",
            "torch.cuda.OutOfMemoryError",
            "CUDA error: out of memory",
            "CUDA_ERROR_OUT_OF_MEMORY",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "CUDNN_STATUS_ALLOC_FAILED",
            "Cuda failure*out of memory",
            "HIP out of memory.",
        ],
        GPU_MEMORY_HINT,
    ),
    rule(
        Class::Config,
        Fails,
        Anywhere,
        &["Duplicate GPU detected"],
        "two ranks use one GPU: take the device from LOCAL_RANK, and start no more ranks than GPUs",
    ),
    rule(
        Class::Hardware,
        Elsewhere,
        Anywhere,
        &[
            "uncorrectable ECC error",
            "CUDA_ERROR_ECC_UNCORRECTABLE",
            "uncorrectable NVLink error",
            "GPU is lost",
            "has fallen off the bus",
        ],
        REPAIR_HINT,
    ),
    rule(
        Class::Hardware,
        Elsewhere,
        Anywhere,
        &[
            "Driver/library version mismatch",
            "driver on your system is too old",
            "CUDA driver version is insufficient",
            "Found no NVIDIA driver",
            "no CUDA-capable device is detected",
            "Unexpected error from cudaGetDeviceCount",
            "unsupported display driver / cuda driver combination",
            "CUDA error: unknown error",
        ],
        DRIVER_HINT,
    ),
    rule(
        Class::Hardware,
        Elsewhere,
        Anywhere,
        &["system not yet initialized"],
        "the fabric manager of this node does not run: systemctl status nvidia-fabricmanager",
    ),
    rule(
        Class::Hardware,
        Elsewhere,
        Anywhere,
        &["CUDA-capable device*busy or unavailable"],
        "another process has the GPU for itself: see nvidia-smi, and its compute mode",
    ),
    rule(
        Class::Config,
        Fails,
        Anywhere,
        &[
            "no kernel image is available",
            "PTX was compiled with an unsupported toolchain",
        ],
        "the program was not built for this GPU: install a build for its compute capability",
    ),
    rule(
        Class::Config,
        Fails,
        Anywhere,
        &["CUDA error: invalid device ordinal"],
        "the program asks for a GPU that is not there: take the device from LOCAL_RANK",
    ),
    // The kernel's own line names the condition; the exception follows it.
    rule(
        Class::Program,
        MayWork,
        Anywhere,
        &["thread: [*] Assertion `"],
        ASSERT_HINT,
    ),
    rule(
        Class::Program,
        MayWork,
        Anywhere,
        &["device-side assert triggered"],
        ASSERT_HINT,
    ),
    rule(
        Class::Program,
        MayWork,
        Anywhere,
        &[
            "an illegal memory access was encountered",
            "CUDA_ERROR_ILLEGAL_ADDRESS",
            "CUDA error: misaligned address",
            "an illegal instruction was encountered",
            "CUDA error: unspecified launch failure",
        ],
        SANITIZE_HINT,
    ),
    rule(
        Class::OutOfMemory,
        MayWork,
        Anywhere,
        &[
            "out of shared memory",
            "insufficient shared memory",
            "</torch_*No space left on device",
            "unable to allocate shared memory",
            "/dev/shm*No space left on device",
            "creating shared memory segment",
            "DataLoader worker*Bus error",
        ],
        SHM_HINT,
    ),
    rule(
        Class::Program,
        MayWork,
        AtEnd,
        &[
            "Too many open files",
            "EMFILE",
            "received 0 items of ancdata",
        ],
        "raise the limit (`ulimit -n`), or find what leaves files open; with PyTorch's loader, \
        torch.multiprocessing.set_sharing_strategy('file_system') needs fewer",
    ),
    rule(
        Class::DiskFull,
        MayWork,
        AtEnd,
        &[
            "No space left on device",
            "Disk quota exceeded",
            "ENOSPC",
            "EDQUOT",
            "File too large",
            "Read-only file system",
        ],
        SPACE_HINT,
    ),
    rule(
        Class::Data,
        MayWork,
        AtEnd,
        &[
            "Stale file handle",
            "Input/output error",
            "Transport endpoint is not connected",
        ],
        "the file server or the disk did not answer: see the mount, and the kernel's log of this node",
    ),
    rule(
        Class::Network,
        MayWork,
        AtEnd,
        &["Address already in use", "EADDRINUSE"],
        "another process has the port: do not set MASTER_PORT, the launcher finds a free one",
    ),
    rule(
        Class::Program,
        Fails,
        Anywhere,
        &[
            "error while loading shared libraries: ",
            "cannot open shared object file",
            "undefined symbol: ",
        ],
        "a library is missing or of another version: see LD_LIBRARY_PATH and `ldd` on this node",
    ),
    rule(
        Class::Program,
        Fails,
        InWords,
        &["ModuleNotFoundError: ", "ImportError: "],
        "install it into the Python that runs on this node, or add its folder to PYTHONPATH",
    ),
    rule(
        Class::Program,
        Fails,
        InWords,
        &["SyntaxError: ", "IndentationError: ", "TabError: "],
        "correct the program, or run it with the Python it was written for",
    ),
    rule(
        Class::OutOfMemory,
        MayWork,
        AtEnd,
        &[
            "MemoryError",
            "std::bad_alloc",
            "can't allocate memory",
            "Cannot allocate memory",
            "memory allocation of*bytes failed",
            "DataLoader worker*killed by signal: Killed",
        ],
        MEMORY_HINT,
    ),
    rule(
        Class::Config,
        Fails,
        Anywhere,
        &[
            ": can't open file '",
            "error: unrecognized arguments: ",
            "error: the following arguments are required: ",
        ],
        "correct the command",
    ),
    rule(
        Class::Data,
        Fails,
        AtEnd,
        &[
            "FileNotFoundError: ",
            "NotADirectoryError: ",
            "IsADirectoryError: ",
            "No such file or directory",
        ],
        "see whether the path is right, and mounted on this node",
    ),
    rule(
        Class::Data,
        Fails,
        InWords,
        &[
            "PytorchStreamReader failed",
            "BadZipFile: ",
            "UnpicklingError: ",
            "UnidentifiedImageError: ",
            "SafetensorError: ",
            "EOFError: Ran out of input",
        ],
        "the file is broken or not of this kind: copy it again",
    ),
    rule(
        Class::Config,
        Fails,
        AtEnd,
        &[
            "PermissionError: ",
            "Permission denied",
            "Operation not permitted",
        ],
        "see who owns the path, and as whom the job runs on this node",
    ),
    rule(
        Class::Diverged,
        Fails,
        Anywhere,
        &[
            "Loss is nan",
            "Loss is inf",
            "loss is not finite",
            "returned nan values",
        ],
        "a lower learning rate, a longer warmup or gradient clipping may help",
    ),
    rule(
        Class::Killed,
        MayWork,
        InWords,
        &["KeyboardInterrupt", "SignalException: "],
        "see who did: the scheduler at the end of its time, or another program",
    ),
    rule(
        Class::Hang,
        MayWork,
        Anywhere,
        &[
            "Watchdog caught collective operation timeout",
            "Timed out waiting*for recv operation",
            "Timed out waiting*for send operation",
            "failed to pass monitoredBarrier",
            "Application timeout caused pair closure",
            "watchdog got stuck for",
            "Heartbeat monitor timed out",
        ],
        HANG_HINT,
    ),
    rule(
        Class::Network,
        MayWork,
        Anywhere,
        &LOST_PEER,
        LOST_PEER_HINT,
    ),
    rule(
        Class::Network,
        MayWork,
        Anywhere,
        &[
            "ncclSystemError",
            "unhandled system error",
            "ncclInternalError",
            "Got completion from peer",
            "socketStartConnect: Connect to",
            "client socket has timed out",
            "client socket has failed to connect",
            "connectFullMesh failed",
            "could not meet the other",
        ],
        "see whether the nodes reach each other over NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO tells more",
    ),
    rule(
        Class::Network,
        MayWork,
        AtEnd,
        &[
            "Connection refused",
            "Connection reset by peer",
            "Connection timed out",
            "No route to host",
            "Network is unreachable",
            "Name or service not known",
            "Temporary failure in name resolution",
        ],
        "see whether the nodes reach each other, and resolve each other's names",
    ),
    rule(
        Class::Unknown,
        MayWork,
        Anywhere,
        &["ncclUnhandledCudaError", "unhandled cuda error"],
        "NCCL_DEBUG=INFO tells which call to CUDA failed",
    ),
];
