//! The processes of a generation by what they carry: a worker's session, the generation's mark in their environment,
//! or a parent that is one of them.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::{ClockId, clock_gettime};

use std::cell::RefCell;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use super::{MARK, Process};
use crate::stat::Stat;

/// The flag of a thread of the kernel, which is listed as a process.
const PF_KTHREAD: u64 = 0x0020_0000;

/// Clock ticks in which the kernel tells times, per second; part of its interface on every machine that is built today.
const TICKS: u64 = 100;

/// How long reading all environments may take.
const READ: Duration = Duration::from_secs(1);

/// How the processes of a generation are known.
pub struct Carriers {
    /// Random; no secret.
    pub mark: String,
    /// In the kernel's clock ticks since it started: what is older is not looked at.
    pub since: u64,
    pub sessions: Vec<i32>,
    /// From a thread that could not read an environment in time: none is read until it has.
    late: RefCell<Option<Receiver<Look>>>,
}

/// What one look has seen.
#[derive(Debug, Default, PartialEq)]
pub struct Look {
    pub found: Vec<Process>,
    /// Every process could be told.
    pub is_sure: bool,
}

impl Carriers {
    pub fn new() -> Carriers {
        let mut bytes = [0u8; 8];
        getrandom::fill(&mut bytes).expect("the kernel gives random numbers");
        let now = clock_gettime(ClockId::Boottime);
        let since = now.tv_sec as u64 * TICKS + now.tv_nsec as u64 * TICKS / 1_000_000_000;
        Carriers::known(bytes.iter().map(|b| format!("{b:02x}")).collect(), since)
    }

    pub fn known(mark: String, since: u64) -> Carriers {
        Carriers {
            mark,
            since,
            sessions: Vec::new(),
            late: RefCell::default(),
        }
    }

    pub fn look(&self) -> Look {
        self.look_through(environment, READ)
    }

    /// An environment lies in the memory of its process, which may be locked as long as a file system hangs: it is
    /// read on a thread that is then left behind.
    fn look_through<R>(&self, environment: R, patience: Duration) -> Look
    where
        R: Fn(i32) -> Environment + Send + 'static,
    {
        let (mark, sessions) = (self.mark.clone(), self.sessions.clone());
        let own = Carriers {
            sessions,
            ..Carriers::known(mark, self.since)
        };
        let (done, result) = channel();
        let look = move || done.send(own.look_at_all(environment));
        let mut late = self.late.borrow_mut();
        let is_hung = |late: &Receiver<Look>| matches!(late.try_recv(), Err(TryRecvError::Empty));
        if !late.as_ref().is_some_and(is_hung) && std::thread::Builder::new().spawn(look).is_ok() {
            if let Ok(look) = result.recv_timeout(patience) {
                return look;
            }
            *late = Some(result);
        }
        self.look_at_all(|_| Environment::Of(Vec::new()))
    }

    fn look_at_all(&self, environment: impl Fn(i32) -> Environment) -> Look {
        let Ok(entries) = fs_err::read_dir("/proc") else {
            return Look::default();
        };
        let pids = entries
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        let all = pids.filter_map(|pid| Some((pid, Stat::read(pid)?)));
        self.pick(all.collect(), environment)
    }

    /// Those of `all` that belong to the generation. Pure; `environment` reads that of a process.
    fn pick(&self, all: Vec<(i32, Stat)>, environment: impl Fn(i32) -> Environment) -> Look {
        let candidate = |stat: &Stat| {
            stat.is_alive() && stat.since >= self.since && stat.flags & PF_KTHREAD == 0
        };
        let mut others: Vec<Process> = all
            .into_iter()
            .filter(|(_, stat)| candidate(stat))
            .map(|(pid, stat)| Process { pid, stat })
            .collect();
        let mut found: Vec<Process> = others
            .extract_if(.., |p| self.sessions.contains(&p.stat.session))
            .collect();
        let mut unknown = Vec::new();
        for process in others {
            match environment(process.pid) {
                Environment::Of(bytes) if has_mark(&bytes, &self.mark) => found.push(process),
                Environment::Of(_) => unknown.push((process, true)),
                Environment::NotYet => unknown.push((process, false)),
            }
        }
        let mut next = 0;
        while let Some(parent) = found.get(next).map(|process| process.pid) {
            let children = unknown.extract_if(.., |(process, _)| process.stat.parent == parent);
            let children: Vec<Process> = children.map(|(process, _)| process).collect();
            found.extend(children);
            next += 1;
        }
        Look {
            found,
            is_sure: unknown.iter().all(|(_, known)| *known),
        }
    }
}

/// Signals each that is still the process that was found.
pub fn signal(processes: &[Process], signal: Signal) {
    for Process { pid, stat } in processes {
        let Some(Ok(pidfd)) = Pid::from_raw(*pid).map(|pid| pidfd_open(pid, PidfdFlags::empty()))
        else {
            continue;
        };
        // The number may have been used again since.
        if Stat::read(*pid).is_some_and(|now| now.since == stat.since) {
            let _ = pidfd_send_signal(&pidfd, signal);
        }
    }
}

enum Environment {
    /// Empty where it may not be read.
    Of(Vec<u8>),
    /// It executes a program just now.
    NotYet,
}

fn environment(pid: i32) -> Environment {
    match fs_err::read(format!("/proc/{pid}/environ")) {
        Ok(bytes) if bytes.is_empty() => match fs_err::read(format!("/proc/{pid}/cmdline")) {
            Ok(line) if line.is_empty() => Environment::NotYet,
            _ => Environment::Of(bytes),
        },
        Ok(bytes) => Environment::Of(bytes),
        Err(_) => Environment::Of(Vec::new()),
    }
}

/// Whether an environment, as the kernel shows it, has `mark` in the list of marks.
fn has_mark(environment: &[u8], mark: &str) -> bool {
    let mut entries = environment.split(|&b| b == 0);
    entries.any(|entry| {
        let list = entry.strip_prefix(MARK.as_bytes());
        list.and_then(|list| list.strip_prefix(b"="))
            .is_some_and(|list| list.split(|&b| b == b':').any(|m| m == mark.as_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::scene::until;
    use std::process::{Child, Command};

    /// A child that is killed with its end of life.
    struct Asleep(Child);

    impl Asleep {
        fn start(command: &mut Command) -> Asleep {
            let child = Asleep(command.spawn().unwrap());
            until(|| Stat::read(child.pid()).filter(|stat| stat.name == "sleep"));
            child
        }

        fn pid(&self) -> i32 {
            self.0.id() as i32
        }
    }

    impl Drop for Asleep {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_mark_is_one_word_of_one_variable() {
        let has = |text: &str| has_mark(text.replace(' ', "\0").as_bytes(), "f1");
        assert!(has("A=1 TSM_CONTAINMENT=f1 B=2"));
        assert!(has("TSM_CONTAINMENT=0a:f1:22"));
        for other in ["", "TSM_CONTAINMENT=f12", "XTSM_CONTAINMENT=f1", "A=f1"] {
            assert!(!has(other), "{other}");
        }
    }

    fn stat(parent: i32, session: i32) -> Stat {
        let name = "x".into();
        Stat {
            name,
            state: 'S',
            parent,
            session,
            flags: 0,
            since: 100,
        }
    }

    #[test]
    fn session_mark_and_parent_tell_and_nothing_else() {
        let carriers = Carriers {
            sessions: vec![10],
            ..Carriers::known("f1".into(), 100)
        };
        let zombie = Stat {
            state: 'Z',
            ..stat(1, 10)
        };
        let old = Stat {
            since: 99,
            ..stat(1, 10)
        };
        let kernel = Stat {
            flags: PF_KTHREAD,
            ..stat(2, 0)
        };
        let all = vec![
            // A grandchild of one with the mark comes before its parent.
            (9, stat(31, 31)),
            (10, zombie),
            (11, stat(10, 10)),
            (12, old),
            (13, kernel),
            (30, stat(1, 30)),
            (31, stat(30, 31)),
            (40, stat(1, 40)),
            (41, stat(40, 40)),
        ];
        let environment = |pid: i32| match pid {
            30 => Environment::Of(b"TSM_CONTAINMENT=f1\0".into()),
            9 => Environment::NotYet,
            13 => panic!("not a process"),
            _ => Environment::Of(b"TSM_CONTAINMENT=f2\0".into()),
        };
        let look = carriers.pick(all.clone(), environment);
        let mut pids: Vec<i32> = look.found.iter().map(|p| p.pid).collect();
        pids.sort_unstable();
        assert_eq!((pids, look.is_sure), (vec![9, 11, 30, 31], true));
        let unsure = |pid: i32| match pid {
            41 => Environment::NotYet,
            _ => Environment::Of(Vec::new()),
        };
        let look = carriers.pick(all, unsure);
        assert_eq!((look.found.len(), look.is_sure), (1, false));
    }

    #[test]
    fn a_process_whose_memory_is_locked_holds_up_nothing() {
        // One that is known by its session, and one whose environment has to be read.
        let known = Asleep::start(Command::new("setsid").args(["sleep", "1000"]));
        let other = Asleep::start(Command::new("setsid").args(["sleep", "1000"]));
        let carriers = Carriers {
            sessions: vec![known.pid()],
            ..Carriers::known("f1".into(), 0)
        };
        let (open, locked) = channel::<()>();
        let locked = std::sync::Mutex::new(locked);
        let hangs = move |_: i32| {
            let _ = locked.lock().unwrap().recv();
            Environment::NotYet
        };
        let look = carriers.look_through(hangs, Duration::from_millis(10));
        let again = carriers.look_through(|_| panic!("not again"), READ);
        for look in [look, again] {
            assert!(look.is_sure && look.found.iter().any(|p| p.pid == known.pid()));
        }
        // A machine that was only busy is looked at again.
        drop(open);
        let is_other = other.pid();
        until(|| {
            let looks = move |pid: i32| match pid {
                pid if pid == is_other => Environment::NotYet,
                _ => Environment::Of(Vec::new()),
            };
            (!carriers.look_through(looks, READ).is_sure).then_some(())
        });
    }

    #[test]
    fn a_process_that_starts_now_is_not_too_old() {
        let carriers = Carriers::new();
        let mark = format!("0:{}", carriers.mark);
        let child = Asleep::start(Command::new("sleep").arg("1000").env(MARK, mark));
        let seen = |look: &Look| !look.found.is_empty() || look.is_sure;
        let look = until(|| Some(carriers.look()).filter(seen));
        assert!(look.found.iter().any(|p| p.pid == child.pid()), "{look:?}");
        let me = std::process::id() as i32;
        assert!(look.found.iter().all(|p| p.pid != me));
    }
}
