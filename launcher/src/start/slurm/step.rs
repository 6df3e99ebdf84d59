//! Signals that SLURM sends to a step: `scancel --signal=USR1 JOB` reaches all processes of all its nodes at once, and
//! whoever passes it on gives it to the ranks a second time.
//!
//! What `proctrack/linuxproc` and `proctrack/cgroup` do is known here. `proctrack/pgid` reaches the agents alone, as
//! ranks lead sessions of their own: there `scancel --batch --signal=S` is the way, by which the launcher passes it on.

use std::sync::LazyLock;

use crate::contain::Kind;
use crate::stat::Stat;

/// What signals the processes of a step.
const STEPD: &str = "slurmstepd";

/// Whether a signal from this process went to all processes of a step of SLURM in which this one runs. One to the
/// batch script goes to the script alone.
pub fn is_sent_to_all(sender: Option<i32>) -> bool {
    static IN_STEP: LazyLock<bool> = LazyLock::new(|| in_step(|name| std::env::var(name).ok()));
    *IN_STEP
        && sender.is_some_and(|pid| {
            // In a container with its own process numbers it is 0.
            pid == 0 || Stat::read(pid).is_some_and(|stat| stat.name == STEPD)
        })
}

/// Steps of the batch script and the like have numbers above.
const FIRST_SPECIAL: u32 = 0xffff_fff0;

fn in_step(lookup: impl Fn(&str) -> Option<String>) -> bool {
    let id = lookup("SLURM_STEP_ID").or_else(|| lookup("SLURM_STEPID"));
    id.and_then(|id| id.parse::<u32>().ok())
        .is_some_and(|id| id < FIRST_SPECIAL)
}

/// Whether such a signal reaches ranks that are held together so. SLURM's control groups hold those that are made
/// below them, but of these it does not read the processes.
pub fn reaches(kind: Kind) -> bool {
    let own = || fs_err::read_to_string("/proc/self/cgroup").unwrap_or_default();
    kind == Kind::Environment || !is_of_slurm(&own())
}

/// The text of `/proc/self/cgroup`.
fn is_of_slurm(groups: &str) -> bool {
    let mut paths = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.any(|path| path.contains("/job_") && path.contains("/step_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_script_is_no_step() {
        let with = |id: Option<&'static str>| {
            in_step(move |name| (name == "SLURM_STEP_ID").then_some(id?.to_string()))
        };
        assert!(with(Some("0")) && with(Some("17")));
        assert!(!with(None) && !with(Some("4294967291")) && !with(Some("x")));
    }

    #[test]
    fn control_groups_of_slurm_are_known() {
        for own in [
            "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
            "9:cpuset:/\n4:freezer:/slurm/uid_1000/job_7/step_0\n0::/\n",
        ] {
            assert!(is_of_slurm(own), "{own}");
        }
        for other in [
            "0::/user.slice/user-0.slice\n",
            "0::/system.slice/slurmd.service\n",
            "",
        ] {
            assert!(!is_of_slurm(other), "{other}");
        }
    }
}
