//! The command line of `tsm-trainer`.

use crate::train::{self, Ended};
use crate::{all_reduce, failure, preempt, report};
use anyhow::Context;
use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use tsm_job::exit::{self, Coded};
use tsm_job::message::AgentLink;
use tsm_job::{Config, RunDir, WorkerEnv};

/// Trains one rank of a job; `tsm-launch` starts one per GPU.
#[derive(Parser)]
#[command(name = "tsm-trainer", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// The job's configuration.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Changes to it, e.g. optim.lr=0.01.
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Put the results of several run folders into one table.
    Compare {
        #[arg(required = true, value_name = "RUN_DIR")]
        runs: Vec<PathBuf>,
    },
    /// Print the network of a configuration: shifted layers, parameters, multiply-adds.
    Model {
        #[arg(value_name = "CONFIG")]
        config: PathBuf,
        #[arg(value_name = "KEY=VALUE")]
        overrides: Vec<String>,
    },
    /// Measure how fast the ranks sum a tensor, and check every sum: tsm-launch --gpus 8 -- tsm-trainer all-reduce.
    AllReduce(all_reduce::Args),
}

/// Parses the command line, runs it and maps the outcome to an exit code of [`tsm_job::exit`].
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
    match cli.command {
        Some(Command::Compare { runs }) => finish(compare(&runs)),
        Some(Command::Model { config, overrides }) => finish(print_model(&config, &overrides)),
        Some(Command::AllReduce(args)) => {
            as_rank(|env, link| all_reduce::run(&args, env, link).map(|()| Ended::Finished))
        }
        None => worker(cli.config, &cli.overrides),
    }
}

fn worker(config: Option<PathBuf>, overrides: &[String]) -> ExitCode {
    if let Err(e) = preempt::listen() {
        return finish(Err(e).context("cannot start the thread that waits for signals"));
    }
    as_rank(|env, link| {
        let path = config
            .ok_or_else(|| Coded::new(exit::USAGE, "no configuration given\n  hint: tsm-trainer --config FILE, or tsm-launch FILE to start several ranks"))?;
        let config = load(&path, overrides)?;
        train::run(config, env, link)
    })
}

/// Does the work of one rank of a job, and ends the process.
fn as_rank(work: impl FnOnce(&WorkerEnv, &AgentLink) -> anyhow::Result<Ended>) -> ExitCode {
    let env = match WorkerEnv::from_process() {
        Ok(env) => env,
        Err(e) => return finish(Err(e)),
    };
    let link = Arc::new(AgentLink::open(env.agent_fd));
    failure::install(env.rank, link.clone());
    match work(&env, &link) {
        Ok(Ended::Finished) => {
            let _ = std::io::stdout().flush();
            failure::leave(exit::OK)
        }
        Ok(Ended::Saved { step }) => {
            println!(
                "rank {}: saved at step {step}; exit {}",
                env.rank,
                exit::REQUEUE
            );
            let _ = std::io::stdout().flush();
            failure::leave(exit::REQUEUE)
        }
        Err(e) => failure::end(env.rank, &link, &e),
    }
}

fn load(path: &std::path::Path, overrides: &[String]) -> anyhow::Result<Config> {
    Config::load(path, overrides).map_err(|e| Coded::new(exit::CONFIG, e.to_string()).into())
}

/// A row of dashes for a run that is not finished; an error if none is.
fn compare(runs: &[PathBuf]) -> anyhow::Result<()> {
    if !runs.iter().any(|run| RunDir::new(run).summary().is_file()) {
        let names: Vec<String> = runs.iter().map(|r| r.display().to_string()).collect();
        let text = format!(
            "nothing to compare: no summary.json in {}\n  hint: name run folders; a run writes its summary when it ends",
            names.join(", ")
        );
        return Err(Coded::new(exit::DATA, text).into());
    }
    println!("{}", report::compare(runs));
    Ok(())
}

fn print_model(config: &std::path::Path, overrides: &[String]) -> anyhow::Result<()> {
    let config = load(config, overrides)?;
    let network = crate::model::Network::new(&config.model, tch::Device::Cpu, config.run.seed)?;
    println!("{}", network.summary(config.data.val.size));
    Ok(())
}

fn finish(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(exit::code_of(&e) as u8)
        }
    }
}
