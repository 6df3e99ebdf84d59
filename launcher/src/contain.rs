//! What holds all processes of one generation on one node, so that none outlives it.
//!
//! Workers lead sessions of their own, but what they start may leave them (`setsid`, a double fork). Where this
//! process may make control groups (version 2), every generation has one, which nothing leaves without the right
//! to: [`group`]. Elsewhere its processes are known by their session, by a mark in the environment that every
//! child inherits, and by a parent that is one of them: [`carriers`]. The one in force is [`Containment::kind`].
//!
//! No process here is a child subreaper. It would get the strays only when their parents have died, without a sign
//! whose they are: what our own helpers leave behind looks the same. And with a killed agent it would be gone, when
//! it is needed most; a mark lasts. What a mark cannot find is a process that has left the session, wiped its
//! environment and lost its parent (`env -i setsid ...`).

mod carriers;
mod group;

use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cluster::message::Finding;
use crate::own::Executable;
use crate::stat::Stat;
use carriers::{Carriers, Look};
use group::{Group, Trial};

/// The variable that holds the marks of all generations to which a process belongs, the innermost last: a worker
/// may itself be a launcher.
pub const MARK: &str = "TSM_CONTAINMENT";

/// After the first look of [`Containment::end`]; twice as long after each later one.
const PAUSE: Duration = Duration::from_millis(2);
const MAX_PAUSE: Duration = Duration::from_millis(100);
/// How long to look for processes that may be there, see [`Left::Perhaps`].
pub const DOUBT: Duration = Duration::from_millis(500);

/// What a generation is held by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A control group of its own.
    Cgroup,
    /// Sessions, and the mark in the environment.
    #[default]
    Environment,
}

/// A process that belongs to a generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Process {
    pub pid: i32,
    pub stat: Stat,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} {}", self.pid, self.stat.name)
    }
}

pub struct Containment {
    group: Option<Group>,
    carriers: Carriers,
}

/// Finds out once whether this process can have control groups, while it does other things.
pub struct Ability(Option<Trial>);

impl Ability {
    /// `shim`: see [`crate::shim`].
    pub fn find_out(shim: &Executable) -> Ability {
        let name = group::name("trial", 0, &Carriers::new().mark);
        Ability(
            Group::create(&name)
                .and_then(|group| group.try_out(shim))
                .ok(),
        )
    }

    fn has_groups(&mut self) -> bool {
        let ok = self.0.as_mut().is_some_and(Trial::is_passed);
        if !ok {
            self.0 = None;
        }
        ok
    }
}

impl Containment {
    /// Call before the first worker starts.
    pub fn open(ability: &mut Ability, run_id: &str, generation: u32) -> Containment {
        let carriers = Carriers::new();
        let name = group::name(run_id, generation, &carriers.mark);
        let group = ability.has_groups().then(|| Group::create(&name).ok());
        Containment {
            group: group.flatten(),
            carriers,
        }
    }

    /// The same as another process opened, from its [`Containment::words`].
    pub fn join(words: impl IntoIterator<Item = String>) -> Option<Containment> {
        let mut words = words.into_iter();
        let (mark, since, path) = (words.next()?, words.next()?.parse().ok()?, words.next()?);
        let group = (!path.is_empty()).then(|| Group::join(PathBuf::from(path)));
        Some(Containment {
            group,
            carriers: Carriers::known(mark, since),
        })
    }

    pub fn words(&self) -> [String; 3] {
        let Carriers { mark, since, .. } = &self.carriers;
        let path = self.group().map_or("".into(), Path::to_string_lossy);
        [mark.clone(), since.to_string(), path.into_owned()]
    }

    pub fn kind(&self) -> Kind {
        match self.group {
            Some(_) => Kind::Cgroup,
            None => Kind::Environment,
        }
    }

    /// The folder of the control group, for the shim to [`enter`].
    pub fn group(&self) -> Option<&Path> {
        self.group.as_ref().map(|group| group.path.as_path())
    }

    /// What [`MARK`] has to be in the environment of a worker.
    pub fn mark(&self) -> String {
        match std::env::var(MARK) {
            Ok(outer) if !outer.is_empty() => format!("{outer}:{}", self.carriers.mark),
            _ => self.carriers.mark.clone(),
        }
    }

    /// A worker was started, which leads this session.
    pub fn add(&mut self, session: i32) {
        self.carriers.sessions.push(session);
    }

    /// The processes that live. Workers that are zombies do not.
    pub fn processes(&self) -> Vec<Process> {
        self.look().found
    }

    fn look(&self) -> Look {
        match &self.group {
            Some(group) => group.look(),
            None => self.carriers.look(),
        }
    }

    pub fn signal(&self, processes: &[Process], signal: Signal) {
        match &self.group {
            Some(group) => group.signal(processes, signal),
            None => carriers::signal(processes, signal),
        }
    }

    /// SIGKILL to all, once. What is left then; call again until that is nothing.
    pub fn kill(&self) -> Left {
        if let Some(group) = &self.group {
            if group.is_empty() {
                return Left::Nothing;
            }
            group.kill();
            return match group.is_empty() {
                true => Left::Nothing,
                false => Left::Some,
            };
        }
        let look = self.carriers.look();
        carriers::signal(&look.found, Signal::KILL);
        match (look.found.is_empty(), look.is_sure) {
            (false, _) => Left::Some,
            (true, false) => Left::Perhaps,
            (true, true) => Left::Nothing,
        }
    }

    /// SIGKILL to all until nothing is left, or `limit` is over. Waits.
    pub fn end(&self, limit: Duration) {
        let start = Instant::now();
        let mut pause = PAUSE;
        loop {
            let left = self.kill();
            let limit = match left {
                Left::Nothing => return,
                Left::Perhaps => limit.min(DOUBT),
                Left::Some => limit,
            };
            if start.elapsed() >= limit {
                return;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// Removes the control group, if nothing is left in it: afterwards nothing can enter it any more.
    pub fn remove(&self) -> bool {
        self.group.as_ref().is_none_or(Group::remove)
    }
}

impl Drop for Containment {
    fn drop(&mut self) {
        self.remove();
    }
}

/// What [`Containment::kill`] saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    Nothing,
    /// A process that has only just begun could not be told yet.
    Perhaps,
    Some,
}

/// Moves this process into a control group.
///
/// # Errors
/// When the group is gone.
pub fn enter(group: &Path) -> std::io::Result<()> {
    use std::io::Write;
    group::file(group, "cgroup.procs")?.write_all(b"0")
}

/// The folder of the control group of this process, below which groups may be made.
///
/// # Errors
/// Why none may.
pub fn own_group() -> Result<PathBuf, String> {
    group::own()
}

/// Which kind a job would have here.
pub fn finding() -> Finding {
    let mark = Carriers::new().mark;
    let text = match Group::create(&group::name("doctor", 0, &mark)) {
        Ok(group) => {
            group.remove();
            format!(
                "a job has control groups of its own below {}; nothing that it starts survives it",
                group.path.parent().unwrap_or(&group.path).display()
            )
        }
        Err(why) => format!(
            "a job can have no control group ({why}); what leaves its session is known by {MARK} in its environment"
        ),
    };
    Finding::ok("cgroup", text)
}
