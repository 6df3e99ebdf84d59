//! What was measured, as JSON and as a table.

use super::tools::Tool;
use crate::machine;
use crate::stats::Spread;
use serde::Serialize;
use std::fmt::Write as _;

/// What a good value is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

/// Units of what is worth a ratio; the others are counts.
const COMPARED: [&str; 3] = ["ms", "lines/s", "MiB"];

/// One quantity under one condition.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Case {
    pub metric: &'static str,
    /// What from and what to.
    pub name: String,
    pub unit: &'static str,
    pub goal: Option<Goal>,
}

impl Case {
    pub fn new(
        metric: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        goal: Option<Goal>,
    ) -> Case {
        Case {
            metric,
            name: name.into(),
            unit,
            goal,
        }
    }
}

/// One observation: a value, or how long it was waited for in vain.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen {
    Value(f64),
    NotWithinS(f64),
}

/// One case with one launcher.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub case: Case,
    pub tool: &'static str,
    pub seen: Vec<Seen>,
    /// Of the values.
    pub spread: Option<Spread>,
    /// How many times better ours is, by the medians.
    pub ours_better: Option<f64>,
    /// One-minute load average before each observation.
    pub load: Vec<f64>,
    /// What kept it from being measured.
    pub errors: Vec<String>,
}

/// All rows of a run, in the order in which their cases came up.
#[derive(Default)]
pub struct Rows(Vec<Row>);

impl Rows {
    fn row(&mut self, case: &Case, tool: Tool) -> &mut Row {
        let tool = tool.name();
        if let Some(i) = self
            .0
            .iter()
            .position(|r| r.case == *case && r.tool == tool)
        {
            return &mut self.0[i];
        }
        // Rows of a case stay together.
        let of_case = self.0.iter().rposition(|r| r.case == *case);
        let i = of_case.map_or(self.0.len(), |i| i + 1);
        let row = Row {
            case: case.clone(),
            tool,
            seen: Vec::new(),
            spread: None,
            ours_better: None,
            load: Vec::new(),
            errors: Vec::new(),
        };
        self.0.insert(i, row);
        &mut self.0[i]
    }

    pub fn add(&mut self, case: &Case, tool: Tool, seen: Seen, load: f64) {
        let row = self.row(case, tool);
        row.seen.push(seen);
        row.load.push(load);
    }

    pub fn failed(&mut self, case: &Case, tool: Tool, error: String) {
        self.row(case, tool).errors.push(error);
    }

    /// Whether something of ours could not be measured.
    pub fn ours_failed(&self) -> bool {
        self.0
            .iter()
            .any(|r| r.tool == Tool::TsmLaunch.name() && !r.errors.is_empty())
    }

    /// With spreads and ratios.
    pub fn finished(&self) -> Vec<Row> {
        let mut rows = self.0.clone();
        for row in &mut rows {
            let value = |seen: &Seen| match seen {
                Seen::Value(value) => Some(*value),
                Seen::NotWithinS(_) => None,
            };
            let values: Vec<f64> = row.seen.iter().filter_map(value).collect();
            row.spread = Spread::of(&values);
        }
        let medians: Vec<_> = rows
            .iter()
            .map(|r| (r.case.clone(), r.tool, r.spread.as_ref().map(|s| s.median)))
            .collect();
        let compared =
            |r: &&mut Row| r.tool != Tool::TsmLaunch.name() && COMPARED.contains(&r.case.unit);
        for row in rows.iter_mut().filter(compared) {
            let ours = medians
                .iter()
                .find(|(case, tool, _)| *case == row.case && *tool == Tool::TsmLaunch.name());
            let (Some((_, _, Some(ours))), Some(theirs)) = (ours, &row.spread) else {
                continue;
            };
            let ratio = match row.case.goal {
                Some(Goal::AtLeast(_)) => ours / theirs.median,
                _ => theirs.median / ours,
            };
            row.ours_better = ratio.is_finite().then_some(ratio);
        }
        rows
    }
}

/// Everything about a run.
#[derive(Serialize)]
pub struct Report {
    pub benchmark: &'static str,
    pub unix_s: u64,
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
    pub version: &'static str,
    pub commit: Option<String>,
    /// Name and version, or why it was not measured.
    pub tools: Vec<(&'static str, Result<String, String>)>,
    pub rounds: usize,
    pub rows: Vec<Row>,
}

impl Report {
    pub fn new(
        tools: Vec<(&'static str, Result<String, String>)>,
        rounds: usize,
        rows: &Rows,
    ) -> Report {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Report {
            benchmark: "launch",
            unix_s: since.map_or(0, |t| t.as_secs()),
            cpu: machine::cpu_model(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: machine::kernel(),
            version: env!("CARGO_PKG_VERSION"),
            commit: machine::commit(),
            tools,
            rounds,
            rows: rows.finished(),
        }
    }

    pub fn markdown(&self) -> String {
        let mut out = String::from(
            "# The launcher beside torchrun, srun and mpirun\n\nGenerated by `tsm-bench launch`.",
        );
        let commit = self
            .commit
            .as_ref()
            .map(|c| format!(" ({c})"))
            .unwrap_or_default();
        let _ = writeln!(
            out,
            " {}, {} cores, Linux {}; tsm-launch {}{commit}.",
            self.cpu, self.cores, self.kernel, self.version
        );
        let loads: Vec<f64> = self
            .rows
            .iter()
            .flat_map(|r| r.load.iter().copied())
            .collect();
        if let Some(load) = Spread::of(&loads) {
            let _ = writeln!(
                out,
                "In turn, {} rounds where no other number stands; median [min-max]; load average {:.1} [{:.1}-{:.1}].",
                self.rounds, load.median, load.min, load.max
            );
        }
        for (name, version) in &self.tools {
            let _ = match version {
                Ok(version) => writeln!(out, "- {name}: {version}"),
                Err(why) => writeln!(out, "- {name}: not measured, {why}"),
            };
        }
        let tools: Vec<&str> = self
            .tools
            .iter()
            .filter(|(_, v)| v.is_ok())
            .map(|(name, _)| *name)
            .collect();
        let _ = writeln!(
            out,
            "\n`5x`: so many times better is tsm-launch, by the medians.\n"
        );
        let _ = writeln!(
            out,
            "| | | {} | goal |\n|---|---|{}---|",
            tools.join(" | "),
            "---|".repeat(tools.len())
        );
        let mut cases: Vec<&Case> = Vec::new();
        for row in &self.rows {
            if !cases.contains(&&row.case) {
                cases.push(&row.case);
            }
        }
        for case in cases {
            let of = |tool: &str| self.rows.iter().find(|r| r.case == *case && r.tool == tool);
            let cells: Vec<String> = tools
                .iter()
                .map(|tool| of(tool).map_or("-".into(), |r| self.cell(r)))
                .collect();
            let ours = of(Tool::TsmLaunch.name()).and_then(|r| r.spread.as_ref());
            let goal = match (case.goal, ours) {
                (None, _) => "-".into(),
                (Some(goal), ours) => judge(goal, ours.map(|s| s.median)),
            };
            let _ = writeln!(
                out,
                "| {}: {} | {} | {} | {goal} |",
                case.metric,
                case.name,
                case.unit,
                cells.join(" | ")
            );
        }
        let errors: Vec<String> = self
            .rows
            .iter()
            .flat_map(|r| {
                r.errors.iter().map(move |e| {
                    format!(
                        "- {}: {}, {}: {}",
                        r.case.metric,
                        r.case.name,
                        r.tool,
                        e.replace('\n', " / ")
                    )
                })
            })
            .collect();
        if !errors.is_empty() {
            let _ = writeln!(out, "\nNot measured:\n{}", errors.join("\n"));
        }
        out
    }

    fn cell(&self, row: &Row) -> String {
        let mut cell = match &row.spread {
            Some(s) if s.samples == 1 => number(s.median),
            Some(s) => format!("{} [{}-{}]", number(s.median), number(s.min), number(s.max)),
            None => String::new(),
        };
        if let Some(ratio) = row.ours_better {
            let _ = write!(cell, ", {}x", number(ratio));
        }
        let vain: Vec<f64> = row
            .seen
            .iter()
            .filter_map(|s| match s {
                Seen::NotWithinS(s) => Some(*s),
                Seen::Value(_) => None,
            })
            .collect();
        if let Some(waited) = vain.first() {
            let times = if vain.len() == row.seen.len() {
                String::new()
            } else {
                format!("; {} of {}", vain.len(), row.seen.len())
            };
            let _ = write!(cell, "{times} not within {} s", number(*waited));
        }
        if !row.errors.is_empty() {
            let _ = write!(cell, " failed {}x", row.errors.len());
        } else if row.seen.len() != self.rounds {
            let _ = write!(cell, " (n={})", row.seen.len());
        }
        cell.trim_start_matches([';', ' ']).to_owned()
    }
}

fn judge(goal: Goal, ours: Option<f64>) -> String {
    let (text, met) = match goal {
        Goal::AtMost(most) => (
            format!("<= {}", number(most)),
            ours.is_some_and(|v| v <= most),
        ),
        Goal::AtLeast(least) => (
            format!(">= {}", number(least)),
            ours.is_some_and(|v| v >= least),
        ),
    };
    format!("{text}: {}", if met { "met" } else { "missed" })
}

/// Three digits that say something.
fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 1e6 {
        format!("{:.2}M", value / 1e6)
    } else if size >= 100.0 || value.fract() == 0.0 {
        format!("{value:.0}")
    } else if size >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Rows {
        let mut rows = Rows::default();
        let start = Case::new("start", "8 ranks", "ms", Some(Goal::AtMost(60.0)));
        let logs = Case::new("logs", "4 ranks", "lines/s", Some(Goal::AtLeast(1e6)));
        for (ours, theirs) in [(30.0, 2000.0), (40.0, 1800.0), (50.0, 2400.0)] {
            rows.add(&start, Tool::TsmLaunch, Seen::Value(ours), 0.5);
            rows.add(&logs, Tool::TsmLaunch, Seen::Value(900_000.0), 0.5);
            rows.add(&start, Tool::Torchrun, Seen::Value(theirs), 0.7);
            rows.add(&logs, Tool::Torchrun, Seen::NotWithinS(5.0), 0.7);
        }
        rows
    }

    #[test]
    fn ratios_are_of_medians_and_say_how_much_better_ours_is() {
        let rows = rows().finished();
        let names: Vec<_> = rows.iter().map(|r| (r.case.metric, r.tool)).collect();
        assert_eq!(
            names,
            [
                ("start", "tsm-launch"),
                ("start", "torchrun"),
                ("logs", "tsm-launch"),
                ("logs", "torchrun")
            ]
        );
        assert_eq!(rows[1].ours_better, Some(50.0));
        assert_eq!((rows[0].ours_better, rows[3].ours_better), (None, None));
        assert_eq!(rows[0].load, [0.5; 3]);
    }

    #[test]
    fn the_table_has_a_line_for_each_case() {
        let mut all = rows();
        let case = Case::new("start", "64 ranks", "ms", None);
        all.failed(&case, Tool::Torchrun, "it\nbroke".into());
        assert!(!all.ours_failed());
        let tools = [Tool::TsmLaunch, Tool::Torchrun].map(|t| (t.name(), Ok("1".into())));
        let no = (Tool::Srun.name(), Err("no SLURM cluster answers".into()));
        let report = Report::new([tools.as_slice(), &[no]].concat(), 3, &all);
        let table = report.markdown();
        for line in [
            "| start: 8 ranks | ms | 40 [30-50] | 2000 [1800-2400], 50x | <= 60: met |",
            "| logs: 4 ranks | lines/s | 900000 [900000-900000] | not within 5 s | >= 1.00M: missed |",
            "| start: 64 ranks | ms | - | failed 1x | - |",
            "- srun: not measured, no SLURM cluster answers",
            "- start: 64 ranks, torchrun: it / broke",
        ] {
            assert!(table.contains(line), "{line}\n{table}");
        }
    }

    #[test]
    fn numbers_have_three_digits() {
        let shown: Vec<_> = [0.394, 4.0, 12.34, 1234.5, 1_234_567.0].map(number).into();
        assert_eq!(shown, ["0.39", "4", "12.3", "1234", "1.23M"]);
    }
}
