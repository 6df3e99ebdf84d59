//! A [`Snapshot`] as Prometheus reads it: text format 0.0.4.

use std::fmt::Write;

use super::{RankStatus, Snapshot};

/// Goes with [`render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

const PHASES: [&str; 6] = ["gather", "form", "run", "stop", "backoff", "finished"];

/// All metrics of a job.
pub fn render(snapshot: &Snapshot) -> String {
    let mut page = Page {
        text: String::with_capacity(4096 + 512 * snapshot.ranks.len()),
        family: "",
    };
    let run_dir = snapshot.run_dir.to_string_lossy();
    page.family("tsm_job_info", "gauge", "The job, always 1.");
    page.sample(&[("run_id", &snapshot.run_id), ("run_dir", &run_dir)], 1.0);
    page.family("tsm_phase", "gauge", "1 for the phase that the job is in.");
    for phase in PHASES {
        page.sample(&[("phase", phase)], bit(snapshot.phase == phase));
    }
    let generation = f64::from(snapshot.generation);
    let restarts = snapshot.restarts.len() as f64;
    let world_size = f64::from(snapshot.world_size);
    for (name, kind, help, value) in [
        (
            "tsm_generation",
            "gauge",
            "Starts of the ranks, counted from 0.",
            generation,
        ),
        (
            "tsm_restarts_total",
            "counter",
            "Starts after the first.",
            restarts,
        ),
        (
            "tsm_world_size",
            "gauge",
            "Ranks of this generation.",
            world_size,
        ),
        (
            "tsm_elapsed_seconds",
            "gauge",
            "Since the launcher started.",
            snapshot.elapsed_s,
        ),
    ] {
        page.family(name, kind, help);
        page.sample(&[], value);
    }
    if let Some(goodput) = snapshot.goodput {
        let help = "Time of steps that were kept, over all time.";
        page.family("tsm_goodput_ratio", "gauge", help);
        page.sample(&[], goodput);
    }
    page.family("tsm_metric", "gauge", "What rank 0 reported last.");
    for (name, value) in &snapshot.metrics {
        page.sample(&[("name", name)], *value);
    }
    nodes(&mut page, snapshot);
    ranks(&mut page, &snapshot.ranks);
    page.text
}

fn nodes(page: &mut Page, snapshot: &Snapshot) {
    // Two nodes may have one name; a series may be there only once.
    let labels: Vec<(String, &str)> = snapshot
        .nodes
        .iter()
        .enumerate()
        .map(|(i, node)| (i.to_string(), node.host.as_str()))
        .collect();
    page.family(
        "tsm_node_state",
        "gauge",
        "1 for the state that the node is in.",
    );
    for ((i, host), node) in labels.iter().zip(&snapshot.nodes) {
        page.sample(&[("node", i), ("host", host), ("state", &node.state)], 1.0);
    }
    type Get = fn(&super::NodeStatus) -> f64;
    let gauges: [(&str, &str, Get); 5] = [
        ("tsm_node_ranks", "Ranks on the node.", |n| {
            f64::from(n.num_ranks)
        }),
        ("tsm_node_load1", "One-minute load average.", |n| {
            f64::from(n.load)
        }),
        ("tsm_node_memory_used_bytes", "Memory in use.", |n| {
            n.mem_used_bytes as f64
        }),
        ("tsm_node_memory_total_bytes", "Memory of the node.", |n| {
            n.mem_total_bytes as f64
        }),
        (
            "tsm_node_rtt_seconds",
            "Round trip to the coordinator.",
            |n| f64::from(n.rtt_ms) / 1e3,
        ),
    ];
    for (name, help, get) in gauges {
        page.family(name, "gauge", help);
        for ((i, host), node) in labels.iter().zip(&snapshot.nodes) {
            page.sample(&[("node", i), ("host", host)], get(node));
        }
    }
}

fn ranks(page: &mut Page, ranks: &[RankStatus]) {
    page.family(
        "tsm_rank_state",
        "gauge",
        "1 for the state that the rank is in.",
    );
    for rank in ranks {
        let number = rank.rank.to_string();
        let labels = [
            ("rank", number.as_str()),
            ("host", &rank.host),
            ("device", &rank.device),
            ("state", &rank.state),
        ];
        page.sample(&labels, 1.0);
    }
    type Get = fn(&RankStatus) -> Option<f64>;
    let gauges: [(&str, &str, Get); 4] = [
        ("tsm_rank_step", "Optimizer steps finished.", |r| {
            r.step.map(|s| s as f64)
        }),
        ("tsm_rank_epoch", "Epoch of the last step, from 1.", |r| {
            r.epoch.map(f64::from)
        }),
        ("tsm_rank_step_age_seconds", "Since the last step.", |r| {
            r.step_age_s
        }),
        (
            "tsm_rank_work_seconds",
            "Median time of a step, without waiting for other ranks.",
            |r| r.work_ms.map(|ms| ms / 1e3),
        ),
    ];
    for (name, help, get) in gauges {
        page.family(name, "gauge", help);
        for rank in ranks {
            if let Some(value) = get(rank) {
                let number = rank.rank.to_string();
                page.sample(&[("rank", &number), ("host", &rank.host)], value);
            }
        }
    }
}

fn bit(is: bool) -> f64 {
    f64::from(u8::from(is))
}

/// The text so far; samples belong to the last family.
struct Page {
    text: String,
    family: &'static str,
}

impl Page {
    fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        self.family = name;
        // Writing into memory cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: f64) {
        self.text.push_str(self.family);
        for (i, (key, value)) in labels.iter().enumerate() {
            self.text.push(if i == 0 { '{' } else { ',' });
            self.text.push_str(key);
            self.text.push_str("=\"");
            for c in value.chars() {
                match c {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    c => self.text.push(c),
                }
            }
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = match value {
            f64::INFINITY => writeln!(self.text, " +Inf"),
            f64::NEG_INFINITY => writeln!(self.text, " -Inf"),
            v => writeln!(self.text, " {v}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{NodeStatus, Restart};
    use proptest::prelude::*;
    use std::collections::HashSet;

    /// Reads the format strictly; panics where it is broken. All series with their values.
    fn parse(text: &str) -> Vec<(String, f64)> {
        let (mut types, mut series) = (HashSet::new(), Vec::new());
        let (mut family, mut seen) = (String::new(), HashSet::new());
        for line in text
            .strip_suffix('\n')
            .expect("the last line ends")
            .split('\n')
        {
            if let Some(help) = line.strip_prefix("# HELP ") {
                family = help.split_once(' ').expect("a help text").0.into();
                continue;
            }
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').expect("a type");
                assert!(name == family && ["gauge", "counter"].contains(&kind));
                assert!(types.insert(name.to_string()), "{name} is there twice");
                continue;
            }
            let name_end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
            let (name, rest) = line.split_at(name_end.expect("a value"));
            assert_eq!(name, family, "samples of a family stand together");
            let mut chars = rest.chars();
            let mut inside = false;
            if rest.starts_with('{') {
                while let Some(c) = chars.next() {
                    match c {
                        '\\' if inside => assert!("\\\"n".contains(chars.next().expect("escaped"))),
                        '"' => inside = !inside,
                        '}' if !inside => break,
                        _ => {}
                    }
                }
            }
            assert!(!inside);
            let value = chars.as_str().strip_prefix(' ').expect("a space");
            let value = value.replace("Inf", "inf").parse().expect("a number");
            let key = line[..line.len() - chars.as_str().len()].to_string();
            assert!(seen.insert(key.clone()), "{key} is there twice");
            series.push((key, value));
        }
        series
    }

    fn value(series: &[(String, f64)], key: &str) -> f64 {
        let found = series.iter().find(|(name, _)| name == key);
        found.unwrap_or_else(|| panic!("{key} is missing")).1
    }

    #[test]
    fn all_there_is_to_know() {
        let node = NodeStatus {
            host: "gpu-01".into(),
            state: "running".into(),
            num_ranks: 1,
            rtt_ms: 0.5,
            ..NodeStatus::default()
        };
        let rank = RankStatus {
            host: "gpu-01".into(),
            state: "slow".into(),
            step: Some(17),
            work_ms: Some(250.0),
            ..RankStatus::default()
        };
        let job = Snapshot {
            run_id: "a \"b\"\\\n".into(),
            phase: "run".into(),
            nodes: vec![node.clone(), node],
            ranks: vec![rank],
            restarts: vec![Restart::default()],
            metrics: [("loss".to_string(), f64::NAN), ("lr".into(), 0.01)].into(),
            ..Snapshot::default()
        };
        let text = render(&job);
        let series = parse(&text);
        assert!(
            text.contains(r#"tsm_job_info{run_id="a \"b\"\\\n",run_dir=""} 1"#),
            "{text}"
        );
        assert_eq!(value(&series, r#"tsm_phase{phase="run"}"#), 1.0);
        assert_eq!(value(&series, r#"tsm_phase{phase="stop"}"#), 0.0);
        assert_eq!(value(&series, "tsm_restarts_total"), 1.0);
        assert_eq!(value(&series, r#"tsm_metric{name="lr"}"#), 0.01);
        assert!(value(&series, r#"tsm_metric{name="loss"}"#).is_nan());
        assert_eq!(
            value(&series, r#"tsm_node_rtt_seconds{node="1",host="gpu-01"}"#),
            5e-4
        );
        assert_eq!(
            value(&series, r#"tsm_rank_step{rank="0",host="gpu-01"}"#),
            17.0
        );
        assert_eq!(
            value(&series, r#"tsm_rank_work_seconds{rank="0",host="gpu-01"}"#),
            0.25
        );
        assert!(!text.contains("tsm_rank_epoch{"));
    }

    proptest! {
        #[test]
        fn whatever_the_names_are_the_format_is_kept(names in proptest::collection::vec(".{0,20}", 4), v in any::<f64>()) {
            let node = NodeStatus { host: names[1].clone(), state: names[2].clone(), ..NodeStatus::default() };
            let rank = RankStatus { host: names[1].clone(), device: names[3].clone(), step_age_s: Some(v), ..RankStatus::default() };
            parse(&render(&Snapshot {
                run_id: names[0].clone() + "\n",
                run_dir: names[3].clone().into(),
                nodes: vec![node],
                ranks: vec![rank],
                metrics: [(names[2].clone(), v)].into(),
                ..Snapshot::default()
            }));
        }
    }
}
