//! `tsm-bench launch` as a program: the small ends of its metrics.

use serde_json::Value;
use std::process::{Command, Output};

/// `tsm-bench launch` with these words, against nobody; `None` where `tsm-launch` is not built beside it.
fn launch(words: &str) -> Option<Output> {
    let bench = env!("CARGO_BIN_EXE_tsm-bench");
    if !std::path::Path::new(bench)
        .with_file_name("tsm-launch")
        .is_file()
    {
        eprintln!("skipped: tsm-launch is not built beside {bench}");
        return None;
    }
    let mut command = Command::new(bench);
    command
        .args(["launch", "--alone"])
        .args(words.split_whitespace());
    Some(command.output().expect("tsm-bench starts"))
}

/// The rows of a run, and its table.
fn rows(words: &str) -> Option<(Vec<Value>, String)> {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("r.json");
    let output = launch(&format!("{words} --json {}", json.display()))?;
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_str(&fs_err::read_to_string(json).unwrap()).unwrap();
    assert_eq!(report["benchmark"], "launch");
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    Some((report["rows"].as_array().unwrap().clone(), table))
}

fn values(row: &Value) -> Vec<f64> {
    let seen = row["seen"].as_array().unwrap().iter();
    seen.map(|s| s["value"].as_f64().unwrap_or_else(|| panic!("{row}")))
        .collect()
}

#[test]
fn starts_and_failures_of_eight_ranks_are_measured() {
    let Some((rows, table)) = rows("--only start,kill,agent,memory --max-ranks 8 --rounds 2")
    else {
        return;
    };
    let of = |metric: &str| {
        rows.iter()
            .filter(|r| r["metric"] == metric)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        ["start", "kill", "agent", "memory"].map(|m| of(m).len()),
        [1, 3, 2, 2],
        "{table}"
    );
    for row in &rows {
        assert_eq!(
            (row["tool"].as_str(), values(row).len()),
            (Some("tsm-launch"), 2),
            "{row}"
        );
    }
    // A clock that ran backwards, or a stamp of another start, would give a zero.
    assert!(values(of("start")[0]).iter().all(|ms| *ms > 0.1), "{table}");
    assert!(values(of("kill")[0]).iter().all(|ms| *ms > 0.0), "{table}");
    assert_eq!(values(of("agent")[1]), [0.0, 0.0], "ranks left behind");
    assert!(
        values(of("memory")[0])
            .iter()
            .all(|mib| (1.0..1000.0).contains(mib)),
        "{table}"
    );
}

#[test]
fn lines_joins_and_culprits_are_counted() {
    let Some((rows, table)) =
        rows("--only logs,join,culprit,restart --max-nodes 64 --cascades 4 --rounds 1")
    else {
        return;
    };
    let of = |metric: &str, i: usize| {
        let row = rows.iter().filter(|r| r["metric"] == metric).nth(i);
        values(row.unwrap_or_else(|| panic!("{metric}\n{table}")))
    };
    assert_eq!(of("logs", 1), [0.0], "lines lost or torn");
    assert_eq!(
        (of("culprit", 0), of("culprit", 1)),
        (vec![100.0], vec![4.0])
    );
    assert!(
        of("join", 1)[0] >= of("join", 0)[0],
        "who starts was welcomed before\n{table}"
    );
    assert!(
        of("restart", 0)[0] > 0.0 && of("restart", 1)[0] > 0.0,
        "{table}"
    );
}

#[test]
fn what_cannot_be_measured_is_said() {
    let bench = env!("CARGO_BIN_EXE_tsm-bench");
    let run = |words: &str| {
        let output = Command::new(bench)
            .args(words.split(' '))
            .env_remove("TSM_PYTHON")
            .output();
        let output = output.expect("tsm-bench starts");
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, said) = run("launch --tsm-launch /nonexistent/tsm-launch");
    assert_eq!(code, Some(69), "{said}");
    assert!(
        said.contains("there is no /nonexistent/tsm-launch\n  hint: "),
        "{said}"
    );
    let rank = env!("CARGO_BIN_EXE_bench-rank");
    let (code, said) = run(&format!("launch --tsm-launch {rank} --against torchrun"));
    assert_eq!(code, Some(69), "{said}");
    assert_eq!(run("launch --rounds 0").0, Some(64));
    assert_eq!(run("launch --alone --against torchrun").0, Some(64));
    #[cfg(not(feature = "step"))]
    {
        let (code, said) = run("step --arch resnet50");
        assert_eq!(code, Some(69), "{said}");
        assert!(said.contains("built without libtorch"), "{said}");
    }
}
