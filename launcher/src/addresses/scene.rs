//! Nodes for tests: threads in network namespaces of their own, joined by virtual cables. A namespace ends
//! with its thread, so nothing is left behind, however a test ends.

use rustix::thread::{UnshareFlags, gettid};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// A network namespace, named by the thread that is in it.
pub struct Net {
    tid: i32,
}

impl Net {
    /// Runs `ip` with these words there.
    pub fn ip(&self, words: &str) {
        self.try_ip(words).unwrap_or_else(|e| panic!("{e}"));
    }

    fn try_ip(&self, words: &str) -> Result<(), String> {
        let inside = ["-t", &self.tid.to_string(), "-n", "ip"].map(String::from);
        let mut command = Command::new("nsenter");
        let output = command
            .args(inside)
            .args(words.split(' '))
            .stdin(Stdio::null())
            .output();
        let output = output.map_err(|e| format!("nsenter: {e}"))?;
        let text = String::from_utf8_lossy(&output.stderr);
        match output.status.success() {
            true => Ok(()),
            false => Err(format!("ip {words}: {}", text.trim())),
        }
    }

    /// A cable from `own` here to `theirs` at `other`; both ends are down.
    pub fn cable(&self, own: &str, other: &Net, theirs: &str) {
        let there = other.tid;
        self.ip(&format!(
            "link add {own} type veth peer name {theirs} netns {there}"
        ));
    }
}

/// Makes the calling thread a node; `None` without the right to.
#[expect(unsafe_code, reason = "a namespace for the calling thread")]
fn become_node() -> Option<Net> {
    // SAFETY: a new network namespace takes nothing away that other threads share with this one.
    if let Err(e) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) } {
        eprintln!("skipped: no network namespace ({e}); needs root");
        return None;
    }
    let net = Net {
        tid: gettid().as_raw_nonzero().get(),
    };
    let tried = net
        .try_ip("link add try0 type veth peer name try1")
        .and_then(|()| net.try_ip("link del try0"));
    if let Err(e) = tried {
        eprintln!("skipped: no virtual cable ({e}); needs nsenter, iproute2 and veth");
        return None;
    }
    Some(net)
}

/// Runs `work` in a namespace without any interface that is up.
pub fn in_namespace<T: Send>(work: impl FnOnce(&Net) -> T + Send) -> Option<T> {
    let node = || become_node().map(|net| work(&net));
    thread::scope(|scope| scope.spawn(node).join().expect("the node"))
}

/// Runs `first` and `second` at the same time in two namespaces that `wire` has joined.
pub fn two_nodes<A: Send, B: Send>(
    wire: impl FnOnce(&Net, &Net),
    first: impl FnOnce() -> A + Send,
    second: impl FnOnce() -> B + Send,
) -> Option<(A, B)> {
    fn node<T>(
        work: impl FnOnce() -> T,
        ready: Sender<Option<Net>>,
        go: Receiver<()>,
    ) -> Option<T> {
        ready.send(become_node()).ok()?;
        go.recv().ok()?;
        Some(work())
    }
    thread::scope(|scope| {
        let (ready_a, a) = channel();
        let (ready_b, b) = channel();
        let (go_a, start_a) = channel();
        let (go_b, start_b) = channel();
        let first = scope.spawn(move || node(first, ready_a, start_a));
        let second = scope.spawn(move || node(second, ready_b, start_b));
        if let (Some(a), Some(b)) = (a.recv().expect("first"), b.recv().expect("second")) {
            wire(&a, &b);
            let _ = (go_a.send(()), go_b.send(()));
        }
        drop((go_a, go_b));
        Some((
            first.join().expect("first")?,
            second.join().expect("second")?,
        ))
    })
}

/// Looks again and again until `look` finds something.
pub fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "waited too long");
        thread::sleep(Duration::from_millis(2));
    }
}
