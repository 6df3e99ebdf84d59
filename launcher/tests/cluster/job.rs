//! A job over the nodes of a [`Cluster`]: one `tsm-launch` on each, in order of the nodes.

use crate::demo::write_lists;
use crate::ground::Ground;
use crate::harness::{FAKE, send, until};
use crate::nodes::Cluster;
use crate::program::write_program;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Where losses are not what is tested, a busy machine must not look like one.
const NODE_TIMEOUT: &str = "4s";

/// A job with a name, which is that of its run folder, and a meeting point on `node-1`.
pub struct Job<'a> {
    cluster: &'a Cluster,
    name: &'static str,
    port: u16,
    agents: BTreeMap<usize, Agent>,
    /// Where all launchers run.
    pub ground: Option<Ground>,
}

/// A `tsm-launch` on one node. Dropped while it runs (a failing test), it is killed.
struct Agent {
    child: Child,
    since: Instant,
    ended: Option<(i32, Duration)>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[expect(unsafe_code, reason = "set between fork and exec")]
fn die_with_this_thread(command: &mut Command) {
    let set = || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        Ok(())
    };
    // SAFETY: the closure makes one system call.
    unsafe { command.pre_exec(set) };
}

impl<'a> Job<'a> {
    pub fn new(cluster: &'a Cluster) -> Job<'a> {
        Job::named(cluster, "run", 29_400)
    }

    pub fn named(cluster: &'a Cluster, name: &'static str, port: u16) -> Job<'a> {
        let key = cluster.scene.path(&format!("{name}.key"));
        let made = tsm_launch::cluster::key::Key::random().write_file(&key);
        made.expect("a key file");
        Job {
            cluster,
            name,
            port,
            agents: BTreeMap::new(),
            ground: None,
        }
    }

    /// A job for [`crate::demo::DEMO`] with `--trainer trainer`, whose workers do `actions`.
    pub fn with_trainer(cluster: &'a Cluster, actions: &str) -> Job<'a> {
        write_lists(&cluster.scene.path(""));
        let script = format!("#!/bin/sh\nexec {FAKE} {actions}\n");
        write_program(&cluster.scene.path("trainer"), script);
        Job::new(cluster)
    }

    /// Starts fake workers that do `actions` on all nodes, each node when the one before it has joined, so that
    /// ranks are in order of the nodes.
    pub fn on_all(cluster: &'a Cluster, options: &str, actions: &str) -> Job<'a> {
        let mut job = Job::new(cluster);
        job.start_all(options, actions);
        job
    }

    /// See [`Job::on_all`].
    pub fn start_all(&mut self, options: &str, actions: &str) {
        for n in 1..=self.cluster.nodes.len() {
            self.start(n, options, actions);
            self.wait_until_joined(n);
        }
    }

    /// Starts node `n`.
    pub fn start(&mut self, n: usize, options: &str, actions: &str) {
        let mut words = vec!["--"];
        words.insert(0, "--cpus=2");
        words.splice(1..1, options.split_whitespace());
        words.push(FAKE);
        words.extend(actions.split_whitespace());
        self.start_words(n, &words);
    }

    pub fn start_words(&mut self, n: usize, words: &[&str]) {
        let scene = &self.cluster.scene;
        let point = format!("10.77.0.1:{}", self.port);
        let key = format!("{}.key", self.name);
        let common = [
            "--run-dir",
            self.name,
            "--rendezvous",
            &point,
            "--key-file",
            &key,
        ];
        let mut command = scene.command(&common);
        if !words.iter().any(|word| word.starts_with("--node-timeout")) {
            command.args(["--node-timeout", NODE_TIMEOUT]);
        }
        let stream = |kind| fs_err::File::create(self.stream(n, kind)).expect("a file");
        command.args(words);
        command.stdout(stream("out").into_parts().0);
        command.stderr(stream("err").into_parts().0);
        if let Some(ground) = &self.ground {
            ground.enter(&mut command);
        }
        die_with_this_thread(&mut command);
        let child = self.cluster.node(n).run(move || command.spawn());
        let agent = Agent {
            child: child.expect("tsm-launch starts"),
            since: Instant::now(),
            ended: None,
        };
        self.agents.insert(n, agent);
    }

    fn stream(&self, n: usize, kind: &str) -> PathBuf {
        self.cluster
            .scene
            .path(&format!("{}-{n}.{kind}", self.name))
    }

    /// A file of the run folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.cluster.scene.path(self.name).join(name)
    }

    pub fn read(&self, name: &str) -> String {
        fs_err::read_to_string(self.path(name)).unwrap_or_default()
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// What the launcher on node `n` has printed to stderr.
    pub fn err(&self, n: usize) -> String {
        fs_err::read_to_string(self.stream(n, "err")).unwrap_or_default()
    }

    /// As [`Job::err`], behind what every node is told of the job and of its place in it.
    pub fn end_of_err(&self, n: usize) -> String {
        let is_told = |line: &&str| {
            let told = ["tsm-launch: joined job ", "tsm-launch: this is node "];
            told.iter().any(|start| line.starts_with(start))
        };
        let err = self.err(n);
        err.split_inclusive('\n').skip_while(is_told).collect()
    }

    pub fn out(&self, n: usize) -> String {
        fs_err::read_to_string(self.stream(n, "out")).unwrap_or_default()
    }

    /// All events of one kind.
    pub fn events(&self, kind: &str) -> Vec<Value> {
        let text = self.read("events.jsonl");
        let all = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        all.filter(|event| event["event"] == kind).collect()
    }

    /// Waits for `number` events of a kind.
    pub fn wait_for(&self, kind: &str, number: usize) -> Vec<Value> {
        until(kind, || {
            Some(self.events(kind)).filter(|events| events.len() >= number)
        })
    }

    pub fn wait_until_joined(&self, n: usize) {
        let name = &self.cluster.node(n).name;
        until(&format!("{name} to join"), || {
            let joined = self.events("join");
            joined.iter().any(|e| e["host"] == **name).then_some(())
        });
    }

    /// Pids of `ranks` workers that have touched `<name><rank>`.
    pub fn wait_for_pids(&self, name: &str, ranks: Range<u32>) -> Vec<i32> {
        self.cluster.scene.wait_for_pids_of(name, ranks)
    }

    pub fn signal(&self, n: usize, signal: Signal) {
        send(self.agents[&n].child.id() as i32, signal);
    }

    /// Whether the launcher on node `n` has ended, and with what code.
    pub fn code(&mut self, n: usize) -> Option<i32> {
        let agent = self.agents.get_mut(&n).expect("started");
        if agent.ended.is_none()
            && let Some(status) = agent.child.try_wait().expect("a child")
        {
            let code = status.code().or(status.signal().map(|s| 128 + s));
            agent.ended = Some((code.expect("ended"), agent.since.elapsed()));
        }
        agent.ended.map(|(code, _)| code)
    }

    /// Waits for the end of the launcher on node `n`; its code.
    pub fn end_of(&mut self, n: usize) -> i32 {
        until(&format!("node-{n} to end"), || self.code(n))
    }

    /// Waits for the end of all launchers; their codes in order of the nodes. No process of a node is left then.
    pub fn end(&mut self) -> Vec<i32> {
        let nodes: Vec<usize> = self.agents.keys().copied().collect();
        let codes = nodes.iter().map(|&n| self.end_of(n)).collect();
        for &n in &nodes {
            self.cluster.node(n).assert_empty();
        }
        codes
    }

    /// How long the launcher on node `n` ran.
    pub fn took(&self, n: usize) -> Duration {
        self.agents[&n].ended.expect("ended").1
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{self}");
        }
    }
}

/// All that the launchers have said.
impl std::fmt::Display for Job<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for n in self.agents.keys() {
            writeln!(f, "--- node-{n}\n{}{}", self.out(*n), self.err(*n))?;
        }
        write!(f, "--- events.jsonl\n{}", self.read("events.jsonl"))
    }
}
