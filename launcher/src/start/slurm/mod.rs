//! SLURM: what a job has been given, how its agents are started, how it is submitted and queued again.
//!
//! ```text
//! sbatch script, exec tsm-launch   coordinator in the batch shell; it starts the agents by srun
//! salloc, then tsm-launch          the same
//! srun ... tsm-launch              every task is an agent, task 0 also coordinates
//! ```
//!
//! What SLURM 22.05 does to the processes of a job, seen on the cluster of `tests/slurm-cluster`:
//!
//! | event | batch shell (coordinator) | tasks of the step (agents) | the job |
//! |---|---|---|---|
//! | `--signal=B:USR2@lead` | USR2, CONT; up to 60 s early | nothing | goes on |
//! | time limit, `scancel` | CONT, TERM; KILL after `KillWait` | the same, at once | TIMEOUT, CANCELLED |
//! | pre-emption, `GraceTime` > 0 | nothing | CONT, TERM at once | `PreemptTime` is set |
//! | the end of that grace, or no grace | CONT, TERM; KILL after `KillWait` | the same | queued again |
//! | the job ends by itself in that grace | | | FAILED or COMPLETED, not queued again |
//! | `scontrol requeue` | CONT, TERM; KILL after `KillWait` | the same | queued again |
//! | `scancel --signal=S`, S to srun | nothing | S, and their ranks too | goes on |
//! | `scancel --batch --signal=S` | S | nothing | goes on |
//! | srun gets TERM, or is killed | | KILL, at once | goes on |
//! | a node is lost, after `SlurmdTimeout` | TERM, KILL | the same | queued again |
//! | the same, `--no-kill` for job and step | nothing | nothing on other nodes | goes on |

mod allocation;
mod commands;
mod job;
pub mod nodelist;
mod requeue;
mod script;
mod srun;
pub mod step;
mod submit;
mod turn;

pub use allocation::{Allocation, Place, Request};
pub use commands::Slurm;
pub use job::{Job, JobId, StopCause};
pub use requeue::{Entry, on_entry};
pub use script::{Options, render};
pub use srun::{Srun, srun};
pub use submit::Submit;
pub use turn::Turn;
