//! The lines at the bottom of a terminal that tell how a job is doing.

use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::watch;

use super::{NodeStatus, RankStatus, Snapshot};
use crate::console::{cells, fit};
use crate::text::count;

/// Nodes that have a line of their own.
const NODES: usize = 8;
/// Slow and late ranks that are named.
const NAMED: usize = 4;

/// The view of a job as it is now, for [`crate::console::screen::Screen`].
pub struct View {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    colour: bool,
}

impl View {
    /// `colour`: see [`wants_colour`].
    pub fn new(snapshots: watch::Receiver<Arc<Snapshot>>, colour: bool) -> View {
        View { snapshots, colour }
    }

    /// What to show now on a terminal of `width` cells.
    pub fn lines(&mut self, width: usize) -> Vec<String> {
        // Cloned, so that the one who sends does not wait for the drawing.
        let snapshot = Arc::clone(&self.snapshots.borrow());
        let lines = render(&snapshot, width);
        if self.colour { paint(lines) } else { lines }
    }
}

/// Whether the environment lets us use colours: see <https://no-color.org>.
pub fn wants_colour(get: impl Fn(&str) -> Option<String>) -> bool {
    get("NO_COLOR").is_none_or(|value| value.is_empty()) && get("TERM").is_none_or(|t| t != "dumb")
}

/// The view in plain text: no line is wider than `width - 1` cells, so that none wraps.
pub fn render(snapshot: &Snapshot, width: usize) -> Vec<String> {
    let width = width.saturating_sub(1);
    let mut lines = vec![row(&job(snapshot), width), row(&training(snapshot), width)];
    lines.extend(nodes(snapshot, width));
    lines.extend(trouble(snapshot).iter().map(|text| fit(text, width)));
    lines.retain(|line| !line.is_empty());
    lines
}

/// As many of `parts` as fit side by side, the first one cut where it must be.
fn row(parts: &[String], width: usize) -> String {
    let mut line = String::new();
    for part in parts.iter().filter(|part| !part.is_empty()) {
        if line.is_empty() {
            line = fit(part, width);
        } else if cells(&line) + 2 + cells(part) <= width {
            line.push_str("  ");
            line.push_str(&fit(part, width));
        } else {
            break;
        }
    }
    line
}

fn job(snapshot: &Snapshot) -> Vec<String> {
    let hosts = snapshot.nodes.iter().filter(|n| n.num_ranks > 0).count();
    let ranks = match hosts {
        0 => String::new(),
        _ => format!(
            "{} on {}",
            count(snapshot.world_size, "rank"),
            count(hosts, "node")
        ),
    };
    let restarts = match snapshot.restarts.last() {
        None => String::new(),
        Some(last) => format!(
            "{}, last: {}",
            count(snapshot.restarts.len(), "restart"),
            last.cause.lines().next().unwrap_or_default()
        ),
    };
    vec![
        snapshot.run_id.clone(),
        snapshot.phase.clone(),
        elapsed(snapshot.elapsed_s),
        ranks,
        match snapshot.generation {
            0 => String::new(),
            n => format!("generation {n}"),
        },
        restarts,
    ]
}

fn training(snapshot: &Snapshot) -> Vec<String> {
    let Some(step) = snapshot.ranks.iter().filter_map(|rank| rank.step).max() else {
        return Vec::new();
    };
    let rank = snapshot.ranks.iter().find(|rank| rank.step == Some(step));
    let epoch = rank.and_then(|rank| rank.epoch);
    let metric = |name: &str| snapshot.metrics.get(name).map(|&value| number(value));
    let named = |name: &str| metric(name).map_or(String::new(), |v| format!("{name} {v}"));
    let mut parts = vec![
        format!("step {step}"),
        epoch.map_or(String::new(), |epoch| format!("epoch {epoch}")),
        metric("clips_per_s").map_or(String::new(), |v| format!("{v} clips/s")),
        named("loss"),
        named("lr"),
        snapshot.goodput.map_or(String::new(), |goodput| {
            format!("goodput {:.0}%", (goodput * 100.0).clamp(0.0, 100.0))
        }),
    ];
    let known = ["clips_per_s", "loss", "lr"];
    let others = snapshot
        .metrics
        .keys()
        .filter(|n| !known.contains(&n.as_str()));
    parts.extend(others.map(|name| named(name)));
    parts
}

/// A line per node; of many, those in trouble and the first ones, and the rest in numbers.
fn nodes(snapshot: &Snapshot, width: usize) -> Vec<String> {
    let in_order = |node: &&NodeStatus| node.state == "running" || node.state == "spare";
    let (fine, bad): (Vec<&NodeStatus>, Vec<&NodeStatus>) =
        snapshot.nodes.iter().partition(in_order);
    let mut shown: Vec<&NodeStatus> = bad.into_iter().chain(fine).collect();
    let rest = match shown.len() {
        0..=NODES => Vec::new(),
        _ => shown.split_off(NODES - 1),
    };
    let host_width = shown.iter().map(|node| cells(&node.host)).max();
    let host_width = host_width.unwrap_or(0);
    let mut steps: BTreeMap<&str, u64> = BTreeMap::new();
    for rank in &snapshot.ranks {
        if let Some(step) = rank.step {
            let last = steps.entry(&rank.host).or_default();
            *last = step.max(*last);
        }
    }
    let mut lines: Vec<String> = shown
        .iter()
        .map(|node| {
            let pad = host_width - cells(&node.host);
            let host = fit(&node.host, width) + &" ".repeat(pad);
            let ranks = match (node.first_rank, node.num_ranks) {
                (Some(first), 1) => format!("rank {first}"),
                (Some(first), n) if n > 1 => format!("ranks {first}-{}", first + n - 1),
                _ => String::new(),
            };
            let step = steps.get(node.host.as_str());
            let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            let memory = match node.mem_total_bytes {
                0 => String::new(),
                total => format!("mem {:.0}/{:.0} GiB", gib(node.mem_used_bytes), gib(total)),
            };
            let parts = [
                host,
                node.state.clone(),
                ranks,
                step.map_or(String::new(), |step| format!("step {step}")),
                format!("load {:.1}", node.load),
                memory,
                format!("rtt {:.1} ms", node.rtt_ms),
            ];
            row(&parts, width)
        })
        .collect();
    if !rest.is_empty() {
        let mut states: BTreeMap<&str, usize> = BTreeMap::new();
        rest.iter()
            .for_each(|node| *states.entry(&node.state).or_default() += 1);
        let states: Vec<String> = states.iter().map(|(s, n)| format!("{n} {s}")).collect();
        let number = count(rest.len(), "more node");
        lines.push(row(
            &[format!("and {number}: {}", states.join(", "))],
            width,
        ));
    }
    lines
}

/// Ranks that hold the others up.
fn trouble(snapshot: &Snapshot) -> Vec<String> {
    let list = |state: &str, tell: &dyn Fn(&RankStatus) -> String| {
        let ranks: Vec<_> = snapshot.ranks.iter().filter(|r| r.state == state).collect();
        let named: Vec<String> = ranks
            .iter()
            .take(NAMED)
            .map(|r| format!("rank {} ({}{})", r.rank, r.host, tell(r)))
            .collect();
        let more = match ranks.len().saturating_sub(NAMED) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        (!named.is_empty()).then(|| format!("{state}: {}{more}", named.join(", ")))
    };
    let work = |r: &RankStatus| {
        r.work_ms
            .map_or(String::new(), |ms| format!(", {} ms a step", number(ms)))
    };
    let age = |r: &RankStatus| {
        let section = r
            .section
            .as_ref()
            .map_or(String::new(), |s| format!(", {s}"));
        let age = r
            .step_age_s
            .map_or(String::new(), |s| format!(", no step for {}", elapsed(s)));
        section + &age
    };
    [list("slow", &work), list("late", &age)]
        .into_iter()
        .flatten()
        .collect()
}

/// `4 s`, `12m 03s`, `1h 02m`.
fn elapsed(seconds: f64) -> String {
    let s = seconds.max(0.0) as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{}m {:02}s", s / 60, s % 60),
        _ => format!("{}h {:02}m", s / 3600, s / 60 % 60),
    }
}

/// A few digits that tell enough.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        v if v >= 1000.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.2}"),
        v if v >= 1e-3 => format!("{value:.4}"),
        v if v.is_nan() => "nan".into(),
        _ => format!("{value:.1e}"),
    }
}

/// The job bold, what is wrong yellow, the rest as it is.
fn paint(lines: Vec<String>) -> Vec<String> {
    lines
        .into_iter()
        .enumerate()
        .map(|(i, line)| {
            let wrong = line.starts_with("slow: ") || line.starts_with("late: ");
            match (i, wrong) {
                (0, _) => format!("\x1b[1m{line}\x1b[0m"),
                (_, true) => format!("\x1b[33m{line}\x1b[0m"),
                _ => line,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Restart;
    use proptest::prelude::*;

    fn snapshot(num_nodes: u32, per_node: u32) -> Snapshot {
        let node = |i: u32| NodeStatus {
            host: format!("gpu-{i:02}"),
            state: "running".into(),
            first_rank: Some(i * per_node),
            num_ranks: per_node,
            load: 7.25,
            mem_used_bytes: 34 << 30,
            mem_total_bytes: 512 << 30,
            rtt_ms: 0.31,
        };
        let rank = |rank: u32| RankStatus {
            rank,
            host: format!("gpu-{:02}", rank / per_node),
            state: "running".into(),
            step: Some(1200),
            epoch: Some(3),
            ..RankStatus::default()
        };
        let metrics = [("loss", 2.3144), ("clips_per_s", 812.31), ("lr", 0.01)];
        Snapshot {
            run_id: "demo-20260131-120000".into(),
            phase: "run".into(),
            world_size: num_nodes * per_node,
            elapsed_s: 723.4,
            goodput: Some(0.968),
            nodes: (0..num_nodes).map(node).collect(),
            ranks: (0..num_nodes * per_node).map(rank).collect(),
            metrics: metrics.map(|(n, v)| (n.to_string(), v)).into(),
            ..Snapshot::default()
        }
    }

    #[test]
    fn one_node() {
        let lines = render(&snapshot(1, 8), 100);
        let expected = [
            "demo-20260131-120000  run  12m 03s  8 ranks on 1 node",
            "step 1200  epoch 3  812.31 clips/s  loss 2.31  lr 0.0100  goodput 97%",
            "gpu-00  running  ranks 0-7  step 1200  load 7.2  mem 34/512 GiB  rtt 0.3 ms",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn trouble_is_named_and_a_lost_node_comes_first() {
        let mut job = snapshot(128, 8);
        job.generation = 2;
        job.restarts = vec![Restart {
            cause: "node gpu-07 was lost".into(),
            ..Restart::default()
        }];
        job.nodes[77].state = "lost".into();
        for rank in 13..20 {
            (job.ranks[rank].state, job.ranks[rank].work_ms) = ("slow".into(), Some(212.4));
        }
        let late = &mut job.ranks[40];
        (late.state, late.step_age_s) = ("late".into(), Some(75.0));
        late.section = Some("checkpoint".into());
        let lines = render(&job, 160);
        assert_eq!(
            lines[0],
            "demo-20260131-120000  run  12m 03s  1024 ranks on 128 nodes  generation 2  \
             1 restart, last: node gpu-07 was lost"
        );
        assert!(lines[2].starts_with("gpu-77  lost  ranks 616-623  "));
        assert!(lines[3].starts_with("gpu-00  running  "));
        assert_eq!(lines[9], "and 121 more nodes: 121 running");
        assert_eq!(
            lines[10],
            "slow: rank 13 (gpu-01, 212.40 ms a step), rank 14 (gpu-01, 212.40 ms a step), \
             rank 15 (gpu-01, 212.40 ms a step), rank 16 (gpu-02, 212.40 ms a step) and 3 more"
        );
        assert_eq!(
            lines[11],
            "late: rank 40 (gpu-05, checkpoint, no step for 1m 15s)"
        );
        assert_eq!(lines.len(), 12);
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        assert!(render(&Snapshot::default(), 80).len() <= 1);
        let mut job = snapshot(2, 1);
        job.metrics = [("loss".to_string(), f64::NAN)].into();
        job.ranks[1].epoch = None;
        job.nodes[1] = NodeStatus {
            host: "gpu-01".into(),
            state: "spare".into(),
            ..NodeStatus::default()
        };
        let lines = render(&job, 80);
        assert_eq!(lines[1], "step 1200  epoch 3  loss nan  goodput 97%");
        assert_eq!(lines[3], "gpu-01  spare  step 1200  load 0.0  rtt 0.0 ms");
        job.ranks.clear();
        assert!(render(&job, 80)[1].starts_with("gpu-00"));
    }

    #[test]
    fn numbers_are_short() {
        let cases = [0.0, 12345.6, 99.0, 0.0125, 3e-5, -2.5, f64::INFINITY];
        let texts = ["0", "12346", "99.00", "0.0125", "3.0e-5", "-2.50", "inf"];
        assert_eq!(cases.map(number), texts);
        assert_eq!(
            [4.9, 62.0, 3720.0].map(elapsed),
            ["4 s", "1m 02s", "1h 02m"]
        );
    }

    #[test]
    fn colours_only_where_they_are_wanted() {
        let get = |set: &'static [(&str, &str)]| {
            move |name: &str| {
                let found = set.iter().find(|(n, _)| *n == name);
                found.map(|(_, value)| value.to_string())
            }
        };
        assert!(wants_colour(get(&[("TERM", "xterm")])));
        assert!(!wants_colour(get(&[("NO_COLOR", "1")])));
        assert!(wants_colour(get(&[("NO_COLOR", "")])));
        assert!(!wants_colour(get(&[("TERM", "dumb")])));
        let (sender, receiver) = watch::channel(Arc::new(snapshot(1, 1)));
        let mut view = View::new(receiver.clone(), true);
        assert!(view.lines(80)[0].starts_with("\x1b[1mdemo"));
        sender.send_replace(Arc::new(Snapshot {
            run_id: "other".into(),
            ..Snapshot::default()
        }));
        let mut plain = View::new(receiver, false);
        assert!(plain.lines(80)[0].starts_with("other"));
    }

    proptest! {
        #[test]
        fn no_line_wraps(width in 0usize..200, nodes in 0u32..40, name in "\\PC{0,60}", bad in 0usize..40) {
            let mut job = snapshot(nodes, 3);
            job.run_id = name.clone();
            if let Some(node) = job.nodes.get_mut(bad) {
                (node.host, node.state) = (name.clone(), "lost".into());
                job.ranks[bad].state = "late".into();
                job.ranks[bad].host = name + "\x1b[2J";
            }
            for line in render(&job, width) {
                prop_assert!(cells(&line) <= width.saturating_sub(1), "{line:?}");
                prop_assert!(!line.contains(|c: char| c.is_control()));
            }
        }
    }
}
