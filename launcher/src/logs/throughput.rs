//! How fast the workers' output is taken in: the measurement behind the claim.

use anyhow::{Context, ensure};
use fs_err::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Logs, Shown, Sink, Source, Tail};
use crate::console::Console;
use crate::console::lines::{Bars, Lines};
use crate::console::painter::{Format, Style};
use crate::console::screen::{Outputs, Screen};

/// What [`measure`] found.
#[derive(Clone, Copy, Debug)]
pub struct Throughput {
    pub lines: u64,
    pub bytes: u64,
    /// From the first byte written to the last byte in its file.
    pub wall: Duration,
}

impl Throughput {
    pub fn lines_per_s(&self) -> f64 {
        self.lines as f64 / self.wall.as_secs_f64()
    }
}

/// Lets `ranks` threads write `lines` numbered lines each through pipes into files below `dir`, in blocks of
/// `block` bytes that end anywhere, and checks every byte of the files. With `shown` the lines are labelled
/// and go to the console too, which is a sink here.
///
/// # Errors
/// When a line was lost or torn, or a file cannot be written.
pub fn measure(
    dir: &Path,
    ranks: u32,
    lines: u64,
    block: usize,
    shown: bool,
) -> anyhow::Result<Throughput> {
    let run_dir = tsm_job::RunDir::new(dir);
    fs_err::create_dir_all(run_dir.logs())?;
    let path = |rank| run_dir.log("node", rank, false);
    let (mut sources, mut writers) = (Vec::new(), Vec::new());
    for rank in 0..ranks {
        let (pipe, writer) = std::io::pipe().context("cannot make a pipe")?;
        let pipe = pipe.into();
        let to = Sink {
            file: File::create(path(rank))?,
            stderr: false,
            shown: shown.then(|| Lines::new(rank, false, Bars::Hidden)),
            tail: Tail::default(),
        };
        sources.push(Source { pipe, to });
        writers.push((writer, text(rank, lines)));
    }
    let sink = || Console::new(std::io::sink());
    let style = Style {
        format: Format::Text,
        hosts: false,
        world_size: ranks,
        shown: ranks as usize,
        run_dir: run_dir.clone(),
    };
    let screen = Screen::start(Outputs::plain(sink(), sink()), style, None)?;
    let start = Instant::now();
    let to = Shown {
        host: "node".into(),
        feed: screen.feed(),
        patience: screen.patience(),
    };
    let logs = Logs::start(sources, to)?;
    let texts: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let write = |(mut pipe, text): (std::io::PipeWriter, Vec<u8>)| {
            scope.spawn(move || {
                let written = text
                    .chunks(block)
                    .try_for_each(|block| pipe.write_all(block));
                written.map(|()| text)
            })
        };
        let threads: Vec<_> = writers.into_iter().map(write).collect();
        let texts = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Ok(Vec::new())));
        texts.collect::<Result<_, _>>()
    })
    .context("a pipe was closed")?;
    let output = logs.finish(Duration::from_secs(600));
    let all = output.all && output.missing.is_none();
    ensure!(all, "not all was read: {output:?}");
    let wall = start.elapsed();
    screen.finish(Duration::from_secs(600));
    let mut bytes = 0;
    for (rank, text) in texts.iter().enumerate() {
        let file = path(rank as u32);
        ensure!(
            fs_err::read(&file)? == *text,
            "{} differs from what was written",
            file.display()
        );
        bytes += text.len() as u64;
    }
    Ok(Throughput {
        lines: lines * u64::from(ranks),
        bytes,
        wall,
    })
}

fn text(rank: u32, lines: u64) -> Vec<u8> {
    let mut text = Vec::new();
    for i in 0..lines {
        // Writing into memory cannot fail.
        let _ = writeln!(
            text,
            "rank {rank} step {i} loss 2.3456 clips/s 812.3 lr 0.0100"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_line_is_lost_or_torn() {
        let dir = tempfile::tempdir().unwrap();
        let found = measure(dir.path(), 4, 5_000, 1000, true).unwrap();
        assert_eq!(found.lines, 20_000);
    }

    #[test]
    #[ignore = "a measurement, for a quiet machine"]
    fn lines_per_second() {
        for (block, shown) in [(4096, false), (4096, true), (48, false)] {
            for _ in 0..3 {
                let dir = tempfile::tempdir().unwrap();
                let found = measure(dir.path(), 4, 500_000, block, shown).unwrap();
                println!(
                    "blocks of {block:>4} bytes, shown {shown:<5}: {:.2} M lines/s, {:.0} MB/s",
                    found.lines_per_s() / 1e6,
                    found.bytes as f64 / found.wall.as_secs_f64() / 1e6
                );
            }
        }
    }
}
