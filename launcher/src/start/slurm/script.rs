//! What a batch script says: a config and the options of the command line, as sbatch and a shell read them. Pure.

use std::ffi::OsString;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;
use tsm_job::Config;
use tsm_job::config::{DeviceKind, duration};
use tsm_job::exit::{self, Coded};

use super::job::time_limit;
use super::submit::Submit;
use crate::plan::shell;

/// SLURM tells a job of its time limit up to this much earlier than it was asked to.
const SIGNAL_SLACK: Duration = Duration::from_secs(60);

/// Everything that a batch script says.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Options of sbatch, one a line.
    pub sbatch: Vec<Sbatch>,
    /// As the user wrote them.
    pub extra: Vec<String>,
    pub setup: Vec<String>,
    /// What is executed.
    pub command: Vec<OsString>,
}

/// `--name=value`, or `--name`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sbatch {
    pub name: &'static str,
    pub value: Option<String>,
}

impl Submit {
    /// What the script says for a config that was loaded.
    ///
    /// # Errors
    /// [`exit::USAGE`] for options that cannot work together.
    pub fn options(
        &self,
        config: &Config,
        program: &Path,
        directory: &Path,
    ) -> Result<Options, Coded> {
        let refuse = |text: String| Coded::new(exit::USAGE, text);
        let gpus = match (self.gpus, self.cpus) {
            (None, None) if config.launch.device == DeviceKind::Gpu => Some(config.launch.nproc_per_node.ok_or_else(|| {
                let hint = "give --gpus N: SLURM has to know how many to allocate";
                refuse(format!("the config uses every GPU of a node (launch.nproc_per_node is null)\n  hint: {hint}"))
            })?),
            (gpus, _) => gpus,
        };
        let cpus = self.cpus.or(if gpus.is_none() {
            config.launch.nproc_per_node
        } else {
            None
        });
        if let Some(limit) = self.time.as_deref().and_then(time_limit)
            && limit <= self.signal_lead + SIGNAL_SLACK
        {
            let (lead, slack) = (duration::format(self.signal_lead), SIGNAL_SLACK.as_secs());
            let text = format!(
                "--time {} leaves no time to train: SLURM tells the job to save {lead} before its end, or up to {slack} s earlier\n  \
                 hint: give a longer --time, or a shorter --signal-lead",
                self.time.as_deref().unwrap_or_default()
            );
            return Err(refuse(text));
        }
        // SLURM keeps the lead as 16 bits of seconds.
        let lead = self.signal_lead.as_secs_f64().ceil() as u64;
        if !(1..=65_535).contains(&lead) {
            let given = duration::format(self.signal_lead);
            return Err(refuse(format!(
                "--signal-lead is {given}\n  hint: SLURM takes 1s to 65535s"
            )));
        }

        let name = config.run.name.clone();
        let root = directory.join(&config.run.dir);
        // The one sign that sbatch replaces in a file name.
        let output = |path: &Path| path.to_string_lossy().replace('%', "%%");
        let output = format!("{}/{name}-slurm-%j.out", output(&root));
        if output.contains('\\') {
            let text = format!(
                "{output:?} cannot be the job's output: SLURM replaces no %j in a path with a backslash"
            );
            return Err(refuse(format!(
                "{text}\n  hint: give another run.dir, or work in another folder"
            )));
        }
        let mut sbatch = Vec::new();
        let mut set = |name, value: Option<String>| sbatch.push(Sbatch { name, value });
        set("job-name", Some(self.job_name.clone().unwrap_or(name)));
        let given = [
            ("partition", &self.partition),
            ("account", &self.account),
            ("qos", &self.qos),
            ("constraint", &self.constraint),
            ("time", &self.time),
            ("mem", &self.mem),
        ];
        for (name, value) in given {
            if value.is_some() {
                set(name, value.clone());
            }
        }
        set("nodes", Some(self.nodes.to_string()));
        // tsm-launch starts an agent on each node, and each agent its own workers.
        set("ntasks-per-node", Some("1".into()));
        if let Some(gpus) = gpus {
            set("gpus-per-node", Some(gpus.to_string()));
        }
        // By task, not by GPU: with the latter some versions give a step fewer cores than the job has.
        match (cpus, gpus, self.cpus_per_gpu) {
            (Some(cpus), ..) => set("cpus-per-task", Some(cpus.to_string())),
            (None, Some(gpus), Some(each)) => set("cpus-per-task", Some((gpus * each).to_string())),
            _ => {}
        }
        set("signal", Some(format!("B:USR2@{lead}")));
        set(
            if self.no_requeue {
                "no-requeue"
            } else {
                "requeue"
            },
            None,
        );
        if self.no_kill {
            set("no-kill", None);
        }
        set("open-mode", Some("append".into()));
        set("output", Some(output));
        set("chdir", Some(directory.to_string_lossy().into_owned()));
        for Sbatch { name, value } in &sbatch {
            if let Some(value) = value
                && value.contains(|c: char| c.is_control())
            {
                return Err(refuse(format!(
                    "--{name} is {value:?}\n  hint: it has to fit into a line of the script"
                )));
            }
        }
        let extra = self.extra.iter().map(|line| {
            let option = line.trim().trim_start_matches("#SBATCH").trim();
            if option.starts_with('-') && !option.contains('\n') {
                return Ok(option.to_string());
            }
            Err(refuse(format!(
                "--extra {line:?} is no option of sbatch\n  hint: write it like --extra=--exclusive"
            )))
        });
        let extra = extra.collect::<Result<_, _>>()?;

        let mut command: Vec<OsString> = vec![program.into()];
        let mut word = |text: &str| command.push(text.into());
        word("--nodes");
        word(&self.nodes.to_string());
        if let Some((flag, count)) = gpus.map(|n| ("--gpus", n)).or(cpus.map(|n| ("--cpus", n))) {
            word(flag);
            word(&count.to_string());
        }
        self.with.iter().for_each(|option| word(option));
        command.push(self.config.clone().into());
        command.extend(self.overrides.iter().map(OsString::from));
        Ok(Options {
            sbatch,
            extra,
            setup: self.setup.clone(),
            command,
        })
    }
}

/// The batch script.
pub fn render(options: &Options) -> String {
    let mut text = String::from("#!/bin/bash\n");
    for Sbatch { name, value } in &options.sbatch {
        let _ = match value {
            Some(value) => writeln!(text, "#SBATCH --{name}={}", quote(value)),
            None => writeln!(text, "#SBATCH --{name}"),
        };
    }
    for option in &options.extra {
        let _ = writeln!(text, "#SBATCH {option}");
    }
    text.push('\n');
    for line in &options.setup {
        let _ = writeln!(text, "{line}");
    }
    text.push_str(
        "# By exec, so that the signals which SLURM sends to this shell reach tsm-launch itself.\n",
    );
    let _ = writeln!(text, "exec {}", shell(&options.command));
    text
}

/// A value as sbatch reads it back from a line of the script.
fn quote(value: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_-./=:,@%+".contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        return value.into();
    }
    format!("\"{}\"", value.replace('\\', r"\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/ucf101.yaml");

    fn options(words: &[&str], overrides: &[&str]) -> Result<Options, Coded> {
        let words = ["tsm-launch slurm"].iter().chain(words).copied();
        let words: Vec<&str> = words
            .chain(["configs/ucf101.yaml"])
            .chain(overrides.iter().copied())
            .collect();
        let submit =
            Submit::try_parse_from(words).map_err(|e| Coded::new(exit::USAGE, e.to_string()))?;
        let config = Config::load(Path::new(CONFIG), &submit.overrides).unwrap();
        submit.options(
            &config,
            Path::new("/opt/tsm/bin/tsm-launch"),
            Path::new("/home/me/tsm"),
        )
    }

    fn script(words: &[&str], overrides: &[&str]) -> String {
        render(&options(words, overrides).unwrap())
    }

    #[test]
    fn a_whole_script() {
        let words = "--nodes 2 --gpus 8 --cpus-per-gpu 12 --time 1-00:00 --partition a100 --account team --qos high --mem 0";
        let words: Vec<&str> = words.split(' ').collect();
        assert_eq!(
            script(&words, &["optim.lr=0.01"]),
            "\
#!/bin/bash
#SBATCH --job-name=ucf101
#SBATCH --partition=a100
#SBATCH --account=team
#SBATCH --qos=high
#SBATCH --time=1-00:00
#SBATCH --mem=0
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/home/me/tsm/runs/ucf101-slurm-%j.out
#SBATCH --chdir=/home/me/tsm

# By exec, so that the signals which SLURM sends to this shell reach tsm-launch itself.
exec /opt/tsm/bin/tsm-launch --nodes 2 --gpus 8 configs/ucf101.yaml optim.lr=0.01
"
        );
    }

    #[test]
    fn the_rest_of_the_options() {
        let words = [
            "--cpus",
            "4",
            "--job-name",
            "a \"b\" c\\d",
            "--constraint",
            "a100&ib",
            "--signal-lead",
            "1500ms",
            "--no-requeue",
            "--no-kill",
            "--extra",
            "#SBATCH --exclusive",
            "--extra=-x n1",
            "--setup",
            "module load cuda",
            "--with=--show-ranks=all",
        ];
        assert_eq!(
            script(&words, &["run.dir=/data/50% done", "run.name=a.b-1"]),
            "\
#!/bin/bash
#SBATCH --job-name=\"a \\\"b\\\" c\\\\d\"
#SBATCH --constraint=\"a100&ib\"
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --signal=B:USR2@2
#SBATCH --no-requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=\"/data/50%% done/a.b-1-slurm-%j.out\"
#SBATCH --chdir=/home/me/tsm
#SBATCH --exclusive
#SBATCH -x n1

module load cuda
# By exec, so that the signals which SLURM sends to this shell reach tsm-launch itself.
exec /opt/tsm/bin/tsm-launch --nodes 1 --cpus 4 --show-ranks=all configs/ucf101.yaml 'run.dir=/data/50% done' run.name=a.b-1
"
        );
    }

    #[test]
    fn the_config_says_how_many_workers_where_the_command_line_does_not() {
        let text = script(&[], &["launch.nproc_per_node=4"]);
        assert!(
            text.contains("--gpus-per-node=4\n") && text.contains("--gpus 4 "),
            "{text}"
        );
        let text = script(&[], &["launch.device=cpu", "launch.nproc_per_node=2"]);
        assert!(
            text.contains("--cpus-per-task=2\n") && text.contains("--cpus 2 "),
            "{text}"
        );
        let error = options(&[], &[]).unwrap_err();
        assert!(
            error.code == exit::USAGE && error.message.contains("give --gpus N"),
            "{error}"
        );
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let error = |words: &[&str]| {
            options(&[&["--gpus", "8"], words].concat(), &[])
                .unwrap_err()
                .to_string()
        };
        assert!(error(&["--time", "3"]).contains("leaves no time to train"));
        assert!(options(&["--gpus", "8", "--time", "0:03:01"], &[]).is_ok());
        assert!(error(&["--signal-lead", "24h"]).contains("65535s"));
        assert!(error(&["--partition", "a\n#SBATCH --exclusive"]).contains("fit into a line"));
        assert!(error(&["--extra", "exclusive"]).contains("no option of sbatch"));
        let backslash = options(&["--gpus", "1"], &[r"run.dir=a\b"])
            .unwrap_err()
            .to_string();
        assert!(backslash.contains("with a backslash"), "{backslash}");
        assert!(error(&["--cpus", "1"]).contains("cannot be used with"));
    }
}
