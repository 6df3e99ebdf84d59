//! What happens on one node.

use super::nodes::Pair;
use super::report::{Case, Goal, Seen};
use super::stage::Stage;
use super::stamp::{Kind, Stamp};
use super::tools::{Job, Programs, Tool};
use super::{Bench, FEW, PATIENCE, VAIN, ms};
use anyhow::{Context, Result};
use rustix::process::Signal;
use std::cell::RefCell;
use std::time::Duration;

const ALL: [Tool; 4] = [Tool::TsmLaunch, Tool::Torchrun, Tool::Srun, Tool::Mpirun];
/// Those that start ranks again by themselves.
const RESTARTING: [Tool; 2] = [Tool::TsmLaunch, Tool::Torchrun];
/// How long a signalled rank takes to end, as a trainer that closes its files does. If it ended at once, the time in which
/// the kernel takes 63 processes apart would be in the time until the last one is signalled.
const LINGER_MS: u32 = 20;
/// How long the ranks of a dead launcher are watched.
const ORPHANS: Duration = Duration::from_secs(5);

/// Starts a launcher of `ranks` and waits for them: where they are, their stamps, and the time before.
fn launched(programs: &Programs, tool: Tool, job: &Job) -> Result<(Stage, Vec<Stamp>, u64)> {
    let mut stage = Stage::new()?;
    let mut command = programs.command(tool, job, &stage);
    let (_, before) = stage.start(&mut command)?;
    let stamps = stage.started(job.ranks as usize, PATIENCE)?;
    Ok((stage, stamps, before))
}

fn last(stamps: &[Stamp]) -> u64 {
    stamps.iter().map(|s| s.ns).max().unwrap_or(0)
}

/// A value, or that it did not come.
pub fn since(before: u64, stamps: Option<Vec<Stamp>>, patience: Duration) -> Seen {
    match stamps {
        Some(stamps) => Seen::Value(ms(before, last(&stamps))),
        None => Seen::NotWithinS(patience.as_secs_f64()),
    }
}

pub fn start(bench: &mut Bench) {
    // ext4 searches long for an inode that was not freed in the last five seconds, so the thousands of files of one
    // measurement are not removed while the next one makes its own.
    let folders = RefCell::new(Vec::new());
    for (ranks, goal) in [(8, 60.0), (64, 250.0), (256, 800.0), (1024, 3000.0)] {
        if ranks > bench.args.max_ranks {
            continue;
        }
        let name = format!("exec to the last of {ranks} ranks");
        let case = Case::new("start", name, "ms", Some(Goal::AtMost(goal)));
        let rounds = if ranks < 1024 {
            bench.rounds()
        } else {
            bench.rounds().min(FEW)
        };
        bench.measure(&ALL, rounds, &[case], |programs, tool, _| {
            let (stage, stamps, before) = launched(programs, tool, &Job::new(ranks))?;
            folders.borrow_mut().push(stage.folder());
            Ok(vec![Seen::Value(ms(before, last(&stamps)))])
        });
    }
}

pub fn kill(bench: &mut Bench) {
    for (ranks, goal) in [(8, 5.0), (64, 5.0), (256, 20.0)] {
        if ranks > bench.args.max_ranks {
            continue;
        }
        let from = format!("SIGKILL of 1 of {ranks} ranks");
        let cases = [
            Case::new(
                "kill",
                format!("{from} to the last peer signalled"),
                "ms",
                Some(Goal::AtMost(goal)),
            ),
            Case::new(
                "kill",
                format!("{from}, whose peers take {LINGER_MS} ms, to the launcher's exit"),
                "ms",
                Some(Goal::AtMost(150.0)),
            ),
        ];
        let rounds = bench.rounds();
        bench.measure(&ALL, rounds, &cases, |programs, tool, round| {
            let job = Job {
                words: vec!["--linger-ms".into(), LINGER_MS.to_string()],
                ..Job::new(ranks)
            };
            let (mut stage, _, _) = launched(programs, tool, &job)?;
            let victim = (round as u32 * 5 + 3) % ranks;
            let before = stage.signal_rank(victim, Signal::KILL)?;
            let peers = stage.wait(Kind::Signalled, ranks as usize - 1, VAIN, |_| true)?;
            let exit = stage.ended(0, 2 * VAIN)?;
            let exit = exit.map_or(Seen::NotWithinS(2.0 * VAIN.as_secs_f64()), |at| {
                Seen::Value(ms(before, at))
            });
            Ok(vec![since(before, peers, VAIN), exit])
        });
    }
    let name = "SIGKILL of a rank to the last of 4 peers on another node signalled";
    let case = Case::new("kill", name, "ms", Some(Goal::AtMost(25.0)));
    let rounds = bench.rounds();
    bench.measure(
        &[Tool::TsmLaunch, Tool::Torchrun, Tool::Srun],
        rounds,
        &[case],
        |programs, tool, _| {
            let mut pair = Pair::start(programs, tool, 4, 0)?;
            let second = pair.second;
            let victim = pair.ranks_of(second)[1];
            let before = pair.stage.signal_rank(victim, Signal::KILL)?;
            let peers = pair
                .stage
                .wait(Kind::Signalled, 4, VAIN, |s| s.parent != second)?;
            Ok(vec![since(before, peers, VAIN)])
        },
    );
}

pub fn agent(bench: &mut Bench) {
    for ranks in [8, 64] {
        if ranks > bench.args.max_ranks {
            continue;
        }
        let from = format!("SIGKILL of the launcher of {ranks} ranks");
        let cases = [
            Case::new(
                "agent",
                format!("{from} to the last rank gone"),
                "ms",
                Some(Goal::AtMost(50.0)),
            ),
            Case::new(
                "agent",
                format!("{from}: ranks alive after {} s", ORPHANS.as_secs()),
                "ranks",
                Some(Goal::AtMost(0.0)),
            ),
        ];
        let rounds = bench.rounds();
        bench.measure(&ALL, rounds, &cases, |programs, tool, _| {
            let (stage, _, _) = launched(programs, tool, &Job::new(ranks))?;
            let before = stage.signal(0, Signal::KILL)?;
            let (left, last) = stage.gone(ORPHANS, |_| true)?;
            let gone = if left == 0 {
                Seen::Value(ms(before, last))
            } else {
                Seen::NotWithinS(ORPHANS.as_secs_f64())
            };
            Ok(vec![gone, Seen::Value(left as f64)])
        });
    }
}

pub fn restart(bench: &mut Bench) {
    let rounds = bench.rounds();
    let case = Case::new(
        "restart",
        "end of a rank to all 8 started again",
        "ms",
        Some(Goal::AtMost(100.0)),
    );
    bench.measure(&RESTARTING, rounds, &[case], |programs, tool, _| {
        let job = Job {
            max_restarts: 1,
            ..Job::new(8)
        };
        let (mut stage, _, _) = launched(programs, tool, &job)?;
        let before = stage.signal_rank(5, Signal::USR1)?;
        let again = stage.wait(Kind::Started, 8, VAIN, |s| s.ns > before)?;
        Ok(vec![since(before, again, VAIN)])
    });
    let case = Case::new(
        "restart",
        "end of a rank to all of 2 nodes x 2 started again",
        "ms",
        Some(Goal::AtMost(300.0)),
    );
    bench.measure(&RESTARTING, rounds, &[case], |programs, tool, _| {
        let mut pair = Pair::start(programs, tool, 2, 1)?;
        let victim = pair.ranks_of(pair.second)[0];
        let before = pair.stage.signal_rank(victim, Signal::USR1)?;
        let again = pair
            .stage
            .wait(Kind::Started, 4, 2 * VAIN, |s| s.ns > before)?;
        Ok(vec![since(before, again, 2 * VAIN)])
    });
}

pub fn memory(bench: &mut Bench) {
    let cases = ["PSS", "RSS"].map(|what| {
        Case::new(
            "memory",
            format!("{what} of the launcher's processes with 8 ranks"),
            "MiB",
            None,
        )
    });
    let rounds = bench.rounds();
    bench.measure(&ALL, rounds, &cases, |programs, tool, _| {
        let (stage, _, _) = launched(programs, tool, &Job::new(8))?;
        let (pss, rss) = resident(stage.launcher_pid(0), &stage.rank_pids())?;
        Ok(vec![Seen::Value(pss), Seen::Value(rss)])
    });
}

/// MiB of a process and all below it but `ranks`, shared pages divided among those that share them, and whole.
fn resident(root: i32, ranks: &[i32]) -> Result<(f64, f64)> {
    let mut parents = Vec::new();
    for entry in fs_err::read_dir("/proc")?.flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok());
        let Some(pid) = pid.filter(|pid| !ranks.contains(pid)) else {
            continue;
        };
        let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<i32>().ok());
        parents.extend(parent.map(|parent| (pid, parent)));
    }
    let mut family = vec![root];
    let mut i = 0;
    while i < family.len() {
        let parent = family[i];
        family.extend(
            parents
                .iter()
                .filter(|(_, of)| *of == parent)
                .map(|(pid, _)| *pid),
        );
        i += 1;
    }
    let (mut pss, mut rss) = (0.0, 0.0);
    for pid in family {
        // A helper may have ended by now; the launcher has not.
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = match fs_err::read_to_string(path) {
            Ok(text) => text,
            Err(e) if pid == root => return Err(e.into()),
            Err(_) => continue,
        };
        let kib = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name))?;
            line.trim().strip_suffix(" kB")?.parse::<f64>().ok()
        };
        pss += kib("Pss:").context("smaps_rollup has a Pss")? / 1024.0;
        rss += kib("Rss:").context("smaps_rollup has an Rss")? / 1024.0;
    }
    Ok((pss, rss))
}

pub fn grace(bench: &mut Bench) {
    let name = "a peer ignores SIGTERM: failure to exit, less the grace (1 s; torchrun's is 30 s, mpirun's 1 s)";
    let case = Case::new("grace", name, "ms", Some(Goal::AtMost(200.0)));
    let rounds = bench.rounds().min(FEW);
    // What srun waits is the cluster's KillWait.
    bench.measure(
        &[Tool::TsmLaunch, Tool::Torchrun, Tool::Mpirun],
        rounds,
        &[case],
        |programs, tool, _| {
            let words = ["--ignore-sigterm", "1"].map(String::from).into();
            let grace = Duration::from_secs(if tool == Tool::Torchrun { 30 } else { 1 });
            let ours = (tool == Tool::TsmLaunch).then_some(grace);
            let (mut stage, _, _) = launched(
                programs,
                tool,
                &Job {
                    grace: ours,
                    words,
                    ..Job::new(8)
                },
            )?;
            let before = stage.signal_rank(0, Signal::KILL)?;
            let patience = 2 * grace + VAIN;
            Ok(vec![match stage.ended(0, patience)? {
                Some(at) => Seen::Value(ms(before, at) - grace.as_secs_f64() * 1e3),
                None => Seen::NotWithinS(patience.as_secs_f64()),
            }])
        },
    );
}
