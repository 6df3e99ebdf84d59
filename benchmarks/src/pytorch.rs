//! The other side: `peers/pytorch_step.py` under any Python that has PyTorch.

use crate::worker::{Args, DeviceName, Layout, PrecisionName, word};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One way in which PyTorch takes the step.
#[derive(Clone, Debug)]
pub struct Variant {
    pub name: &'static str,
    precision: String,
    layout: &'static str,
    shift: &'static str,
    optimizer: &'static str,
}

impl Variant {
    /// The same precision and layout as ours, a one-pass shift, fused SGD: PyTorch at its best without a compiler.
    pub fn best(args: &Args) -> Variant {
        let layout = if args.layout == Layout::Nhwc {
            "nhwc"
        } else {
            "nchw"
        };
        let precision = match args.precision {
            // The script's fp16 is autocast; it has nothing like o2.
            PrecisionName::O2 => "fp16".into(),
            PrecisionName::Fp32 => fp32(args).into(),
            other => word(&other),
        };
        Variant {
            name: "PyTorch, tuned",
            precision,
            layout,
            shift: "onepass",
            optimizer: "fused",
        }
    }

    /// As the published code bases run it: float32, contiguous, slice and concatenate.
    pub fn as_shipped(args: &Args) -> Variant {
        Variant {
            name: "PyTorch, as shipped",
            precision: fp32(args).into(),
            layout: "nchw",
            shift: "cat",
            optimizer: "foreach",
        }
    }

    pub fn describe(&self) -> String {
        format!(
            "{} {} {} shift, {} SGD",
            self.precision, self.layout, self.shift, self.optimizer
        )
    }
}

/// The script's word for float32 as our trainer and PyTorch's defaults compute it: on a GPU with TF32.
fn fp32(args: &Args) -> &'static str {
    match args.device {
        DeviceName::Cpu => "fp32",
        DeviceName::Gpu => "tf32",
    }
}

/// One run of the script.
pub struct Measured {
    pub median_ms: f64,
    pub peak_bytes: Option<u64>,
    /// PyTorch's version.
    pub version: String,
}

/// The script, in the source tree this program was built from or beside the current directory.
pub fn script() -> Result<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/pytorch_step.py");
    let here = PathBuf::from("benchmarks/peers/pytorch_step.py");
    [built, here]
        .into_iter()
        .find(|p| p.is_file())
        .context("benchmarks/peers/pytorch_step.py is not here; run from the root of the checkout")
}

/// Measures `variant` in one fresh run of the script.
pub fn measure(
    python: &Path,
    variant: &Variant,
    args: &Args,
    ranks: u32,
    threads: usize,
) -> Result<Measured> {
    let out = tempfile::Builder::new().suffix(".json").tempfile()?;
    let mut command = Command::new(python);
    if ranks > 1 {
        command.args([
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            &ranks.to_string(),
        ]);
    }
    command.arg(script()?);
    let arch = word(&args.arch);
    for (flag, value) in [
        ("--models", arch.as_str()),
        ("--sizes", &args.size.to_string()),
        ("--clips", &args.clips.to_string()),
        ("--segments", &args.segments.to_string()),
        ("--engines", "eager"),
        ("--precisions", &variant.precision),
        ("--layouts", variant.layout),
        ("--shifts", variant.shift),
        ("--optimizers", variant.optimizer),
        ("--rounds", "1"),
        ("--warmup", &args.warmup.to_string()),
        ("--steps", &args.steps.to_string()),
        ("--threads", &threads.to_string()),
        ("--json", &out.path().display().to_string()),
    ] {
        command.args([flag, value]);
    }
    if args.device == DeviceName::Cpu {
        // The script takes a GPU wherever it sees one.
        command.env("CUDA_VISIBLE_DEVICES", "");
    }
    command
        .env("OMP_NUM_THREADS", threads.to_string())
        .env("GLOO_SOCKET_IFNAME", "lo")
        .stdin(Stdio::null());
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", python.display()))?;
    ensure!(
        output.status.success(),
        "{} {}: {}\n{}",
        python.display(),
        variant.describe(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let text = fs_err::read_to_string(out.path())?;
    let result: Value = serde_json::from_str(&text).context("the result of pytorch_step.py")?;
    let row = &result["rows"][0];
    Ok(Measured {
        median_ms: row["step_ms"]
            .as_f64()
            .context("pytorch_step.py measured no row")?,
        peak_bytes: row["peak_bytes"].as_u64(),
        version: result["machine"]["torch"]
            .as_str()
            .unwrap_or("unknown")
            .to_owned(),
    })
}
