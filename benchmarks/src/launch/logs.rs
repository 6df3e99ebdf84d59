//! Lines of many ranks into files, every one of which is looked at.

use super::report::{Case, Goal, Seen};
use super::stage::Stage;
use super::stamp::{Kind, log_line};
use super::tools::{Job, Tool};
use super::{Bench, PATIENCE, ms};
use anyhow::{Context, Result};
use std::path::Path;

const RANKS: u32 = 4;
const LINES: u32 = 200_000;

pub fn logs(bench: &mut Bench) {
    let cases = [
        Case::new(
            "logs",
            format!("{RANKS} ranks x {LINES} lines into files"),
            "lines/s",
            Some(Goal::AtLeast(1e6)),
        ),
        Case::new(
            "logs",
            "of these lost or torn",
            "lines",
            Some(Goal::AtMost(0.0)),
        ),
    ];
    let all = [Tool::TsmLaunch, Tool::Torchrun, Tool::Srun, Tool::Mpirun];
    let rounds = bench.rounds();
    bench.measure(&all, rounds, &cases, |programs, tool, _| {
        let mut stage = Stage::new()?;
        fs_err::create_dir_all(stage.path("logs"))?;
        let words = ["--lines".into(), LINES.to_string()].into();
        let job = Job {
            to_files: true,
            words,
            ..Job::new(RANKS)
        };
        let mut command = programs.command(tool, &job, &stage);
        stage.start(&mut command)?;
        let stamps = stage
            .wait(Kind::Started, RANKS as usize, PATIENCE, |_| true)?
            .context("no rank started")?;
        let first = stamps
            .iter()
            .map(|s| s.ns)
            .min()
            .context("no rank started")?;
        let end = stage
            .ended(0, PATIENCE)?
            .context("the launcher did not end")?;
        let folder = match tool {
            Tool::TsmLaunch => stage.path("run/logs"),
            _ => stage.path("logs"),
        };
        let right = right_lines(&folder)?;
        let lines = u64::from(RANKS * LINES);
        let rate = lines as f64 / ms(first, end) * 1e3;
        Ok(vec![Seen::Value(rate), Seen::Value((lines - right) as f64)])
    });
}

/// Lines below `folder` that are whole, and at their place behind the one before.
fn right_lines(folder: &Path) -> Result<u64> {
    let mut right = 0;
    for entry in fs_err::read_dir(folder)? {
        let entry = entry?;
        // torchrun's folder has one for each start, and in it one for each rank.
        if entry.file_type()?.is_dir() {
            right += right_lines(&entry.path())?;
            continue;
        }
        let mut next = 0;
        for line in String::from_utf8_lossy(&fs_err::read(entry.path())?).split_inclusive('\n') {
            let whole = line.strip_suffix('\n').unwrap_or_default();
            let rank = whole.split(' ').next().and_then(|r| r.parse().ok());
            if rank.is_some_and(|rank| whole == log_line(rank, next)) {
                right += 1;
                next += 1;
            }
        }
    }
    Ok(right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_line_and_what_is_missing_do_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let line = |i| log_line(3, i) + "\n";
        let below = folder.path().join("attempt_0/3");
        fs_err::create_dir_all(&below).unwrap();
        fs_err::write(below.join("stdout.log"), [line(0), line(1)].concat()).unwrap();
        fs_err::write(
            folder.path().join("a.out"),
            [line(0), log_line(3, 1)].concat(),
        )
        .unwrap();
        fs_err::write(folder.path().join("a.err"), "something else\n").unwrap();
        assert_eq!(right_lines(folder.path()).unwrap(), 3);
    }
}
