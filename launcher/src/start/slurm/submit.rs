//! `tsm-launch slurm`: a config becomes a batch script, and the script a job.

use anyhow::Context;
use clap::{ArgGroup, Parser};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tsm_job::Config;
use tsm_job::config::duration;
use tsm_job::exit::{self, Coded};

use super::commands::Slurm;
use super::job::{JobId, run_folder_name};
use super::script::{Options, Sbatch, render};
use crate::folder;
use crate::own;
use crate::say::{print, reading, tell};

const EXAMPLES: &str = "Examples:
  tsm-launch slurm --nodes 2 --gpus 8 --cpus-per-gpu 12 --time 1-00:00 configs/ucf101.yaml
  tsm-launch slurm --gpus 8 --partition a100 --extra --exclusive configs/sthv2.yaml optim.lr=0.01
  tsm-launch slurm --cpus 4 --print configs/demo.yaml > demo.sbatch

Exit codes: 0; 64 usage, 69 no sbatch here, or it refuses the job, 73 the folder for runs cannot be made,
78 configuration.";

/// Submits a config as a job of SLURM that saves itself before its time is up, and goes on in its next turn.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "tsm-launch slurm",
    after_help = EXAMPLES,
    override_usage = "tsm-launch slurm [--nodes N] [--gpus N | --cpus N] [OPTIONS] CONFIG.yaml [key.path=value ...]"
)]
#[command(group(ArgGroup::new("device").args(["gpus", "cpus"])))]
pub struct Submit {
    /// Ask for N nodes.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub nodes: u32,

    /// Ask for N GPUs on each node, one worker each [default: launch.nproc_per_node].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub gpus: Option<u32>,

    /// Start N workers on the CPU of each node.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub cpus: Option<u32>,

    /// Ask for N cores for each GPU; without it the site's default counts, which may be one core a node.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096), conflicts_with = "cpus")]
    pub cpus_per_gpu: Option<u32>,

    /// Ask for this much memory on each node, such as 200G; 0 for all of it.
    #[arg(long, value_name = "SIZE")]
    pub mem: Option<String>,

    /// Set the job's time limit, as sbatch reads it: minutes, hours:minutes:seconds, days-hours.
    #[arg(long, value_name = "TIME")]
    pub time: Option<String>,

    /// Submit to this partition.
    #[arg(long, value_name = "NAME")]
    pub partition: Option<String>,

    /// Charge this account.
    #[arg(long, value_name = "NAME")]
    pub account: Option<String>,

    /// Ask for this quality of service.
    #[arg(long, value_name = "NAME")]
    pub qos: Option<String>,

    /// Ask for nodes with these features.
    #[arg(long, value_name = "LIST")]
    pub constraint: Option<String>,

    /// Call the job this [default: run.name].
    #[arg(long, value_name = "NAME")]
    pub job_name: Option<String>,

    /// Save, and leave the node, this long before the time limit; it must be enough for a step and a checkpoint.
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = duration::parse)]
    pub signal_lead: Duration,

    /// Queue the job again when it was pre-empted, lost a node, or saved itself before its time limit (default).
    #[arg(long, overrides_with = "no_requeue")]
    pub requeue: bool,

    /// Never queue the job again.
    #[arg(long, overrides_with = "requeue")]
    pub no_requeue: bool,

    /// Keep the job when one of its nodes is lost, instead of having SLURM queue it again.
    #[arg(long)]
    pub no_kill: bool,

    /// Add this option of sbatch, such as --extra=--exclusive.
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub extra: Vec<String>,

    /// Run this line of shell before tsm-launch, such as --setup 'module load cuda'.
    #[arg(long, value_name = "LINE")]
    pub setup: Vec<String>,

    /// Give this option to tsm-launch in the job, such as --with=--show-ranks=all.
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub with: Vec<String>,

    /// Print the script instead of submitting it.
    #[arg(long)]
    pub print: bool,

    /// The job as YAML.
    #[arg(value_name = "CONFIG.yaml")]
    pub config: PathBuf,

    /// Values that replace those of the config, such as `optim.lr=0.01`.
    #[arg(value_name = "key.path=value")]
    pub overrides: Vec<String>,
}

/// A job that is in the queue.
#[derive(Clone, Debug, PartialEq)]
pub struct Submitted {
    pub job: String,
    pub output: PathBuf,
    pub run_dir: PathBuf,
}

impl Submit {
    /// Checks the config, then submits it or prints the script; the exit code.
    ///
    /// # Errors
    /// As the help says. Nothing is submitted then.
    pub fn execute(&self, slurm: &Slurm) -> anyhow::Result<i32> {
        let config = reading(&self.config, || Config::load(&self.config, &self.overrides))
            .map_err(|e| Coded::new(exit::CONFIG, e.to_string()))?;
        let program = own::path().context("cannot find this program")?;
        let directory = folder::current()?;
        let options = self.options(&config, &program, &directory)?;
        if self.cpus_per_gpu.is_none()
            && self.cpus.is_none()
            && !self
                .extra
                .iter()
                .any(|o| o.contains("cpus") || o.contains("exclusive"))
        {
            tell(
                "note: without --cpus-per-gpu the site decides how many cores the workers get, perhaps one on a node",
            );
        }
        if self.print {
            print(&render(&options))?;
            return Ok(exit::OK);
        }
        let root = directory.join(&config.run.dir);
        fs_err::create_dir_all(&root).map_err(|e| {
            Coded::new(
                exit::CANNOT_WRITE,
                format!("cannot make the folder for runs: {e}"),
            )
        })?;
        let submitted = slurm.submit(&options, &root, &config.run.name)?;
        let Submitted {
            job,
            output,
            run_dir,
        } = &submitted;
        let text = format!(
            "job {job} submitted\noutput      {}\nrun folder  {}\nlook        squeue -j {job}\nend it      scancel {job}\n",
            output.display(),
            run_dir.display()
        );
        print(&text).map_err(|e| Coded::new(e.code, format!("job {job} is submitted, but {e}")))?;
        Ok(exit::OK)
    }
}

impl Slurm {
    /// Submits the script of a run called `run`, whose folder will be below `root`, which exists.
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`] when there is no sbatch, or with its words when it refuses.
    pub fn submit(&self, options: &Options, root: &Path, run: &str) -> Result<Submitted, Coded> {
        let mut command = self.command("sbatch");
        command.arg("--parsable");
        for Sbatch { name, .. } in &options.sbatch {
            // A variable that replaces what a script says, but nothing that was asked for here.
            let variable = match *name {
                "time" => "TIMELIMIT".into(),
                "mem" => "MEM_PER_NODE".into(),
                name => name.replace('-', "_").to_uppercase(),
            };
            command.env_remove(format!("SBATCH_{variable}"));
        }
        // One of the two was asked for, the other would win.
        command
            .env_remove("SBATCH_REQUEUE")
            .env_remove("SBATCH_NO_REQUEUE");
        let said = self.run(command, Some(&render(options)), "submit the job")?;
        // `123`, or `123;cluster`.
        let number = said.trim().split(';').next().unwrap_or_default();
        let Ok(id) = number.parse() else {
            let text = format!(
                "cannot submit the job: sbatch says {:?} instead of a job's number",
                said.trim()
            );
            return Err(Coded::new(exit::PREFLIGHT, text));
        };
        let job = JobId { id, array: None };
        let run_dir = root.join(run_folder_name(run, job));
        let output = root.join(format!("{run}-slurm-{job}.out"));
        Ok(Submitted {
            job: number.into(),
            output,
            run_dir,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/ucf101.yaml");

    #[test]
    fn the_command_is_consistent() {
        Submit::command().debug_assert();
    }
    #[test]
    fn what_is_wrong_is_known_before_anything_is_submitted() {
        let runs = tempfile::tempdir().unwrap();
        let root = format!("run.dir={}", runs.path().join("new").display());
        let no_slurm = Slurm::default().env("PATH", "/nonexistent");
        let code = |config: &str, words: &[&str]| {
            let words = [&["tsm-launch slurm", "--gpus", "1", config, &root], words].concat();
            let error = Submit::try_parse_from(words)
                .unwrap()
                .execute(&no_slurm)
                .unwrap_err();
            (exit::code_of(&error), error.to_string())
        };
        assert_eq!(code("no-such.yaml", &[]).0, exit::CONFIG);
        assert_eq!(code(CONFIG, &["optim.lr=fast"]).0, exit::CONFIG);
        assert!(!runs.path().join("new").exists());
        let (number, text) = code(CONFIG, &[]);
        assert!(
            number == exit::PREFLIGHT && text.contains("there is no sbatch here"),
            "{text}"
        );
        fs_err::write(runs.path().join("new/file"), "").unwrap();
        let below_a_file = format!("run.dir={}", runs.path().join("new/file/runs").display());
        assert_eq!(code(CONFIG, &[&below_a_file]).0, exit::CANNOT_WRITE);
    }
}
