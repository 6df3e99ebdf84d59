//! What the ranks of the nested job say of their devices, and why some say nothing. Pure.

use std::process::ExitStatus;
use std::time::Duration;
use tsm_job::all_reduce::AllReduce;

use crate::cluster::message::Finding;
use crate::doctor::preflight::ring::{LEFT, Measured};

/// `again`: the command that measures once more.
pub(super) fn judge(what: &str, result: Result<Vec<AllReduce>, String>, again: &str) -> Finding {
    let hint = |text: &str| format!("{text}; {again} measures again");
    let lines = match result {
        Ok(lines) => lines,
        Err(e) => {
            let (text, remedy) = e.split_once("\n  hint: ").unwrap_or((
                &e,
                "look at the kernel log (dmesg | grep -e NVRM -e Xid), and at nvidia-smi topo -m",
            ));
            let text = format!("the all-reduce over {what} failed: {text}");
            return Finding::error("all-reduce", text, hint(remedy));
        }
    };
    let measured = summary(&lines);
    let device = lines.first().map_or("", |line| &line.device);
    match measured.wrong {
        Some(wrong) => {
            let remedy = "a GPU, its memory or a link computes wrong: leave this node out";
            Finding::error("all-reduce", wrong, hint(remedy))
        }
        None if lines.len() == 1 => {
            let text = format!("{what} ({device}) alone starts and computes right");
            Finding::ok("all-reduce", text)
        }
        None => {
            let gb_s = measured.gbit_s / 8.0;
            let text =
                format!("{what} ({device}): {gb_s:.1} GB/s bus bandwidth, every sum is right");
            Finding::ok("all-reduce", text)
        }
    }
}

/// The slowest of these ranks, and the first wrong sum.
pub(super) fn summary(lines: &[AllReduce]) -> Measured {
    let wrong = lines.iter().find_map(|line| {
        let (rank, host, device) = (line.rank, &line.host, &line.device);
        let wrong = line.wrong.as_ref()?;
        Some(format!("rank {rank} on {host} ({device}): {wrong}"))
    });
    let rates = lines.iter().filter_map(|line| line.busbw_gb_s);
    Measured {
        seconds: lines.iter().map(|line| line.seconds).fold(0.0, f64::max),
        gbit_s: rates.reduce(f64::min).unwrap_or(0.0) * 8.0,
        round_trip: Duration::ZERO,
        wrong,
    }
}

/// Why the nested job failed, by its failure.json where there is one, and by its last words.
pub(super) fn reason(
    first: bool,
    failure: Option<&str>,
    stderr: &str,
    status: ExitStatus,
) -> String {
    let failure = failure.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    if let Some(failure) = failure.filter(|_| first) {
        let word = |name: &str| failure[name].as_str().unwrap_or("?").to_string();
        let rank = failure["rank"].as_u64();
        let who = rank.map_or("a node".into(), |rank| format!("rank {rank}"));
        let device = failure["device"]
            .as_str()
            .map_or(String::new(), |d| format!(" ({d})"));
        let said = failure["message"]
            .as_str()
            .map_or_else(|| word("evidence"), String::from);
        let said = said.strip_prefix("error: ").unwrap_or(&said);
        return format!("{who} on {}{device}: {said}", word("host"));
    }
    // An error of this node itself has one line, or a hint below it.
    let own = stderr.rsplit_once("error: ").map(|(_, text)| text.trim());
    match own {
        // What the coordinator told.
        Some(text) if !first && text.starts_with("rank ") => {
            format!("{LEFT}: {}", text.lines().next().unwrap_or(text))
        }
        Some(text) => text.into(),
        None => {
            let last = stderr.lines().last().unwrap_or("no word");
            let last = last.strip_prefix("tsm-launch: ").unwrap_or(last);
            format!("{LEFT}: {last} ({status})")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::message::Severity;
    use std::os::unix::process::ExitStatusExt;

    fn line(rank: u32, seconds: f64, wrong: Option<&str>) -> AllReduce {
        AllReduce {
            rank,
            world_size: 2,
            host: "gpu-01".into(),
            device: "NVIDIA H200".into(),
            bytes: 1 << 26,
            rounds: 5,
            seconds,
            algbw_gb_s: Some(1.0 / seconds),
            busbw_gb_s: Some(2.0 / seconds),
            wrong: wrong.map(String::from),
        }
    }

    #[test]
    fn the_slowest_rank_counts_and_any_wrong_sum() {
        let measured = summary(&[line(0, 0.5, None), line(1, 1.0, Some("1 of 2 sums"))]);
        assert_eq!((measured.seconds, measured.gbit_s), (1.0, 16.0));
        assert_eq!(
            measured.wrong.as_deref(),
            Some("rank 1 on gpu-01 (NVIDIA H200): 1 of 2 sums")
        );
    }

    #[test]
    fn a_finding_has_the_figure_or_what_failed_first() {
        let judge = |result| judge("2 GPUs", result, "tsm-launch again");
        let good = judge(Ok(vec![line(0, 0.5, None), line(1, 1.0, None)]));
        assert_eq!(good.severity, Severity::Ok);
        assert_eq!(
            good.text,
            "2 GPUs (NVIDIA H200): 2.0 GB/s bus bandwidth, every sum is right"
        );
        let wrong = judge(Ok(vec![line(0, 1.0, None), line(1, 1.0, Some("bad"))]));
        assert_eq!(wrong.severity, Severity::Error);
        assert!(wrong.text.starts_with("rank 1 on gpu-01"), "{wrong:?}");
        let failed = judge(Err("rank 1 on a: no GPU\n  hint: do this".into()));
        assert_eq!(
            failed.text,
            "the all-reduce over 2 GPUs failed: rank 1 on a: no GPU"
        );
        assert_eq!(failed.hint, "do this; tsm-launch again measures again");
        let failed = judge(Err("rank 1 on a: SIGSEGV".into()));
        assert!(
            failed.hint.starts_with("look at the kernel log"),
            "{failed:?}"
        );
    }

    #[test]
    fn a_member_that_was_only_told_is_no_witness() {
        let failure =
            r#"{"rank":3,"host":"b","device":"GPU 1 (H200)","evidence":"e","message":"no memory"}"#;
        let status = ExitStatus::from_raw(69 << 8);
        assert_eq!(
            reason(true, Some(failure), "", status),
            "rank 3 on b (GPU 1 (H200)): no memory"
        );
        let node =
            r#"{"rank":null,"host":"b","device":null,"message":null,"evidence":"it was lost"}"#;
        assert_eq!(
            reason(true, Some(node), "", status),
            "a node on b: it was lost"
        );
        let consequence = crate::doctor::preflight::ring::is_consequence;
        let told = "error: rank 3 failed first: exit code 69 on b\n  hint: see there\n";
        let text = reason(false, None, told, status);
        assert_eq!(
            text,
            "a neighbour left: rank 3 failed first: exit code 69 on b"
        );
        assert!(consequence(&text));
        // The other node never came, and says itself why.
        let alone = "tsm-launch: a joined: 1 of 2 nodes\ntsm-launch: 1 node (a) joined within 60s, 2 are needed\n";
        assert!(consequence(&reason(true, None, alone, status)));
        let own = "error: cannot start /x/tsm-trainer: no such program\n  hint: check the name and PATH\n";
        let text = reason(false, None, own, status);
        assert!(
            text.starts_with("cannot start /x/tsm-trainer") && !consequence(&text),
            "{text}"
        );
    }
}
