//! Two launchers on this machine that make one job, as if they were two nodes.

use super::metrics::since;
use super::report::{Case, Goal, Seen};
use super::stage::Stage;
use super::stamp::{Kind, Stamp};
use super::tools::{Job, Nodes, Programs, Tool};
use super::{Bench, PATIENCE, VAIN, ms};
use anyhow::{Context, Result};
use rustix::process::Signal;
use std::net::TcpListener;
use tsm_launch::cluster::key::Key;

/// Two nodes at work. What a launcher is to `srun`, the step's daemon on each node is.
pub struct Pair {
    pub stage: Stage,
    stamps: Vec<Stamp>,
    /// Pid of the launcher of rank 0, and of the other one.
    pub first: i32,
    pub second: i32,
}

impl Pair {
    /// Starts `ranks` on each of two nodes and waits for all.
    pub fn start(programs: &Programs, tool: Tool, ranks: u32, max_restarts: u32) -> Result<Pair> {
        let mut stage = Stage::new()?;
        let key_file = stage.path("key");
        Key::random().write_file(&key_file)?;
        let nodes = Some(Nodes {
            num: 2,
            port: free_port()?,
            key_file,
        });
        let job = Job {
            max_restarts,
            nodes,
            ..Job::new(ranks)
        };
        let launchers = if tool == Tool::Srun { 1 } else { 2 };
        for _ in 0..launchers {
            let mut command = programs.command(tool, &job, &stage);
            stage.start(&mut command)?;
        }
        let stamps = stage.started(2 * ranks as usize, PATIENCE)?;
        let of =
            |wanted: &dyn Fn(&Stamp) -> bool| stamps.iter().find(|s| wanted(s)).map(|s| s.parent);
        let first = of(&|s| s.rank == 0).context("rank 0 started")?;
        let second =
            of(&|s| s.parent != first).context("all ranks were started by one launcher")?;
        Ok(Pair {
            stage,
            stamps,
            first,
            second,
        })
    }

    /// Ranks of one launcher.
    pub fn ranks_of(&self, launcher: i32) -> Vec<u32> {
        let mut ranks: Vec<u32> = self
            .stamps
            .iter()
            .filter(|s| s.parent == launcher)
            .map(|s| s.rank)
            .collect();
        ranks.sort_unstable();
        ranks
    }

    fn signal(&self, launcher: i32, signal: Signal) -> Result<u64> {
        let number = (0..2).find(|&i| self.stage.launcher_pid(i) == launcher);
        self.stage.signal(
            number.context("a launcher is not the parent of its ranks")?,
            signal,
        )
    }
}

/// A port that nobody has now.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

pub fn lost(bench: &mut Bench) {
    const ABLE: [Tool; 2] = [Tool::TsmLaunch, Tool::Torchrun];
    const RANKS: u32 = 4;
    let rounds = bench.rounds();
    let case = |name: &str, goal| Case::new("nodes", name, "ms", Some(Goal::AtMost(goal)));

    let killed = [case(
        "SIGKILL of a node's launcher to the last rank of the other node signalled",
        50.0,
    )];
    bench.measure(&ABLE, rounds, &killed, |programs, tool, _| {
        let mut pair = Pair::start(programs, tool, RANKS, 0)?;
        let first = pair.first;
        let before = pair.signal(pair.second, Signal::KILL)?;
        let peers = pair
            .stage
            .wait(Kind::Signalled, RANKS as usize, VAIN, |s| s.parent == first)?;
        Ok(vec![since(before, peers, VAIN)])
    });

    let silent = [
        case(
            "SIGSTOP of a node's launcher to the last rank of the other node signalled",
            1500.0,
        ),
        case(
            "SIGSTOP of a node's launcher to its own last rank gone",
            2000.0,
        ),
    ];
    bench.measure(&ABLE, rounds, &silent, |programs, tool, _| {
        let mut pair = Pair::start(programs, tool, RANKS, 0)?;
        let (first, second) = (pair.first, pair.second);
        let before = pair.signal(second, Signal::STOP)?;
        let peers = pair
            .stage
            .wait(Kind::Signalled, RANKS as usize, VAIN, |s| s.parent == first)?;
        let (left, last) = pair.stage.gone(VAIN, |s| s.parent == second)?;
        Ok(vec![since(before, peers, VAIN), gone(before, left, last)])
    });

    let first_killed = [case(
        "SIGKILL of the first node's launcher to the last rank of the other node gone",
        50.0,
    )];
    bench.measure(&ABLE, rounds, &first_killed, |programs, tool, _| {
        let pair = Pair::start(programs, tool, RANKS, 0)?;
        let second = pair.second;
        let before = pair.signal(pair.first, Signal::KILL)?;
        let (left, last) = pair.stage.gone(VAIN, |s| s.parent == second)?;
        Ok(vec![gone(before, left, last)])
    });
}

fn gone(before: u64, left: usize, last: u64) -> Seen {
    match left {
        0 => Seen::Value(ms(before, last)),
        _ => Seen::NotWithinS(VAIN.as_secs_f64()),
    }
}
