//! `tsm-launch`: starts the workers of a distributed training job, watches them, and ends them all
//! when one fails.
//!
//! ```text
//! cli -> target (what) -> launch, start (which nodes: here, ssh, SLURM, MPI, by hand) -> session
//!
//! session: what was heard -> cluster/coordinator (what the job does next, pure) -> messages, words, files
//!            ^  | cluster/link, wire: one authenticated connection per node
//!            |  v
//! agent:   watch (what happened, in order) -> supervisor (what the node does, pure) -> process (do it)
//!          contain (what holds their processes, so that none survives)
//!          logs, console (their output)       blame (who was first), class (of what) -> report
//!
//! beside:  doctor (may a node run this), hang (who is late, and what they do),
//!          folder, manifest, status (what others may read while it runs, and afterwards)
//! ```

#![cfg_attr(
    not(test),
    deny(clippy::print_stdout, clippy::print_stderr, reason = "see say")
)]

pub mod addresses;
mod ahead;
mod blame;
mod class;
pub mod cli;
mod clock;
pub mod cluster;
mod console;
pub mod contain;
pub mod cores;
pub mod doctor;
mod end;
mod folder;
mod gpus;
pub mod hang;
mod launch;
pub mod limits;
mod logs;
mod machine;
pub mod manifest;
mod median;
mod oom;
pub mod own;
pub mod plan;
pub mod port;
pub mod process;
mod replace;
mod report;
mod say;
mod session;
mod shim;
mod signals;
pub mod start;
mod stat;
mod status;
mod supervisor;
mod target;
mod text;
mod watch;

use clap::Parser;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;
use tsm_job::exit;

/// The whole program: parse, run, and map errors to exit codes.
pub fn main() -> ExitCode {
    let start = Instant::now();
    own::take_name();
    signals::outlive_file_limit();
    let mut argv = std::env::args_os().skip(1);
    match argv.next().as_deref().and_then(|first| first.to_str()) {
        Some(shim::WORKER) => return shim::worker(argv),
        Some(shim::GUARD) => return shim::guard(argv),
        Some(shim::ENTER) => return shim::enter(argv),
        Some(start::agent::AGENT) => {
            return run(
                |args: &start::agent::Args| start::agent::main(args, start),
                1,
            );
        }
        Some("key") => return run(key, 1),
        Some("slurm") => {
            return run(
                |args: &start::slurm::Submit| args.execute(&start::slurm::Slurm::default()),
                1,
            );
        }
        Some("doctor") => return run(|args: &Doctor| doctor::cli::run(&args.args), 1),
        _ => {}
    }
    run(|args: &cli::Args| launch::launch(args, start), 0)
}

/// Says whether this machine can run a job, and what to do where it cannot.
#[derive(clap::Parser)]
#[command(name = "tsm-launch doctor", bin_name = "tsm-launch doctor")]
struct Doctor {
    #[command(flatten)]
    args: doctor::cli::Args,
}

/// Makes a key for a job, in a file of its own.
#[derive(clap::Parser)]
#[command(name = "tsm-launch key", bin_name = "tsm-launch key")]
struct KeyArgs {
    /// It must not exist yet.
    file: std::path::PathBuf,
}

fn key(args: &KeyArgs) -> anyhow::Result<i32> {
    cluster::key::Key::random().write_file(&args.file)?;
    Ok(exit::OK)
}

/// Parses the command line without its first `skip` arguments, and runs what it asks for.
fn run<A: Parser>(what: impl FnOnce(&A) -> anyhow::Result<i32>, skip: usize) -> ExitCode {
    let mut argv: Vec<_> = std::env::args_os().collect();
    let skipped = 1..(1 + skip).min(argv.len());
    argv.drain(skipped);
    let args = match A::try_parse_from(&argv) {
        Ok(args) => args,
        Err(e) => {
            let _ = e.print();
            // `train.py --lr 1`: what is not known is an option of the program.
            let is_unknown = e.kind() == clap::error::ErrorKind::UnknownArgument;
            let mut words = argv.iter().skip(1).take_while(|word| *word != "--");
            if let Some(text) = words.find_map(|w| target::not_a_config(w).filter(|_| is_unknown)) {
                say::tell(format_args!("error: {text}"));
            }
            return to_exit_code(if e.use_stderr() {
                exit::USAGE
            } else {
                exit::OK
            });
        }
    };
    // A bug of the launcher must not look like a failure of the job; the guard ends the workers.
    let result = catch_unwind(AssertUnwindSafe(|| what(&args)));
    to_exit_code(match result {
        Ok(Ok(code)) => code,
        Ok(Err(e)) => {
            say::tell(format_args!("error: {e:#}"));
            exit::code_of(&e)
        }
        Err(_) => exit::BUG,
    })
}

fn to_exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
