//! `tsm-launch doctor`.

use anyhow::Context as _;
use serde_json::json;
use std::io::IsTerminal;
use std::path::PathBuf;
use tsm_job::RunDir;
use tsm_job::exit;

use super::preflight::{self, GpuTask, Scale};
use super::{Context, facts, print};
use crate::cli::Gpus;
use crate::cluster::message::{Finding, Severity};
use crate::own::{self, Executable};
use crate::plan::{self, Devices};
use crate::target::is_executable;
use crate::{gpus, manifest, say};

/// Says whether this machine can run a job, and what to do where it cannot.
#[derive(clap::Args, Clone, Debug)]
#[command(group(clap::ArgGroup::new("doctor_device").args(["gpus", "cpus"])))]
pub struct Args {
    /// Look at N GPUs, all visible ones (`auto`), or those listed (`0,1,3`) [default: all visible ones].
    #[arg(long, value_name = "N|auto|LIST")]
    pub gpus: Option<Gpus>,

    /// Judge by what N workers on the CPU need.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub cpus: Option<u32>,

    /// The folder that a run would use [default: runs].
    #[arg(long, value_name = "PATH")]
    pub run_dir: Option<PathBuf>,

    /// Look only (quick: less than a second), or measure memory, network and GPUs too (full: some seconds).
    #[arg(long, value_name = "HOW", value_enum, default_value = "quick")]
    pub preflight: Preflight,

    /// Measure with this program instead of the tsm-trainer beside tsm-launch.
    #[arg(long, value_name = "PATH")]
    pub trainer: Option<PathBuf>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Preflight {
    Quick,
    Full,
}

/// Prints what is found about this node. The exit code is [`exit::PREFLIGHT`] where a job would fail.
///
/// # Errors
/// When nothing can be printed, see [`say::print`].
pub fn run(args: &Args) -> anyhow::Result<i32> {
    let color = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (text, code) = report(args, color)?;
    say::print(&text)?;
    Ok(code)
}

/// The text to print, and the exit code.
fn report(args: &Args, color: bool) -> anyhow::Result<(String, i32)> {
    let visible = gpus::visible();
    let (devices, refused) = match (&args.gpus, args.cpus) {
        (None, None) => (Devices::Gpus(visible), None),
        (wanted, cpus) => match plan::devices(wanted.as_ref(), cpus, None, || visible.clone()) {
            Ok(devices) => (devices, None),
            Err(e) => (Devices::Gpus(visible.clone()), Some(refusal(&e.message))),
        },
    };
    let (gpus, num_ranks) = match &devices {
        Devices::Cpu(n) => (Vec::new(), *n),
        Devices::Gpus(gpus) => (gpus.clone(), gpus.len().max(1) as u32),
    };
    let trainer = match &args.trainer {
        Some(path) => std::path::absolute(path)?,
        None => own::path()
            .context("cannot find the trainer")?
            .with_file_name("tsm-trainer"),
    };
    let folder = args.run_dir.clone().unwrap_or("runs".into());
    let context = Context {
        num_ranks,
        folders: vec![folder.clone(), RunDir::new(&folder).checkpoints()],
        trainer: Some(trainer.clone()),
        gpus,
    };
    let mut facts = facts(&context);
    facts.findings.extend(refused);
    if args.preflight == Preflight::Full {
        let own = preflight::own_node(&Scale::default());
        facts.findings.extend(own.findings);
        let is_meant = args.trainer.is_some();
        let found = all_reduce(devices, Executable::own()?, trainer, is_meant);
        facts.findings.extend(found);
    }
    let failed = facts.findings.iter().any(|f| f.severity == Severity::Error);
    let text = if args.json {
        let all = json!({ "host": manifest::host(), "version": env!("CARGO_PKG_VERSION"), "gpus": context.gpus, "facts": facts });
        serde_json::to_string_pretty(&all)? + "\n"
    } else {
        print(&facts.findings, color)
    };
    Ok((text, if failed { exit::PREFLIGHT } else { exit::OK }))
}

/// What the devices do together. `is_meant`: the user named the trainer, so it has to be there.
fn all_reduce(
    devices: Devices,
    launcher: Executable,
    trainer: PathBuf,
    is_meant: bool,
) -> Vec<Finding> {
    if is_executable(&trainer) {
        let scale = Scale {
            trainer: Some(trainer),
            ..Scale::default()
        };
        return preflight::own_gpus(&GpuTask::alone(devices, launcher, &scale), || false).findings;
    }
    // Memory and loopback say enough about CPUs.
    if !is_meant && (devices.is_empty() || matches!(devices, Devices::Cpu(_))) {
        return Vec::new();
    }
    let text = format!("not measured: {} is not a program", trainer.display());
    let hint = "build it (cargo build --release -p tsm-trainer), or name it with --trainer PATH";
    vec![match is_meant {
        true => Finding::error("all-reduce", text, hint),
        false => Finding::warning("all-reduce", text, hint),
    }]
}

/// `cannot start ...\n  hint: ...`
fn refusal(message: &str) -> Finding {
    let (text, hint) = message
        .split_once("\n  hint: ")
        .unwrap_or((message, "check --gpus"));
    Finding::error("gpu", text, hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Doctor {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Doctor::try_parse_from(line.split(' ')).map(|d| d.args)
    }

    #[test]
    fn the_words_of_the_command() {
        let args = parse("doctor --gpus 8 --run-dir /x --preflight full --json").unwrap();
        assert_eq!(
            (args.gpus, args.preflight, args.json),
            (Some(Gpus::Count(8)), Preflight::Full, true)
        );
        assert_eq!(parse("doctor").unwrap().preflight, Preflight::Quick);
        assert!(parse("doctor --gpus 1 --cpus 1").is_err());
        assert!(parse("doctor --preflight half").is_err());
    }

    #[test]
    fn a_missing_trainer_is_an_error_only_where_it_was_named() {
        let gpu = crate::gpus::Gpu {
            id: "0".into(),
            name: "NVIDIA H200".into(),
            uuid: "GPU-0".into(),
        };
        let found = |devices: Devices, is_meant| {
            let found = all_reduce(
                devices,
                Executable::at("launch".as_ref()),
                "/no/trainer".into(),
                is_meant,
            );
            found.first().map(|f| f.severity)
        };
        let (cpus, gpus) = (Devices::Cpu(2), Devices::Gpus(vec![gpu]));
        assert_eq!(found(cpus.clone(), true), Some(Severity::Error));
        assert_eq!(found(gpus.clone(), true), Some(Severity::Error));
        assert_eq!(found(gpus, false), Some(Severity::Warning));
        assert_eq!(found(cpus, false), None);
        assert_eq!(found(Devices::Gpus(Vec::new()), false), None);
    }

    #[test]
    fn what_a_launch_would_refuse_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let report = |words: &str| {
            let mut args = parse(words).unwrap();
            args.run_dir = Some(dir.path().join("run"));
            report(&args, false).unwrap()
        };
        let (text, code) = report("doctor --cpus 1 --json");
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(code, exit::OK, "{text}");
        assert!(
            json["facts"]["findings"]
                .as_array()
                .is_some_and(|all| !all.is_empty()),
            "{text}"
        );
        let (text, code) = report("doctor --gpus 4096");
        assert_eq!(code, exit::PREFLIGHT);
        assert!(
            text.starts_with("error    gpu      cannot start 4096 workers: --gpus is 4096, "),
            "{text}"
        );
        let finding = refusal("cannot start 9 workers: --gpus is 9\n  hint: give --gpus 8");
        assert_eq!(
            (finding.text.as_str(), finding.hint.as_str()),
            ("cannot start 9 workers: --gpus is 9", "give --gpus 8")
        );
    }
}
