//! `tsm-bench step`: our training step and PyTorch's, in turn, as a ratio.

use crate::machine;
use crate::pytorch::{self, Variant};
use crate::stats::Spread;
use crate::worker::{self, Timed};
use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;
use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Parser)]
pub struct Args {
    #[command(flatten)]
    step: worker::Args,
    /// Processes that share the step.
    #[arg(long, default_value_t = 1)]
    ranks: u32,
    /// CPU threads of each process; default: the cores divided by the ranks.
    #[arg(long)]
    threads: Option<usize>,
    /// Times that each side is started afresh, in turn.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// A Python that has PyTorch, to measure it beside ours.
    #[arg(long, value_name = "PYTHON")]
    against: Option<PathBuf>,
    /// File for the result as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// File for the result as a Markdown table; rows are added to a file that exists.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    form: String,
    /// Milliseconds of a step; for PyTorch over the medians of its processes.
    step_ms: Spread,
    clips_per_s: f64,
    /// Of rank 0, the largest over the processes; see [`Timed`].
    peak_bytes: Option<u64>,
    /// Ours / this row's, in clips/s.
    ratio: f64,
}

#[derive(Serialize)]
struct Report {
    benchmark: &'static str,
    unix_s: u64,
    cpu: String,
    gpu: Option<String>,
    cores: usize,
    version: &'static str,
    commit: Option<String>,
    pytorch: Option<String>,
    flags: Vec<String>,
    ranks: u32,
    threads: usize,
    rounds: usize,
    rows: Vec<Row>,
}

/// Measures, prints the table, and writes the files asked for.
pub fn run(args: &Args) -> Result<()> {
    ensure!(
        args.ranks > 0 && args.rounds > 0 && args.step.steps > 0,
        "--ranks, --rounds and --steps start at 1"
    );
    let cores = std::thread::available_parallelism()?.get();
    let threads = args.threads.unwrap_or((cores / args.ranks as usize).max(1));
    let variants = match &args.against {
        Some(_) => vec![Variant::best(&args.step), Variant::as_shipped(&args.step)],
        None => Vec::new(),
    };
    let mut ours = Side::default();
    let mut theirs: Vec<Side> = variants.iter().map(|_| Side::default()).collect();
    let (mut version, mut gpu) = (None, None);
    for round in 1..=args.rounds {
        let timed = our_step(args, threads)?;
        eprintln!(
            "round {round}: tsm-launch {:.1} ms",
            Spread::of(&timed.step_ms)
                .context("no step was timed")?
                .median
        );
        ours.add(&timed.step_ms, Some(timed.peak_bytes));
        gpu = timed.gpu;
        if let Some(python) = &args.against {
            for (variant, side) in variants.iter().zip(&mut theirs) {
                let measured = pytorch::measure(python, variant, &args.step, args.ranks, threads)?;
                eprintln!(
                    "round {round}: {} {:.1} ms",
                    variant.name, measured.median_ms
                );
                side.add(&[measured.median_ms], measured.peak_bytes);
                version = Some(measured.version);
            }
        }
    }
    let clips = f64::from(args.ranks * args.step.clips);
    let form = format!(
        "{} {}, one-op shift, fused SGD",
        worker::word(&args.step.precision),
        worker::word(&args.step.layout)
    );
    let mut rows = vec![ours.row("tsm-launch", form, clips, None)?];
    let base = rows[0].clips_per_s;
    for (variant, side) in variants.iter().zip(&theirs) {
        rows.push(side.row(variant.name, variant.describe(), clips, Some(base))?);
    }
    let report = Report {
        benchmark: "step",
        unix_s: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        cpu: machine::cpu_model(),
        gpu,
        cores,
        version: env!("CARGO_PKG_VERSION"),
        commit: machine::commit(),
        pytorch: version,
        flags: args.step.to_flags(),
        ranks: args.ranks,
        threads,
        rounds: args.rounds,
        rows,
    };
    let table = markdown(&report, args);
    print!("{table}");
    if let Some(file) = &args.json {
        fs_err::write(file, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    if let Some(file) = &args.markdown {
        let before = fs_err::read_to_string(file).unwrap_or_default();
        fs_err::write(
            file,
            if before.is_empty() {
                table
            } else {
                before + "\n" + &table
            },
        )?;
    }
    Ok(())
}

/// What the processes of one side measured.
#[derive(Default)]
struct Side {
    step_ms: Vec<f64>,
    peak_bytes: Option<u64>,
}

impl Side {
    fn add(&mut self, step_ms: &[f64], peak_bytes: Option<u64>) {
        self.step_ms.extend(step_ms);
        self.peak_bytes = self.peak_bytes.max(peak_bytes);
    }

    /// `clips` of a step over all ranks; `ours` in clips/s, `None` for ours itself.
    fn row(&self, name: &str, form: String, clips: f64, ours: Option<f64>) -> Result<Row> {
        let step_ms = Spread::of(&self.step_ms).context("no step was timed")?;
        let clips_per_s = clips * 1e3 / step_ms.median;
        let ratio = ours.map_or(1.0, |ours| ours / clips_per_s);
        Ok(Row {
            name: name.into(),
            form,
            ratio,
            clips_per_s,
            peak_bytes: self.peak_bytes,
            step_ms,
        })
    }
}

/// Starts the ranks, waits for all, returns what rank 0 measured.
fn our_step(args: &Args, threads: usize) -> Result<Timed> {
    let exe = std::env::current_exe()?;
    // Held only while the number is looked up; rank 0 binds it again at once.
    let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
    let mut children: Vec<Child> = Vec::new();
    for rank in 0..args.ranks {
        let mut command = Command::new(&exe);
        command
            .arg("__step")
            .args(args.step.to_flags())
            .stdin(Stdio::null());
        command.stdout(if rank == 0 {
            Stdio::piped()
        } else {
            Stdio::null()
        });
        for (name, value) in [
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", rank.to_string()),
            ("WORLD_SIZE", args.ranks.to_string()),
            ("LOCAL_WORLD_SIZE", args.ranks.to_string()),
            ("MASTER_ADDR", "127.0.0.1".into()),
            ("MASTER_PORT", port.to_string()),
            ("OMP_NUM_THREADS", threads.to_string()),
            ("GLOO_SOCKET_IFNAME", "lo".into()),
            ("NCCL_SOCKET_IFNAME", "lo".into()),
        ] {
            command.env(name, value);
        }
        children.push(command.spawn().context("cannot start a rank")?);
    }
    let mut first = None;
    for (rank, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "rank {rank} ended with {}",
            output.status
        );
        if rank == 0 {
            first = Some(serde_json::from_slice(&output.stdout).context("the times of rank 0")?);
        }
    }
    first.context("no rank was started")
}

fn markdown(report: &Report, args: &Args) -> String {
    let mut out = String::new();
    let step = &args.step;
    let _ = writeln!(
        out,
        "## TSM {} {} px, {} frames, {} clips x {} ranks, {} thread(s) a rank\n",
        worker::word(&step.arch),
        step.size,
        step.segments,
        step.clips,
        report.ranks,
        report.threads
    );
    let _ = writeln!(
        out,
        "{}{}, {} cores; tsm-launch {}{}{}. {} fresh processes a side in turn, {} steps each after {} for warm-up; a PyTorch row is over its processes' medians.\n",
        report
            .gpu
            .as_ref()
            .map(|g| format!("{g}; "))
            .unwrap_or_default(),
        report.cpu,
        report.cores,
        report.version,
        report
            .commit
            .as_ref()
            .map(|c| format!(" ({c})"))
            .unwrap_or_default(),
        report
            .pytorch
            .as_ref()
            .map(|v| format!("; PyTorch {v}"))
            .unwrap_or_default(),
        report.rounds,
        step.steps,
        step.warmup
    );
    out.push_str("| | form | clips/s | ms a step, median | mean +- sd | min-max | peak GB | ours / this |\n|---|---|---|---|---|---|---|---|\n");
    for row in &report.rows {
        let s = &row.step_ms;
        let _ = writeln!(
            out,
            "| {} | {} | {:.2} | {:.1} | {:.1} +- {:.1} | {:.1}-{:.1} | {} | {:.2} |",
            row.name,
            row.form,
            row.clips_per_s,
            s.median,
            s.mean,
            s.sd,
            s.min,
            s.max,
            row.peak_bytes
                .map_or("-".into(), |b| format!("{:.2}", b as f64 / 1e9)),
            row.ratio
        );
    }
    out
}
