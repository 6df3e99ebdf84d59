//! Nodes: threads in network and host name namespaces of their own, each with a virtual cable to a switch.
//!
//! A process belongs to the node whose thread starts it, and dies with that thread. The namespaces end with
//! their last process, so nothing is left behind, however a test ends.

use crate::harness::{Scene, alive, until};
use rustix::process::{Pid, Signal};
use rustix::thread::{UnshareFlags, gettid};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// After the end of a job the kernel and the guards need a moment.
const LAST_MOMENT: Duration = Duration::from_secs(60);

type Task = Box<dyn FnOnce() + Send>;

/// A network namespace, and a thread in it.
pub struct Node {
    /// Its host name.
    pub name: String,
    tid: i32,
    /// Number of the namespace.
    net: String,
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
}

/// Gives the calling thread a network without any interface that is up, and a host name.
#[expect(unsafe_code, reason = "namespaces for the calling thread")]
fn become_node(name: &str) -> std::io::Result<()> {
    // SAFETY: neither namespace takes anything away that other threads share with this one.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWUTS) }?;
    // SAFETY: the pointer and the length are those of the name.
    match unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

impl Node {
    fn new(name: &str) -> std::io::Result<Node> {
        let (ready, is_ready) = channel();
        let (tasks, queue) = channel::<Task>();
        let own = name.to_string();
        let thread = std::thread::spawn(move || {
            let made = become_node(&own).map(|()| gettid().as_raw_nonzero().get());
            if ready.send(made).is_ok() {
                queue.into_iter().for_each(|task| task());
            }
        });
        let tid = is_ready.recv().expect("the thread of a node")?;
        let net = namespace(&format!("/proc/{tid}/ns/net")).expect("the thread runs");
        Ok(Node {
            name: name.into(),
            tid,
            net,
            tasks: Some(tasks),
            thread: Some(thread),
        })
    }

    /// Does `work` on the thread of this node.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        let task = move || {
            // The receiver waits.
            let _ = done.send(catch_unwind(AssertUnwindSafe(work)));
        };
        let tasks = self.tasks.as_ref().expect("not dropped");
        tasks.send(Box::new(task)).expect("the thread of a node");
        let result = result.recv().expect("the thread of a node");
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Runs `ip` here, once for each line.
    pub fn ip(&self, lines: &str) {
        self.try_ip(lines).unwrap_or_else(|e| panic!("{e}"));
    }

    fn try_ip(&self, lines: &str) -> Result<(), String> {
        let lines = lines.to_string();
        self.run(move || {
            let mut command = Command::new("ip");
            command.args(["-batch", "-"]);
            command.stdin(Stdio::piped()).stdout(Stdio::null());
            let mut child = command.stderr(Stdio::piped()).spawn().expect("ip");
            let mut stdin = child.stdin.take().expect("piped");
            stdin.write_all(lines.as_bytes()).expect("ip reads");
            drop(stdin);
            let output = child.wait_with_output().expect("ip ends");
            let text = String::from_utf8_lossy(&output.stderr);
            match output.status.success() {
                true => Ok(()),
                false => Err(format!("ip: {text}\n{lines}")),
            }
        })
    }

    /// Runs `tc` here, once for each line.
    ///
    /// # Errors
    /// When there is none, or the kernel has not what it asks for.
    pub fn tc(&self, lines: &str) -> Result<(), String> {
        let lines = lines.to_string();
        self.run(move || {
            for line in lines.lines() {
                let output = Command::new("tc").args(line.split(' ')).output();
                let output = output.map_err(|e| format!("no `tc` ({e})"))?;
                let text = String::from_utf8_lossy(&output.stderr);
                if !output.status.success() {
                    return Err(format!("tc {line}: {}", text.trim()));
                }
            }
            Ok(())
        })
    }

    /// Processes of this node: pid and command line.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let entries = fs_err::read_dir("/proc").expect("/proc").flatten();
        let here = |e: fs_err::DirEntry| {
            let pid: i32 = e.file_name().to_str()?.parse().ok()?;
            let of = namespace(e.path().join("ns/net").to_str()?)?;
            let command = fs_err::read(e.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            (of == self.net && alive(pid)).then_some((pid, command))
        };
        entries.filter_map(here).collect()
    }

    /// Fails unless all processes of this node end within a moment.
    pub fn assert_empty(&self) {
        let start = Instant::now();
        loop {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            let waited = start.elapsed();
            assert!(waited < LAST_MOMENT, "{} still runs {left:?}", self.name);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.tasks.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the link to a namespace says; a process that is gone, or a zombie, has none.
fn namespace(path: &str) -> Option<String> {
    Some(fs_err::read_link(path).ok()?.to_string_lossy().into_owned())
}

/// Nodes `node-1`, `node-2`, ... at 10.77.0.1, 10.77.0.2, ..., with a folder that all of them see.
pub struct Cluster {
    pub scene: Scene,
    pub nodes: Vec<Node>,
    switch: Node,
}

impl Cluster {
    /// `None` without the right to; says so.
    pub fn new(num_nodes: usize) -> Option<Cluster> {
        if let Err(e) = Command::new("ip").arg("-V").stdout(Stdio::null()).status() {
            eprintln!("skipped: no `ip` ({e}); install iproute2");
            return None;
        }
        let switch = match Node::new("switch") {
            Ok(switch) => switch,
            Err(e) => {
                eprintln!("skipped: no network namespace ({e}); needs root");
                return None;
            }
        };
        let parts =
            "link add br0 type bridge\nlink add try0 type veth peer name try1\nlink del try0\n";
        if let Err(e) = switch.try_ip(parts) {
            eprintln!("skipped: {e}needs bridge and veth of the kernel");
            return None;
        }
        let node = |n| Node::new(&format!("node-{n}")).expect("a further namespace");
        let nodes: Vec<Node> = (1..=num_nodes).map(node).collect();
        let mut cables = "link set br0 up\n".to_string();
        for (node, n) in nodes.iter().zip(1..) {
            let tid = node.tid;
            cables += &format!(
                "link add port{n} type veth peer name eth0 netns {tid}\nlink set port{n} master br0 up\n"
            );
        }
        switch.ip(&cables);
        for (node, n) in nodes.iter().zip(1..) {
            node.ip(&format!(
                "link set lo up\naddr add 10.77.0.{n}/24 dev eth0\nlink set eth0 up\n"
            ));
        }
        for node in &nodes {
            // The kernel notices the carrier of a virtual cable with a delay.
            until("the network of a node", || {
                let list = node.run(tsm_launch::addresses::list);
                (!list.is_empty()).then_some(())
            });
        }
        let scene = Scene::new();
        Some(Cluster {
            scene,
            nodes,
            switch,
        })
    }

    /// Node `n`, counted from 1; beyond the last it begins anew, for several launchers on one node.
    pub fn node(&self, n: usize) -> &Node {
        &self.nodes[(n - 1) % self.nodes.len()]
    }

    pub fn pull_cable(&self, n: usize) {
        self.switch.ip(&format!("link set port{n} down\n"));
    }

    /// Lets node `n` send no faster than this.
    ///
    /// # Errors
    /// When this kernel cannot, or there is no `tc`.
    pub fn slow_down(&self, n: usize, mbit_s: u32) -> Result<(), String> {
        self.node(n).tc(&format!(
            "qdisc replace dev eth0 root tbf rate {mbit_s}mbit burst 16kb latency 300ms\n"
        ))
    }

    /// Keeps node `n` from answering whoever wants to connect to it: its SYN-ACKs go to a queue too small for them.
    pub fn close(&self, n: usize) -> Result<(), String> {
        self.node(n)
            .tc("qdisc replace dev eth0 root handle 2: htb default 10\n\
             class add dev eth0 parent 2: classid 2:10 htb rate 100mbit\n\
             class add dev eth0 parent 2: classid 2:20 htb rate 1mbit\n\
             qdisc add dev eth0 parent 2:20 tbf rate 1mbit burst 10b limit 1000\n\
             filter add dev eth0 parent 2: protocol ip u32 match u8 0x12 0x12 at 33 flowid 2:20\n")
    }

    /// Between these nodes nothing gets through.
    pub fn isolate(&self, nodes: &[usize]) {
        for n in nodes {
            self.switch
                .ip(&format!("link set port{n} type bridge_slave isolated on\n"));
        }
    }

    pub fn plug_cable(&self, n: usize) {
        self.switch.ip(&format!("link set port{n} up\n"));
    }
}

impl Drop for Cluster {
    /// After a test that failed, some may be left.
    fn drop(&mut self) {
        for (pid, _) in self.nodes.iter().flat_map(Node::processes) {
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
    }
}
