//! What is known of a job that hangs, put together for people. Pure.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use super::process::Process;
use super::progress::{Tracker, time};
use super::ras::{Answer, Status};
use crate::text::{count, ranks_named};

/// Late ranks that are shown in full.
const MAX_LATE: usize = 8;
/// Kinds of other ranks of which one is shown in full.
const MAX_KINDS: usize = 4;
/// A rank that does something else than the others is an exception only among so many.
const FEW: usize = 4;
/// Of NCCL's own words, where nothing in them was understood.
const MAX_RAS_LINES: usize = 40;

/// What a rank was seen doing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    pub rank: u32,
    pub host: String,
    /// `GPU 3 (NVIDIA H200)` or `cpu`.
    pub device: String,
    pub process: Process,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HangReport {
    /// The ranks that the others wait for; empty: not known.
    pub late: Vec<u32>,
    /// Why they.
    pub reason: String,
    /// Everything, in lines.
    pub text: String,
}

/// Puts together what steps, processes and NCCL say. `inspections` may lack ranks whose node did not answer; `ras`
/// is what one of the nodes was answered.
pub fn report(
    tracker: &Tracker,
    inspections: &[Inspection],
    ras: Option<&Answer>,
    now: Duration,
) -> HangReport {
    let inspections: BTreeMap<u32, &Inspection> = inspections.iter().map(|i| (i.rank, i)).collect();
    let status = ras.map(|answer| &answer.status);
    let hang = tracker.hang(now);
    let (late, reason) = if hang.late.is_empty() {
        late_by_looks(tracker.world_size(), &inspections, status)
            .unwrap_or((Vec::new(), hang.reason.clone()))
    } else {
        (hang.late.clone(), hang.reason.clone())
    };
    let mut text = format!("{hang}\n");
    if !late.is_empty() && reason != hang.reason {
        let _ = writeln!(text, "{reason}");
    }
    for &rank in late.iter().take(MAX_LATE) {
        let _ = writeln!(
            text,
            "\nlate: {}",
            heading(tracker, &inspections, rank, now)
        );
        match inspections.get(&rank) {
            Some(inspection) => indent(&mut text, &inspection.process.to_string()),
            None => indent(&mut text, "it was not looked into: its node gave no answer"),
        }
    }
    if late.len() > MAX_LATE {
        let _ = writeln!(text, "\nlate as well: {}", ranks_named(&late[MAX_LATE..]));
    }
    others(&mut text, tracker, &inspections, &late, now);
    if let Some(answer) = ras {
        let _ = writeln!(text, "\nNCCL says:");
        indent(&mut text, &in_short(answer));
    }
    HangReport { late, reason, text }
}

fn in_short(answer: &Answer) -> String {
    let faults = answer.status.to_string();
    match answer.status.num_communicators {
        _ if !faults.is_empty() => faults,
        Some(n) => format!(
            "every rank of its {} answers, and none has launched fewer operations than another",
            count(n, "communicator")
        ),
        None => {
            let lines: Vec<&str> = answer.text.lines().take(MAX_RAS_LINES).collect();
            lines.join("\n")
        }
    }
}

/// Steps and sections do not tell: what the processes do may, or what NCCL knows.
fn late_by_looks(
    world_size: u32,
    inspections: &BTreeMap<u32, &Inspection>,
    status: Option<&Status>,
) -> Option<(Vec<u32>, String)> {
    let stuck: Vec<u32> = (inspections.iter())
        .filter(|(_, i)| i.process.is_stuck())
        .map(|(rank, _)| *rank)
        .collect();
    if let [first, ..] = stuck.as_slice()
        && stuck.len() < inspections.len()
    {
        let doing = inspections[first].process.summary();
        return Some((stuck.clone(), format!("{}: {doing}", ranks_named(&stuck))));
    }
    let suspects = status.map_or(Vec::new(), |status| status.suspects(world_size));
    if !suspects.is_empty() && suspects.len() < world_size as usize {
        let ranks = ranks_named(&suspects);
        let reason =
            format!("NCCL has no answer from {ranks}, or fewer operations than from others");
        return Some((suspects, reason));
    }
    let mut kinds: BTreeMap<(char, String), Vec<u32>> = BTreeMap::new();
    for (rank, inspection) in inspections {
        kinds
            .entry(inspection.process.kind())
            .or_default()
            .push(*rank);
    }
    let most = kinds.values().max_by_key(|ranks| ranks.len())?.clone();
    let odd: Vec<u32> = (inspections.keys().copied())
        .filter(|rank| !most.contains(rank))
        .collect();
    let first = odd.first()?;
    if odd.len() * FEW > inspections.len() {
        return None;
    }
    let doing = |rank: &u32| inspections[rank].process.summary();
    let reason = format!(
        "{}: {}; the others: {}",
        ranks_named(&odd),
        doing(first),
        doing(most.first()?)
    );
    Some((odd, reason))
}

/// The ranks that are not late, those that do the same together, and one of them in full.
fn others(
    text: &mut String,
    tracker: &Tracker,
    inspections: &BTreeMap<u32, &Inspection>,
    late: &[u32],
    now: Duration,
) {
    type Alike = (Option<u64>, Option<String>, Option<(char, String)>);
    let mut groups: BTreeMap<Alike, Vec<u32>> = BTreeMap::new();
    for rank in (0..tracker.world_size()).filter(|rank| !late.contains(rank)) {
        let state = tracker.rank(rank);
        let kind = inspections.get(&rank).map(|i| i.process.kind());
        let alike = (state.step, state.section.clone(), kind);
        groups.entry(alike).or_default().push(rank);
    }
    let mut groups: Vec<Vec<u32>> = groups.into_values().collect();
    groups.sort_by_key(|ranks| (std::cmp::Reverse(ranks.len()), ranks[0]));
    for (i, ranks) in groups.iter().enumerate() {
        let seen = ranks.iter().find(|rank| inspections.contains_key(rank));
        let shown = *seen.unwrap_or(&ranks[0]);
        let heading = heading(tracker, inspections, shown, now);
        let _ = match ranks.len() {
            1 => writeln!(text, "\nother: {heading}"),
            _ => writeln!(text, "\nothers: {}, of which {heading}", ranks_named(ranks)),
        };
        if let Some(inspection) = inspections.get(&shown) {
            let process = &inspection.process;
            if i < MAX_KINDS {
                indent(text, &process.to_string());
            } else {
                indent(text, &process.summary());
            }
        }
    }
}

/// `rank 3 on gpu-07, GPU 1 (NVIDIA H200): step 41, section train, last moved 10m ago`
fn heading(
    tracker: &Tracker,
    inspections: &BTreeMap<u32, &Inspection>,
    rank: u32,
    now: Duration,
) -> String {
    let mut line = format!("rank {rank}");
    if let Some(inspection) = inspections.get(&rank) {
        let _ = write!(line, " on {}, {}", inspection.host, inspection.device);
    }
    let state = tracker.rank(rank);
    match state.step {
        Some(step) => line += &format!(": step {step}"),
        None => line += ": no step",
    }
    if let Some(section) = &state.section {
        line += &format!(", section {section}");
    }
    let idle = time(tracker.idle(rank, now));
    line + &format!(", last moved {idle} ago")
}

fn indent(text: &mut String, lines: &str) {
    for line in lines.lines() {
        let _ = writeln!(text, "  {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::super::process::{Stack, Thread};
    use super::super::progress::Limits;
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    fn tracker(steps: &[u64]) -> Tracker {
        let mut tracker = Tracker::new(steps.len() as u32, Limits::default(), S(0));
        for (rank, step) in steps.iter().enumerate() {
            tracker.feed(rank as u32, Some(*step), &[], Some("train"), S(*step));
        }
        tracker
    }

    fn inspection(rank: u32, state: char, syscall: &str) -> Inspection {
        let thread = Thread {
            tid: 100 + rank as i32,
            name: "python".into(),
            state,
            syscall: Some(syscall.into()),
            ..Thread::default()
        };
        Inspection {
            rank,
            host: format!("gpu-0{}", rank / 2),
            device: format!("GPU {}", rank % 2),
            process: Process {
                pid: 100 + rank as i32,
                command: Some("python train.py".into()),
                rss_bytes: 3 << 30,
                threads: vec![thread],
                ..Process::default()
            },
        }
    }

    fn waiting(ranks: std::ops::Range<u32>) -> Vec<Inspection> {
        ranks.map(|rank| inspection(rank, 'S', "futex")).collect()
    }

    #[test]
    fn the_late_rank_comes_first_and_in_full() {
        let mut inspections = waiting(0..4);
        inspections[2] = inspection(2, 'S', "read of fd 5 (/data/a.avi)");
        inspections[2].process.stack = Some(Stack {
            pid: 102,
            tool: "gdb".into(),
            text: "Thread 1\n#0 read\n".into(),
        });
        let found = report(&tracker(&[42, 42, 41, 42]), &inspections, None, S(642));
        assert_eq!(found.late, [2]);
        assert_eq!(
            found.text,
            "\
no rank made a step in 10m (limit 10m): rank 2 is at step 41, 3 ranks at step 42 or further wait

late: rank 2 on gpu-01, GPU 0: step 41, section train, last moved 10m 1s ago
  process 102, 3072 MiB: python train.py
    main thread: waiting in read of fd 5 (/data/a.avi)
  stacks of process 102 by gdb:
    Thread 1
    #0 read

others: ranks 0-1,3, of which rank 0 on gpu-00, GPU 0: step 42, section train, last moved 10m ago
  process 100, 3072 MiB: python train.py
    main thread: waiting in futex
"
        );
    }

    #[test]
    fn at_one_step_a_stuck_process_is_late() {
        let mut inspections = waiting(0..4);
        inspections[3] = inspection(3, 'D', "read of fd 5 (/nfs/a.avi)");
        let found = report(&tracker(&[41; 4]), &inspections, None, S(700));
        assert_eq!(found.late, [3]);
        assert!(found.reason.contains("/nfs/a.avi"), "{}", found.reason);
    }

    #[test]
    fn at_one_step_one_that_does_something_else_is_late_among_many() {
        let mut inspections = waiting(0..8);
        inspections[6] = inspection(6, 'S', "recvfrom of fd 9 (TCP 10.0.0.1:1 to 10.0.0.2:2)");
        let found = report(&tracker(&[41; 8]), &inspections, None, S(700));
        assert_eq!(found.late, [6]);
        assert!(
            found.reason.ends_with("the others: waiting in futex"),
            "{}",
            found.reason
        );
        // One of two is no exception.
        let found = report(&tracker(&[41; 2]), &inspections[5..7], None, S(700));
        assert_eq!(found.late, [0u32; 0]);
        assert!(found.text.contains("all ranks are at step 41"));
    }

    #[test]
    fn what_nccl_knows_counts_before_what_threads_do() {
        let ras = "\
    0         1         4         8         8        32   RUNNING  INCOMPLETE
INCOMPLETE
  Missing communicator data from 1 job process
  Process 105 on node 10.0.0.3 managing GPU 1
#0-0 (cf264af53edbe986) INCOMPLETE
  Missing communicator data from 1 rank
  The missing rank: 5
";
        let mut inspections = waiting(0..8);
        inspections[6] = inspection(6, 'S', "recvfrom");
        let found = report(
            &tracker(&[41; 8]),
            &inspections,
            Some(&Answer::new(ras)),
            S(700),
        );
        assert_eq!(found.late, [5]);
        assert!(
            found.text.ends_with(
                "NCCL says:\n  no answer from process 105 on 10.0.0.3 GPU 1\n  communicator cf264af53edbe986 of 8 ranks: no data from rank 5\n"
            ),
            "{}",
            found.text
        );
    }

    #[test]
    fn what_is_not_understood_is_shown() {
        let shown = |answer: &str| {
            let answer = Answer::new(answer);
            report(&tracker(&[41; 2]), &[], Some(&answer), S(700)).text
        };
        assert!(shown("Job summary\nfine\n").ends_with("NCCL says:\n  Job summary\n  fine\n"));
        let fine = shown("{\"communicators\": [{\"hash\": \"0x1\"}]}");
        assert!(
            fine.contains("its 1 communicator answers, and none"),
            "{fine}"
        );
    }

    #[test]
    fn a_node_that_gave_no_answer_is_no_obstacle() {
        let found = report(&tracker(&[41, 42]), &[], None, S(700));
        assert_eq!(found.late, [0]);
        assert!(found.text.contains("its node gave no answer"));
    }
}
