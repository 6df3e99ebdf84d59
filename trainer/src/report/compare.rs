//! Several runs side by side.

use super::{Summary, percent, rate, shift_name};
use crate::meter::History;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;
use tsm_job::RunDir;

/// A Markdown table of finished runs, and which of curves, checkpoints and report each has, and where.
/// A folder whose summary cannot be read keeps its row, with the reason.
pub fn compare(runs: &[PathBuf]) -> String {
    let header = [
        "run",
        "shift",
        "best top-1",
        "last top-1",
        "clips/s",
        "epochs",
        "time",
    ]
    .map(String::from);
    let mut rows = vec![header];
    let mut notes = String::new();
    for path in runs {
        let dir = RunDir::new(path);
        match Summary::read(&dir) {
            Ok(s) => rows.push([
                s.run.clone(),
                shift_name(s.shift).into(),
                percent(s.best_top1),
                percent(s.last.as_ref().and_then(|l| l.top1)),
                rate(s.fps_total),
                epochs_done(&dir, &s),
                crate::meter::coarse(Duration::try_from_secs_f64(s.elapsed_s).unwrap_or_default()),
            ]),
            Err(error) => {
                let name = path.file_name().map_or_else(
                    || path.display().to_string(),
                    |n| n.to_string_lossy().into(),
                );
                rows.push([
                    name,
                    "-".into(),
                    "-".into(),
                    "-".into(),
                    "-".into(),
                    "-".into(),
                    "-".into(),
                ]);
                let _ = writeln!(notes, "\nno summary of {}: {error:#}", path.display());
            }
        }
    }
    let mut out = table(&rows);
    out += &notes;
    for path in runs {
        let dir = RunDir::new(path);
        let command = format!("tensorboard --logdir {}", dir.tb().display());
        let parts = [
            ("report", dir.report(), dir.report().display().to_string()),
            ("TensorBoard", dir.tb(), command),
            (
                "checkpoints",
                dir.checkpoints(),
                dir.checkpoints().display().to_string(),
            ),
        ];
        let there = parts.iter().filter(|(_, path, _)| path.exists());
        let lines: String = there.fold(String::new(), |lines, (name, _, shown)| {
            lines + &format!("  {name:<12} {shown}\n")
        });
        if !lines.is_empty() {
            let _ = write!(out, "\n{}\n{lines}", path.display());
        }
    }
    out
}

/// `3` or, where the run ended early, `2 of 3`.
fn epochs_done(dir: &RunDir, summary: &Summary) -> String {
    let done = History::read(&dir.metrics())
        .ok()
        .and_then(|h| h.epochs.last().map(|e| e.epoch));
    match done {
        Some(done) if done < summary.epochs => format!("{done} of {}", summary.epochs),
        _ => summary.epochs.to_string(),
    }
}

/// Markdown with padded columns: the first left, the others right.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |c: usize| {
        rows.iter()
            .map(|r| r[c].chars().count())
            .max()
            .unwrap_or(0)
            .max(2)
    };
    let mut out = String::new();
    for (i, row) in rows.iter().enumerate() {
        for (c, cell) in row.iter().enumerate() {
            let width = width(c);
            let _ = if c == 0 {
                write!(out, "| {cell:<width$} ")
            } else {
                write!(out, "| {cell:>width$} ")
            };
        }
        out.push_str("|\n");
        if i == 0 {
            for c in 0..N {
                let dashes = "-".repeat(width(c));
                let _ = if c == 0 {
                    write!(out, "|-{dashes}-")
                } else {
                    write!(out, "|-{dashes}:")
                };
            }
            out.push_str("|\n");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::summary;
    use super::*;
    use tsm_job::config::ShiftMode;

    #[test]
    fn runs_stand_side_by_side() {
        let root = tempfile::tempdir().unwrap();
        let runs = ["tsm", "tsn", "gone"].map(|name| root.path().join(name));
        for (run, shift, top1) in [
            (&runs[0], ShiftMode::Bi, 91.5),
            (&runs[1], ShiftMode::None, 25.25),
        ] {
            fs_err::create_dir(run).unwrap();
            let name = run.file_name().unwrap().to_string_lossy().into_owned();
            let summary = Summary {
                run: name,
                shift,
                best_top1: Some(top1),
                ..summary()
            };
            let dir = RunDir::new(run);
            summary.write(&dir).unwrap();
            fs_err::create_dir(dir.tb()).unwrap();
        }
        let text = compare(&runs);
        let (table, rest) = text.split_once("\n\n").unwrap();
        assert_eq!(
            table,
            "| run  | shift | best top-1 | last top-1 | clips/s | epochs |   time |\n\
             |------|------:|-----------:|-----------:|--------:|-------:|-------:|\n\
             | tsm  |    bi |      91.50 |      92.00 |   380.2 |     32 | 1h 05m |\n\
             | tsn  |  none |      25.25 |      92.00 |   380.2 |     32 | 1h 05m |\n\
             | gone |     - |          - |          - |       - |      - |      - |"
        );
        let (note, places) = rest.split_once("\n\n").unwrap();
        assert!(note.starts_with("no summary of "), "{note}");
        let curves = |run: &PathBuf| {
            let (run, tb) = (run.display(), run.join("tb"));
            format!(
                "{run}\n  TensorBoard  tensorboard --logdir {}\n",
                tb.display()
            )
        };
        let expected = [curves(&runs[0]), curves(&runs[1])].join("\n");
        assert_eq!(places, expected, "nothing that is not there");
    }
}
