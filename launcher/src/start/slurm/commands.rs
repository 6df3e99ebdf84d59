//! SLURM's commands.

use std::io::{ErrorKind, Write};
use std::process::{Command, Output, Stdio};
use tsm_job::exit::{self, Coded};

use super::job::{Job, JobId};

/// SLURM's commands.
#[derive(Clone, Debug, Default)]
pub struct Slurm {
    env: Vec<(String, String)>,
}

impl Slurm {
    /// Sets a variable for its commands, such as `SLURM_CONF`.
    pub fn env(mut self, name: &str, value: &str) -> Slurm {
        self.env.push((name.into(), value.into()));
        self
    }

    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env("LC_ALL", "C");
        command
    }

    /// Runs a command of SLURM with `input`, and returns what it says.
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`] when it is not there, or refuses: then with its own words.
    pub(super) fn run(
        &self,
        mut command: Command,
        input: Option<&str>,
        what: &str,
    ) -> Result<String, Coded> {
        let name = command.get_program().to_string_lossy().into_owned();
        let refuse = |why: String, hint: &str| {
            let hint = if hint.is_empty() {
                String::new()
            } else {
                format!("\n  hint: {hint}")
            };
            Coded::new(exit::PREFLIGHT, format!("cannot {what}: {why}{hint}"))
        };
        let output = output(&mut command, input).map_err(|e| match e.kind() {
            ErrorKind::NotFound => refuse(
                format!("there is no {name} here"),
                "run it where SLURM's commands are in PATH: a login node, or a node of the job",
            ),
            _ => refuse(format!("{name}: {e}"), ""),
        })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.trim();
            let why = if said.is_empty() {
                format!("{name}: {}", output.status)
            } else {
                said.replace('\n', "\n  ")
            };
            return Err(refuse(why, ""));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The state of a job.
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`] when SLURM does not answer or does not know it.
    pub fn job(&self, job: JobId) -> Result<Job, Coded> {
        let mut command = self.command("scontrol");
        // Seconds since 1970 need no time zone.
        command
            .env("SLURM_TIME_FORMAT", "%s")
            .args(["show", "job", &job.to_string()]);
        let text = self.run(command, None, &format!("ask for the state of job {job}"))?;
        Ok(Job::parse(&text))
    }

    /// Queues the job again. SLURM then ends every process of it: call this last of all.
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`] with SLURM's words when it refuses.
    pub fn requeue(&self, job: JobId) -> Result<(), Coded> {
        let mut command = self.command("scontrol");
        command.args(["requeue", &job.to_string()]);
        self.run(command, None, &format!("queue job {job} again"))
            .map(|_| ())
    }
}

fn output(command: &mut Command, input: Option<&str>) -> std::io::Result<Output> {
    let stdin = if input.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    };
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        // One that does not read to the end has a reason, which it gives on stderr.
        let _ = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_command_is_an_error_with_a_remedy() {
        let slurm = Slurm::default().env("PATH", "/nonexistent");
        let error = slurm.job(JobId { id: 1, array: None }).unwrap_err();
        assert_eq!(error.code, exit::PREFLIGHT);
        assert!(
            error.message.contains("there is no scontrol here"),
            "{error}"
        );
    }
}
