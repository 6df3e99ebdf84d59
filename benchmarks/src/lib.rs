//! Measurements, each beside what people use today, interleaved in one run.

mod pytorch;
mod stats;
mod step;
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
    /// A full training step on synthetic input: forward, loss, backward, all-reduce, update.
    Step(step::Args),
    /// One rank of a measurement; started by the others.
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
        Command::Step(args) => step::run(&args),
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
