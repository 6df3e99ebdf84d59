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

/// What the workers of a node run on, as the script asks for it.
#[derive(Clone, Copy)]
struct Devices {
    gpus: Option<u32>,
    /// Workers on CPU.
    cpus: Option<u32>,
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
        let devices = self.devices(config)?;
        Ok(Options {
            sbatch: self.sbatch(config, devices, directory)?,
            extra: self.extra()?,
            setup: self.setup.clone(),
            command: self.command(program, devices),
        })
    }

    fn devices(&self, config: &Config) -> Result<Devices, Coded> {
        let launch = &config.launch;
        let gpus = match (self.gpus, self.cpus, launch.device) {
            (None, None, DeviceKind::Gpu) => Some(launch.nproc_per_node.ok_or_else(|| {
                refuse(
                    "the config uses every GPU of a node (launch.nproc_per_node is null)\n  \
                     hint: give --gpus N: SLURM has to know how many to allocate",
                )
            })?),
            (gpus, ..) => gpus,
        };
        let from_config = launch.nproc_per_node.filter(|_| gpus.is_none());
        Ok(Devices {
            gpus,
            cpus: self.cpus.or(from_config),
        })
    }

    /// Seconds before the time limit at which SLURM tells the job.
    fn lead(&self) -> Result<u64, Coded> {
        let given = duration::format(self.signal_lead);
        if let Some(time) = &self.time
            && let Some(limit) = time_limit(time)
            && limit <= self.signal_lead + SIGNAL_SLACK
        {
            let slack = SIGNAL_SLACK.as_secs();
            return Err(refuse(format!(
                "--time {time} leaves no time to train: SLURM tells the job to save {given} before its end, or up to {slack} s earlier\n  \
                 hint: give a longer --time, or a shorter --signal-lead"
            )));
        }
        // SLURM keeps the lead as 16 bits of seconds.
        let lead = self.signal_lead.as_secs_f64().ceil() as u64;
        if !(1..=65_535).contains(&lead) {
            return Err(refuse(format!(
                "--signal-lead is {given}\n  hint: SLURM takes 1s to 65535s"
            )));
        }
        Ok(lead)
    }

    fn sbatch(
        &self,
        config: &Config,
        devices: Devices,
        directory: &Path,
    ) -> Result<Vec<Sbatch>, Coded> {
        let Devices { gpus, cpus } = devices;
        let name = &config.run.name;
        let lead = self.lead()?;
        let output = output(&directory.join(&config.run.dir), name)?;
        // By task, not by GPU: with the latter some versions give a step fewer cores than the job has.
        let cpus_per_task = cpus.or(gpus.zip(self.cpus_per_gpu).map(|(gpus, each)| gpus * each));
        let with = |name, value: String| Some((name, Some(value)));
        let given = |name, value: &Option<String>| Some((name, Some(value.clone()?)));
        let count = |name, value: Option<u32>| Some((name, Some(value?.to_string())));
        let options = [
            with("job-name", self.job_name.as_ref().unwrap_or(name).clone()),
            given("partition", &self.partition),
            given("account", &self.account),
            given("qos", &self.qos),
            given("constraint", &self.constraint),
            given("time", &self.time),
            given("mem", &self.mem),
            count("nodes", Some(self.nodes)),
            // tsm-launch starts an agent on each node, and each agent its own workers.
            count("ntasks-per-node", Some(1)),
            count("gpus-per-node", gpus),
            count("cpus-per-task", cpus_per_task),
            with("signal", format!("B:USR2@{lead}")),
            Some(if self.no_requeue {
                ("no-requeue", None)
            } else {
                ("requeue", None)
            }),
            self.no_kill.then_some(("no-kill", None)),
            with("open-mode", "append".into()),
            with("output", output),
            with("chdir", directory.to_string_lossy().into_owned()),
        ];
        let sbatch = (options.into_iter().flatten()).map(|(name, value)| match value {
            Some(value) if value.contains(char::is_control) => Err(refuse(format!(
                "--{name} is {value:?}\n  hint: it has to fit into a line of the script"
            ))),
            value => Ok(Sbatch { name, value }),
        });
        sbatch.collect()
    }

    /// The options of sbatch that have no flag here.
    fn extra(&self) -> Result<Vec<String>, Coded> {
        let option = |line: &String| {
            let option = line.trim().trim_start_matches("#SBATCH").trim();
            if option.starts_with('-') && !option.contains('\n') {
                return Ok(option.to_string());
            }
            Err(refuse(format!(
                "--extra {line:?} is no option of sbatch\n  hint: write it like --extra=--exclusive"
            )))
        };
        self.extra.iter().map(option).collect()
    }

    fn command(&self, program: &Path, devices: Devices) -> Vec<OsString> {
        let gpus = devices.gpus.map(|n| ["--gpus".into(), n.to_string()]);
        let cpus = devices.cpus.map(|n| ["--cpus".into(), n.to_string()]);
        let words = ["--nodes".into(), self.nodes.to_string()].into_iter();
        let words = words.chain(gpus.or(cpus).into_iter().flatten());
        let words = words.chain(self.with.iter().cloned());
        let mut command: Vec<OsString> = vec![program.into()];
        command.extend(words.map(OsString::from));
        command.push(self.config.clone().into());
        command.extend(self.overrides.iter().map(OsString::from));
        command
    }
}

fn refuse(text: impl Into<String>) -> Coded {
    Coded::new(exit::USAGE, text)
}

/// The file of the job's output, as sbatch reads it.
fn output(root: &Path, run: &str) -> Result<String, Coded> {
    // The one sign that sbatch replaces in a file name.
    let root = root.to_string_lossy().replace('%', "%%");
    let output = format!("{root}/{run}-slurm-%j.out");
    if output.contains('\\') {
        return Err(refuse(format!(
            "{output:?} cannot be the job's output: SLURM replaces no %j in a path with a backslash\n  \
             hint: give another run.dir, or work in another folder"
        )));
    }
    Ok(output)
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
