//! `tsm-bench launch`: the launcher beside others, in turn, in one run.
//!
//! ```text
//! metrics, nodes, culprit, logs, join  what is measured: each a function that can run alone
//! tools                                one job, told to each launcher in its own words
//! stage, stamp                         the processes of one measurement, and what ranks say
//! report                               rows, ratios, the table
//! ```

mod culprit;
mod join;
mod logs;
mod metrics;
mod nodes;
mod report;
mod stage;
mod stamp;
mod tools;

use crate::machine;
use anyhow::{Result, bail, ensure};
use clap::{Parser, ValueEnum};
use report::{Case, Report, Rows, Seen};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;
use tools::{Programs, Tool};
use tsm_job::exit::{self, Coded};

/// For what has to come; far longer than anything takes.
const PATIENCE: Duration = Duration::from_secs(180);
/// For what may never come.
const VAIN: Duration = Duration::from_secs(10);
/// Rounds of what takes long.
const FEW: usize = 3;

#[derive(Parser)]
pub struct Args {
    /// What to measure; everything where this is not given.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Metric>,
    /// The other launchers; those that are here where this is not given.
    #[arg(long, value_delimiter = ',', conflicts_with = "alone")]
    against: Vec<Tool>,
    /// Measure tsm-launch only.
    #[arg(long)]
    alone: bool,
    /// Times that each side is measured, in turn; at most 3 of what takes long.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Failures followed by others whose first rank has to be named.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    cascades: u32,
    /// Leave out what takes more ranks.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_ranks: u32,
    /// Leave out joins of more nodes.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    max_nodes: u32,
    /// The tsm-launch to measure, instead of the one beside this program.
    #[arg(long, value_name = "PATH")]
    tsm_launch: Option<PathBuf>,
    /// A Python with PyTorch, for torchrun; default: the environment's TSM_PYTHON.
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// File for the result as JSON; written again after every metric.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// File for the result as a Markdown table; likewise.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Metric {
    /// From exec to the last of 8 to 1,024 ranks.
    Start,
    /// From the death of a rank to its peers signalled and the launcher's exit.
    Kill,
    /// From the death of the launcher to its ranks gone.
    Agent,
    /// Nodes that die or fall silent.
    Nodes,
    /// From the end of a rank to all ranks started again.
    Restart,
    /// Agents that join at once.
    Join,
    /// Lines into files.
    Logs,
    /// Of the launcher with 8 ranks.
    Memory,
    /// Whether the rank that failed first is named.
    Culprit,
    /// A peer that ignores SIGTERM.
    Grace,
}

/// What every metric needs.
struct Bench<'a> {
    args: &'a Args,
    programs: Programs,
    /// Ours is the first.
    tools: Vec<Tool>,
    rows: Rows,
}

impl Bench<'_> {
    fn rounds(&self) -> usize {
        self.args.rounds as usize
    }

    /// Observes `cases` with each of the launchers that are `able`, in turn, `rounds` times. What cannot be
    /// observed is on record, and the rest goes on; who was waited for in vain twice is not waited for again.
    fn measure(
        &mut self,
        able: &[Tool],
        rounds: usize,
        cases: &[Case],
        observe: impl Fn(&Programs, Tool, usize) -> Result<Vec<Seen>>,
    ) {
        let tools: Vec<Tool> = self
            .tools
            .iter()
            .copied()
            .filter(|t| able.contains(t))
            .collect();
        let mut vain = HashMap::new();
        for round in 0..rounds {
            for &tool in &tools {
                if tool != Tool::TsmLaunch && vain.get(&tool) >= Some(&2) {
                    continue;
                }
                let load = machine::load();
                match observe(&self.programs, tool, round) {
                    Ok(seen) => {
                        if seen.iter().any(|s| matches!(s, Seen::NotWithinS(_))) {
                            *vain.entry(tool).or_insert(0) += 1;
                        }
                        for (case, seen) in cases.iter().zip(seen) {
                            eprintln!(
                                "{} {}: {} {seen:?} {}",
                                case.metric,
                                case.name,
                                tool.name(),
                                case.unit
                            );
                            self.rows.add(case, tool, seen, load);
                        }
                    }
                    Err(e) => {
                        let case = &cases[0];
                        eprintln!(
                            "{} {}: {} failed: {e:#}",
                            case.metric,
                            case.name,
                            tool.name()
                        );
                        self.rows.failed(case, tool, format!("{e:#}"));
                    }
                }
            }
        }
    }
}

/// Measures, prints the table, and writes the files asked for.
pub fn run(args: &Args) -> Result<()> {
    let programs = Programs::find(args.tsm_launch.clone(), args.python.clone())?;
    // A rank costs a few files, and a node one.
    let files = 4 * u64::from(args.max_ranks) + u64::from(args.max_nodes) + 256;
    if let Err(limit) = tsm_launch::limits::allow_open_files(files) {
        let text = format!(
            "needs {files} open files, and the hard limit is {limit}\n  hint: ulimit -Hn {files}, or --max-ranks"
        );
        bail!(Coded::new(exit::PREFLIGHT, text));
    }
    let wanted: &[Tool] = match (args.alone, args.against.as_slice()) {
        (true, _) => &[],
        (false, []) => &Tool::OTHERS,
        (false, some) => some,
    };
    let mut versions = Vec::new();
    let mut tools = Vec::new();
    for tool in [Tool::TsmLaunch].into_iter().chain(wanted.iter().copied()) {
        let version = programs.version(tool).map_err(|e| format!("{e:#}"));
        match &version {
            Ok(_) => tools.push(tool),
            Err(why) if args.against.contains(&tool) || tool == Tool::TsmLaunch => {
                let name = tool.name();
                let text =
                    format!("cannot measure {name}: {why}\n  hint: leave {name} out of --against");
                bail!(Coded::new(exit::PREFLIGHT, text));
            }
            Err(why) => eprintln!("skipped: {}: {why}", tool.name()),
        }
        versions.push((tool.name(), version));
    }
    let mut bench = Bench {
        args,
        programs,
        tools,
        rows: Rows::default(),
    };
    for metric in Metric::value_variants() {
        if !args.only.is_empty() && !args.only.contains(metric) {
            continue;
        }
        match metric {
            Metric::Start => metrics::start(&mut bench),
            Metric::Kill => metrics::kill(&mut bench),
            Metric::Agent => metrics::agent(&mut bench),
            Metric::Nodes => nodes::lost(&mut bench),
            Metric::Restart => metrics::restart(&mut bench),
            Metric::Join => join::join(&mut bench),
            Metric::Logs => logs::logs(&mut bench),
            Metric::Memory => metrics::memory(&mut bench),
            Metric::Culprit => culprit::culprit(&mut bench),
            Metric::Grace => metrics::grace(&mut bench),
        }
        let report = Report::new(versions.clone(), bench.rounds(), &bench.rows);
        if let Some(file) = &args.json {
            fs_err::write(file, serde_json::to_string_pretty(&report)? + "\n")?;
        }
        if let Some(file) = &args.markdown {
            fs_err::write(file, report.markdown())?;
        }
    }
    print!(
        "{}",
        Report::new(versions, bench.rounds(), &bench.rows).markdown()
    );
    ensure!(
        !bench.rows.ours_failed(),
        "tsm-launch could not be measured everywhere, see above"
    );
    Ok(())
}

/// Milliseconds from one stamp to another; 0 where they came the other way round.
fn ms(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e6
}
