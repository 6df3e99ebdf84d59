//! How fast the workers' output is taken in, and that all of it is.

use super::*;
use crate::console::Console;
use crate::console::lines::Bars;
use crate::console::painter::{Format, Style};
use crate::console::screen::{Outputs, Screen};
use std::path::Path;

/// Lets `ranks` threads write `lines` numbered lines each through pipes into files below `dir`, in blocks of
/// `block` bytes that end anywhere, and checks every byte of the files. With `shown` the lines are labelled
/// and go to the console too, which is a sink here. Bytes, and the time from the first one written to the last one
/// in its file.
fn measure(dir: &Path, ranks: u32, lines: u64, block: usize, shown: bool) -> (u64, Duration) {
    let run_dir = tsm_job::RunDir::new(dir);
    fs_err::create_dir_all(run_dir.logs()).unwrap();
    let path = |rank| run_dir.log("node", rank, false);
    let (mut sources, mut writers) = (Vec::new(), Vec::new());
    for rank in 0..ranks {
        let (pipe, writer) = std::io::pipe().unwrap();
        let pipe = pipe.into();
        let to = Sink {
            file: File::create(path(rank)).unwrap(),
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
    let screen = Screen::start(Outputs::plain(sink(), sink()), style, None).unwrap();
    let start = Instant::now();
    let to = Shown {
        host: "node".into(),
        feed: screen.feed(),
        patience: screen.patience(),
    };
    let logs = Logs::start(sources, to).unwrap();
    let texts: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let write = |(mut pipe, text): (std::io::PipeWriter, Vec<u8>)| {
            scope.spawn(move || {
                for block in text.chunks(block) {
                    pipe.write_all(block).unwrap();
                }
                text
            })
        };
        let threads: Vec<_> = writers.into_iter().map(write).collect();
        let texts = threads.into_iter().map(|thread| thread.join().unwrap());
        texts.collect()
    });
    let limit = Duration::from_secs(600);
    assert_eq!(logs.finish(limit, limit), Finished::default());
    let wall = start.elapsed();
    screen.finish(Duration::from_secs(600));
    for (rank, text) in texts.iter().enumerate() {
        let file = path(rank as u32);
        assert!(fs_err::read(&file).unwrap() == *text, "{}", file.display());
    }
    (texts.iter().map(|text| text.len() as u64).sum(), wall)
}

fn text(rank: u32, lines: u64) -> Vec<u8> {
    let line = |i| format!("rank {rank} step {i} loss 2.3456 clips/s 812.3 lr 0.0100\n");
    (0..lines).flat_map(|i| line(i).into_bytes()).collect()
}

#[test]
fn no_line_is_lost_or_torn() {
    let dir = tempfile::tempdir().unwrap();
    let (bytes, _) = measure(dir.path(), 4, 5_000, 1000, true);
    assert!(bytes > 1_000_000, "{bytes}");
}

#[test]
#[ignore = "a measurement, for a quiet machine"]
fn lines_per_second() {
    for (block, shown) in [(4096, false), (4096, true), (48, false)] {
        for _ in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            let (ranks, lines) = (4, 500_000);
            let (bytes, wall) = measure(dir.path(), ranks, lines, block, shown);
            let seconds = wall.as_secs_f64();
            println!(
                "blocks of {block:>4} bytes, shown {shown:<5}: {:.2} M lines/s, {:.0} MB/s",
                (u64::from(ranks) * lines) as f64 / seconds / 1e6,
                bytes as f64 / seconds / 1e6
            );
        }
    }
}
