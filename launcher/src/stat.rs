//! What the kernel says of a process, or of one of its threads, in its file `stat`.

use std::path::Path;

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

#[cfg(test)]
mod tests {
    use super::*;

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
