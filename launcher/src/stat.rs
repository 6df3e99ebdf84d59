//! What the kernel says of a process, or of one of its threads, in its file `stat`.

use std::path::Path;

/// In `flags`: the kernel is ending this thread, or has. Nothing takes it back.
const PF_EXITING: u64 = 0x4;

/// The part of it that matters here.
#[derive(Clone, Debug, PartialEq)]
pub struct Stat {
    pub name: String,
    pub state: char,
    pub parent: i32,
    pub session: i32,
    pub flags: u64,
    /// When it was started, in clock ticks.
    pub since: u64,
}

impl Stat {
    pub fn read(pid: i32) -> Option<Stat> {
        Stat::of(format!("/proc/{pid}/stat"))
    }

    pub fn of_thread(pid: i32, tid: i32) -> Option<Stat> {
        Stat::of(format!("/proc/{pid}/task/{tid}/stat"))
    }

    fn of(path: impl AsRef<Path>) -> Option<Stat> {
        let text = fs_err::read(path.as_ref()).ok()?;
        Stat::parse(&String::from_utf8_lossy(&text))
    }

    /// A zombie does not live.
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }

    fn is_exiting(&self) -> bool {
        self.flags & PF_EXITING != 0
    }

    /// The name of a program may hold spaces and brackets, so fields count from the last `)`.
    fn parse(text: &str) -> Option<Stat> {
        let (start, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        Some(Stat {
            name: start.split_once('(')?.1.into(),
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            session: fields.get(3)?.parse().ok()?,
            flags: fields.get(6)?.parse().ok()?,
            since: fields.get(19)?.parse().ok()?,
        })
    }
}

/// Whether a process that was not reaped is ending, so that it lost its descriptors by that: each of its threads is,
/// for the first may have ended alone. `false` where the kernel does not tell.
///
/// No death is missed by asking when a socket was hung up. A thread that ends (`do_exit`; the same order in Linux 4.2
/// and 6.18) gets PF_EXITING in `exit_signals`, lets go of the descriptors in `exit_files` and becomes a zombie in
/// `exit_notify`. They are closed when the last thread lets go of them, and all the others have done so before.
pub fn is_exiting(pid: i32) -> bool {
    let Ok(threads) = fs_err::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    let tids = threads.filter_map(|thread| thread.ok()?.file_name().to_str()?.parse().ok());
    // One that is not there any more has ended meanwhile.
    let mut threads = tids.filter_map(|tid| Stat::of_thread(pid, tid));
    threads.all(|thread| thread.is_exiting())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
    use std::process::{Command, Stdio};

    #[test]
    fn stat_survives_any_program_name() {
        let numbers = "1 40 39 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 77 9 9";
        let stat = Stat::parse(&format!("42 (a) b (c)) S {numbers}")).unwrap();
        assert_eq!((stat.state, stat.parent, stat.session), ('S', 1, 39));
        assert_eq!((stat.since, stat.name.as_str()), (77, "a) b (c)"));
        assert!(Stat::parse("42 (a").is_none());
        assert!(Stat::parse("42 (a) S 1 40 39").is_none());
    }

    #[test]
    fn a_process_is_ending_from_its_last_moment_until_it_is_reaped() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id() as i32;
        assert!(!is_exiting(pid));
        drop(child.stdin.take());
        let id = WaitId::Pid(Pid::from_child(&child));
        waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).unwrap();
        assert!(is_exiting(pid));
        child.wait().unwrap();
    }

    #[test]
    fn a_thread_has_one_of_its_own() {
        let me = std::process::id() as i32;
        let thread = std::thread::Builder::new().name("some name".into());
        let of_thread = move || {
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            Stat::of_thread(me, tid).unwrap()
        };
        let stat = thread.spawn(of_thread).unwrap().join().unwrap();
        assert_eq!(stat.name, "some name");
        assert_eq!(Some(stat.parent), Stat::read(me).map(|stat| stat.parent));
    }
}
