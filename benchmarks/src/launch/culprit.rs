//! Cascades: a rank fails, the others follow a moment later, and the launcher has to say who was first.

use super::report::{Case, Goal, Seen};
use super::stage::Stage;
use super::stamp::Kind;
use super::tools::{Job, Programs, Tool};
use super::{Bench, PATIENCE};
use crate::machine;
use anyhow::{Context, Result};
use rustix::process::Signal;

const RANKS: u32 = 8;
/// Peers follow after 1 to so many milliseconds.
const LONGEST_MS: u32 = 50;
/// Of a launcher that takes seconds to start.
const CASCADES_OF_OTHERS: u32 = 20;

/// Interleaved as all else, but a count.
pub fn culprit(bench: &mut Bench) {
    let name =
        format!("the first of {RANKS} ranks named, whose peers fail 1 to {LONGEST_MS} ms later");
    let share = Case::new("culprit", name, "%", Some(Goal::AtLeast(100.0)));
    let count = Case::new("culprit", "cascades", "runs", None);
    let able = [Tool::TsmLaunch, Tool::Torchrun];
    let mut counts: Vec<(Tool, u32, u32)> = bench
        .tools
        .iter()
        .filter(|t| able.contains(t))
        .map(|&t| (t, 0, 0))
        .collect();
    let all = bench.args.cascades;
    for i in 0..all {
        for (tool, right, tried) in &mut counts {
            // Spread over the whole run and over all delays.
            let every = all.div_ceil(CASCADES_OF_OTHERS);
            if *tool != Tool::TsmLaunch && !i.is_multiple_of(every) {
                continue;
            }
            let first = i * 7 % RANKS;
            let react_ms = if *tool == Tool::TsmLaunch {
                i % LONGEST_MS + 1
            } else {
                i / every * 13 % LONGEST_MS + 1
            };
            match cascade(&bench.programs, *tool, first, react_ms) {
                Ok(named) => {
                    *tried += 1;
                    if named == Some(first) {
                        *right += 1;
                    } else {
                        eprintln!(
                            "culprit: {} named {named:?} for {first}, peers after {react_ms} ms",
                            tool.name()
                        );
                    }
                }
                Err(e) => bench.rows.failed(&share, *tool, format!("{e:#}")),
            }
        }
    }
    for (tool, right, tried) in counts {
        let percent = 100.0 * f64::from(right) / f64::from(tried.max(1));
        eprintln!("culprit: {} {right} of {tried}", tool.name());
        bench
            .rows
            .add(&share, tool, Seen::Value(percent), machine::load());
        bench
            .rows
            .add(&count, tool, Seen::Value(tried.into()), machine::load());
    }
}

/// Whom the launcher blames when rank `first` ends and the others follow.
fn cascade(programs: &Programs, tool: Tool, first: u32, react_ms: u32) -> Result<Option<u32>> {
    let mut stage = Stage::new()?;
    let words = [
        "--culprit",
        &first.to_string(),
        "--react-ms",
        &react_ms.to_string(),
    ]
    .map(String::from)
    .into();
    let mut command = programs.command(
        tool,
        &Job {
            words,
            ..Job::new(RANKS)
        },
        &stage,
    );
    stage.start(&mut command)?;
    let ready = stage.wait(Kind::Ready, RANKS as usize - 1, PATIENCE, |_| true)?;
    ready.context("not all ranks were ready")?;
    stage.signal_rank(first, Signal::USR1)?;
    stage
        .ended(0, PATIENCE)?
        .context("the launcher did not end")?;
    match tool {
        Tool::TsmLaunch => {
            let failure = fs_err::read_to_string(stage.path("run/failure.json"))?;
            let failure: serde_json::Value = serde_json::from_str(&failure)?;
            Ok(failure["rank"].as_u64().map(|rank| rank as u32))
        }
        _ => Ok(root_cause(&stage.printed(0))),
    }
}

/// The rank under `Root Cause` in torchrun's summary.
fn root_cause(text: &str) -> Option<u32> {
    let (_, summary) = text.split_once("Root Cause")?;
    let line = summary
        .lines()
        .find_map(|l| l.trim().strip_prefix("rank"))?;
    line.trim_start_matches([' ', ':'])
        .split(' ')
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_torchrun_names_a_rank() {
        let text = "Failures:\n[1]:\n  rank      : 1 (local_rank: 1)\nRoot Cause (first observed failure):\n[0]:\n  \
            time      : 2026-01-01_00:00:00\n  host      : here\n  rank      : 6 (local_rank: 6)\n  exitcode  : 17 (pid: 1)\n";
        assert_eq!(root_cause(text), Some(6));
        assert_eq!(root_cause("no summary"), None);
    }
}
