//! What the NVIDIA driver writes to the kernel's log when a GPU fails.
//!
//! Meanings and remedies follow NVIDIA's catalog (docs.nvidia.com/deploy/xid-errors), for Ampere and later.

/// Whom a kind of Xid accuses, the gravest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// It follows from something else: the end of a process, or another Xid.
    Consequence,
    /// The program did what it must not.
    Program,
    /// The GPU corrected it, and can be used on.
    Repaired,
    /// The GPU or its links cannot be used before somebody has seen to them.
    Node,
}

/// One kind of Xid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xid {
    pub number: u32,
    pub fault: Fault,
    pub meaning: &'static str,
    /// To follow "leave this node out until".
    pub remedy: &'static str,
}

const RESET: &str = "the GPU is reset (`nvidia-smi --gpu-reset`); if it comes back, ask the vendor";
const REBOOT: &str = "the machine is rebooted and the GPU's seat, power and cooling are checked";
const LINKS: &str = "the GPU is reset and its NVLink bridges or fabric manager are checked";
const SANITIZER: &str = "compute-sanitizer, or CUDA_LAUNCH_BLOCKING=1, shows which kernel; when only one GPU does it, \
                         suspect that GPU";
const NOTHING: &str = "look at the line before it";

const fn xid(number: u32, fault: Fault, meaning: &'static str, remedy: &'static str) -> Xid {
    Xid {
        number,
        fault,
        meaning,
        remedy,
    }
}

const KINDS: &[Xid] = &[
    xid(
        13,
        Fault::Program,
        "a kernel accessed memory out of bounds or raised an exception",
        SANITIZER,
    ),
    xid(
        31,
        Fault::Program,
        "a kernel accessed an address that is not mapped",
        SANITIZER,
    ),
    xid(
        32,
        Fault::Program,
        "the commands sent to the GPU were corrupt",
        SANITIZER,
    ),
    xid(
        43,
        Fault::Program,
        "a channel stopped after an error of the program",
        SANITIZER,
    ),
    xid(
        44,
        Fault::Consequence,
        "a fault while switching contexts",
        NOTHING,
    ),
    xid(
        45,
        Fault::Consequence,
        "the driver cleaned up after a process that ended",
        NOTHING,
    ),
    xid(46, Fault::Node, "the GPU stopped processing", RESET),
    xid(
        48,
        Fault::Node,
        "memory of the GPU has an error that cannot be corrected (double-bit ECC)",
        RESET,
    ),
    xid(
        54,
        Fault::Node,
        "the GPU's power cable is not connected",
        REBOOT,
    ),
    xid(62, Fault::Node, "the GPU's micro-controller halted", RESET),
    xid(
        63,
        Fault::Repaired,
        "a broken row of GPU memory was replaced; a reset makes it take effect",
        RESET,
    ),
    xid(
        64,
        Fault::Node,
        "a broken row of GPU memory could not be replaced",
        RESET,
    ),
    xid(
        69,
        Fault::Program,
        "the GPU's graphics engine was misused",
        SANITIZER,
    ),
    xid(74, Fault::Node, "an NVLink failed", LINKS),
    xid(
        79,
        Fault::Node,
        "the GPU has fallen off the PCIe bus",
        REBOOT,
    ),
    xid(
        92,
        Fault::Repaired,
        "many memory errors were corrected",
        RESET,
    ),
    xid(
        94,
        Fault::Repaired,
        "a memory error was contained to the process that was ended",
        RESET,
    ),
    xid(95, Fault::Node, "a memory error was not contained", RESET),
    xid(
        109,
        Fault::Node,
        "the GPU did not switch contexts in time",
        RESET,
    ),
    xid(110, Fault::Node, "a security fault", RESET),
    xid(
        119,
        Fault::Node,
        "the GPU's system processor (GSP) does not answer",
        RESET,
    ),
    xid(
        120,
        Fault::Node,
        "the GPU's system processor (GSP) failed",
        RESET,
    ),
    xid(
        121,
        Fault::Repaired,
        "the link between CPU and GPU had an error",
        RESET,
    ),
    xid(136, Fault::Node, "an NVLink could not be trained", LINKS),
    xid(
        137,
        Fault::Program,
        "a kernel accessed memory of another GPU that is not mapped",
        SANITIZER,
    ),
    xid(
        140,
        Fault::Node,
        "memory of the GPU has an error that could not be recovered",
        RESET,
    ),
    xid(143, Fault::Node, "the GPU could not be initialized", RESET),
    xid(155, Fault::Node, "an NVLink failed", LINKS),
    xid(
        156,
        Fault::Node,
        "a broken part of the GPU was taken out of service",
        RESET,
    ),
    xid(158, Fault::Node, "the GPU did not answer in time", RESET),
    xid(
        167,
        Fault::Node,
        "the PCIe link did not answer in time",
        REBOOT,
    ),
    xid(
        171,
        Fault::Node,
        "memory of the GPU has an error that cannot be corrected",
        RESET,
    ),
    xid(
        172,
        Fault::Node,
        "a cache of the GPU has an error that cannot be corrected",
        RESET,
    ),
];

/// NVLink errors of Blackwell say in their text whether they are fatal.
const NVLINK5: std::ops::RangeInclusive<u32> = 144..=150;

/// The number in `NVRM: Xid (PCI:0000:9b:00): 94, pid=1234, name=python3, Contained ECC error`.
pub fn number(line: &str) -> Option<u32> {
    let (_, rest) = line.split_once("Xid (")?;
    let (_, rest) = rest.split_once("): ")?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    rest[..digits].parse().ok()
}

/// What a line of the kernel's log says about a GPU; `None` where it is of no kind known here.
pub fn kind(line: &str) -> Option<Xid> {
    let known = |n: u32| KINDS.iter().find(|xid| xid.number == n).copied();
    match number(line) {
        Some(n) if NVLINK5.contains(&n) => {
            let fatal = line.contains(" Fatal ");
            let fault = if fatal { Fault::Node } else { Fault::Repaired };
            Some(xid(n, fault, "an NVLink had an error", LINKS))
        }
        Some(154) => {
            let (_, now) = line.rsplit_once(" to ")?;
            [
                "(GPU Reset Required)",
                "(Node Reboot Required)",
                "(Drain and Reset)",
            ]
            .iter()
            .any(|action| now.contains(action))
            .then(|| {
                xid(
                    154,
                    Fault::Node,
                    "the driver asks for a reset of the GPU",
                    RESET,
                )
            })
        }
        Some(n) => known(n),
        // Newer drivers split the message, and leave the number away.
        None if line.contains("fallen off the bus") => known(79),
        None => None,
    }
}

/// The gravest of `lines`, the first of them where several are.
pub fn worst(lines: &[String]) -> Option<(&str, Xid)> {
    let known = lines
        .iter()
        .filter_map(|line| Some((line.as_str(), kind(line)?)));
    known.reduce(|worst, next| {
        if next.1.fault > worst.1.fault {
            next
        } else {
            worst
        }
    })
}
