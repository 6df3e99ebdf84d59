//! The live view, on a terminal of its own.

use crate::demo::{DEMO, write_lists};
use crate::harness::{DEADLINE, FAKE, Scene, until};
use crate::program::write_program;
use fs_err::File;
use fs_err::os::unix::fs::OpenOptionsExt;
use rustix::fd::OwnedFd;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

/// A job whose terminal this is, for Ctrl-C too. Dropped while it runs (a failing test), its launcher is killed.
struct Terminal {
    master: OwnedFd,
    /// So that the terminal lives on when the launcher has ended.
    slave: Option<File>,
    child: Child,
    shown: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Terminal {
    /// Two fake workers in place of trainers, which have a view, that do `actions`, on a terminal of 24 rows which the
    /// longest name of a host does not fill.
    #[expect(unsafe_code, reason = "the terminal is taken between fork and exec")]
    fn start(scene: &Scene, actions: &str) -> Terminal {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let size = Winsize {
            ws_row: 24,
            ws_col: 160,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&master, size).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let mut options = File::options();
        let slave = options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        let slave = slave.open(name.to_str().unwrap()).unwrap();
        let stream = || slave.try_clone().unwrap().into_file();
        write_lists(&scene.path(""));
        let script = format!("#!/bin/sh\nexec {FAKE} {actions}\n");
        write_program(&scene.path("trainer"), script);
        let mut command = scene.command(&["--cpus=2", "--grace=60s", "--run-dir=run"]);
        command.args(["--show-ranks=all", "--trainer", "./trainer", DEMO]);
        command.env("TERM", "xterm").env_remove("NO_COLOR");
        command.stdin(stream()).stdout(stream()).stderr(stream());
        let take = || {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        };
        // SAFETY: the closure makes two system calls, on a descriptor that is open.
        unsafe { command.pre_exec(take) };
        let child = command.spawn().expect("tsm-launch starts");
        let shown = Arc::new(Mutex::new(Vec::new()));
        let (from, to) = (master.try_clone().unwrap(), Arc::clone(&shown));
        let read = move || {
            let mut chunk = [0; 4096];
            // The end of a terminal is an error.
            while let Ok(n @ 1..) = rustix::io::read(&from, &mut chunk) {
                to.lock().unwrap().extend_from_slice(&chunk[..n]);
            }
        };
        Terminal {
            master,
            slave: Some(slave),
            child,
            shown,
            reader: Some(std::thread::spawn(read)),
        }
    }

    fn bytes(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned()
    }

    /// Waits until a row that begins so stands there; the whole terminal.
    fn wait_for(&self, row: &str) -> Vec<String> {
        until(row, || {
            let rows = rows(&self.bytes());
            rows.iter().any(|r| r.starts_with(row)).then_some(rows)
        })
    }

    fn modes(&self) -> String {
        let modes: Termios = tcgetattr(self.slave.as_ref().expect("open")).unwrap();
        format!("{modes:?}")
    }

    /// Waits for the end; the code, and all that was shown. Its modes must be these.
    fn finish(mut self, modes: &str) -> (i32, String) {
        let status = self.child.wait().unwrap();
        assert_eq!(self.modes(), modes);
        self.slave.take();
        let reader = self.reader.take().expect("not finished");
        let since = Instant::now();
        while !reader.is_finished() {
            assert!(since.elapsed() < DEADLINE, "somebody holds the terminal");
            std::thread::yield_now();
        }
        reader.join().unwrap();
        let code = status.code().or(status.signal().map(|s| 128 + s));
        (code.expect("ended"), self.bytes())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What stands on a terminal on which `bytes` were written. Its colours are of no account; what the launcher has no
/// need of is an error.
fn rows(bytes: &str) -> Vec<String> {
    let (mut rows, mut row, mut column) = (vec![Vec::new()], 0usize, 0usize);
    let mut rest = bytes;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '\n' => {
                row += 1;
                rows.resize(rows.len().max(row + 1), Vec::new());
            }
            '\r' => column = 0,
            '\x1b' => {
                // The last may not be there yet.
                let Some(end) = rest.find(|c: char| c.is_ascii_alphabetic()) else {
                    break;
                };
                let number = rest[1..end].parse::<usize>();
                match (&rest[..1], &rest[end..=end]) {
                    ("[", "m") => {}
                    ("[", "J") => {
                        rows.truncate(row + 1);
                        rows[row].truncate(column);
                    }
                    ("[", "A") => row = row.checked_sub(number.unwrap_or(1)).expect("a row"),
                    _ => panic!("{:?} in {bytes:?}", &rest[..=end]),
                }
                rest = &rest[end + 1..];
            }
            c => {
                let cells: &mut Vec<char> = &mut rows[row];
                cells.resize(cells.len().max(column + 1), ' ');
                cells[column] = c;
                column += 1;
            }
        }
    }
    rows.into_iter().map(String::from_iter).collect()
}

/// The job's name, and what its ranks do.
const VIEW: [&str; 2] = ["run  run  ", "step 7  "];

fn assert_left_as_it_was(bytes: &str) {
    let rows = rows(bytes);
    for view in VIEW {
        assert!(!rows.iter().any(|row| row.starts_with(view)), "{rows:#?}");
    }
    assert_eq!(rows.last().map(String::as_str), Some(""), "{rows:#?}");
    let mut codes = bytes.rmatch_indices("\x1b[").map(|(i, _)| {
        let end = bytes[i..].find(|c: char| c.is_ascii_alphabetic());
        &bytes[i..=i + end.expect("a whole code")]
    });
    let colour = codes.find(|code| code.ends_with('m'));
    assert_eq!(colour, Some("\x1b[0m"), "it is taken back: {bytes:?}");
}

#[test]
fn the_view_shows_ranks_and_steps_and_leaves_the_terminal_as_it_was() {
    let scene = Scene::new();
    let end = scene.path("end").display().to_string();
    let actions = format!("--say hello --step 7 --wait-for {end} --say goodbye");
    let terminal = Terminal::start(&scene, &actions);
    let modes = terminal.modes();
    let rows = terminal.wait_for(VIEW[1]);
    let at = |start: &str| rows.iter().position(|row| row.starts_with(start));
    let [job, step] = VIEW.map(at);
    assert!(job.is_some() && job < step, "{rows:#?}");
    assert!(
        rows[job.unwrap()].contains("2 ranks on 1 node"),
        "{rows:#?}"
    );
    let host = tsm_launch::manifest::host();
    let node = at(&format!("{host}  running  ranks 0-1  step 7"));
    assert!(node > step, "{rows:#?}");
    fs_err::write(&end, "").unwrap();
    let (code, bytes) = terminal.finish(&modes);
    assert_eq!(code, 0, "{bytes}");
    assert!(bytes.contains(" | goodbye\r\n"), "{bytes}");
    assert_left_as_it_was(&bytes);
}

#[test]
fn ctrl_c_on_the_terminal_ends_the_job_and_leaves_it_as_it_was() {
    let scene = Scene::new();
    let ready = scene.path("ready").display().to_string();
    let actions = format!("--exit-on 2 0 --step 7 --touch {ready}{{rank}} --hang");
    let terminal = Terminal::start(&scene, &actions);
    let modes = terminal.modes();
    scene.wait_for_pids("ready", 2);
    terminal.wait_for(VIEW[1]);
    rustix::io::write(&terminal.master, b"\x03").unwrap();
    let (code, bytes) = terminal.finish(&modes);
    assert_eq!(code, 130, "{bytes}");
    assert!(bytes.contains("^C"), "{bytes}");
    assert_left_as_it_was(&bytes);
    scene.assert_nothing_survives();
}
