//! Measurements, each beside what people use today, interleaved in one run.

mod launch;
mod machine;
#[cfg(feature = "step")]
mod pytorch;
mod stats;
#[cfg(feature = "step")]
mod step;
#[cfg(feature = "step")]
mod worker;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use tsm_job::exit;

/// Measures tsm-launch, side by side with what people use today.
#[derive(Parser)]
#[command(name = "tsm-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The launcher beside torchrun, srun and mpirun: start, failures, restarts, joins, logs, memory.
    Launch(launch::Args),
    /// A full training step on synthetic input: forward, loss, backward, all-reduce, update.
    #[cfg(feature = "step")]
    Step(step::Args),
    /// Needs a build with libtorch.
    #[cfg(not(feature = "step"))]
    #[command(disable_help_flag = true)]
    Step {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
        flags: Vec<std::ffi::OsString>,
    },
    /// One rank of a measurement; started by the others.
    #[cfg(feature = "step")]
    #[command(name = "__step", hide = true)]
    Worker(worker::Args),
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let code = if e.use_stderr() {
                exit::USAGE
            } else {
                exit::OK
            };
            let _ = e.print();
            return ExitCode::from(code as u8);
        }
    };
    let outcome = match cli.command {
        Command::Launch(args) => launch::run(&args),
        #[cfg(feature = "step")]
        Command::Step(args) => step::run(&args),
        #[cfg(not(feature = "step"))]
        Command::Step { .. } => Err(without_libtorch().into()),
        #[cfg(feature = "step")]
        Command::Worker(args) => worker::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(exit::code_of(&e) as u8)
        }
    }
}

#[cfg(not(feature = "step"))]
fn without_libtorch() -> exit::Coded {
    let text = "this tsm-bench was built without libtorch, which a training step needs\n  hint: cargo build --release -p tsm-bench";
    exit::Coded::new(exit::PREFLIGHT, text)
}
