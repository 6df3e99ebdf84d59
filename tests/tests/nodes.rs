//! Nodes on this machine: each has a host name of its own, and a `tsm-launch` that is started there by hand.

use crate::job::{Running, Scene, config, events, start};
use std::process::Command;
use tsm_job::RunDir;
use tsm_launch::port::Port;

/// The nodes of one job, whose run folder is `run`.
pub struct Nodes {
    pub scene: Scene,
    port: Port,
    /// A node sees its own disk, the folder of its name, in place of the run folder.
    own_disks: bool,
}

impl Nodes {
    /// `None`, said on stderr, where there are no namespaces.
    pub fn new(scene: Scene, own_disks: bool) -> Option<Nodes> {
        let tried = Command::new("unshare")
            .args(["--mount", "--uts", "true"])
            .output();
        if !tried.is_ok_and(|o| o.status.success()) {
            eprintln!("skipped: no mount and host name namespaces here; needs root and unshare");
            return None;
        }
        let key = tsm_launch::cluster::key::Key::random();
        key.write_file(&scene.path("key")).unwrap();
        Some(Nodes {
            scene,
            port: Port::reserve().unwrap(),
            own_disks,
        })
    }

    /// The demo's configuration with [`Scene::overrides`], in the run folder.
    pub fn job(&self, overrides: &[&str]) -> Vec<String> {
        let demo = config("demo.yaml").display().to_string();
        let mut words = vec!["--run-dir=run".to_string(), demo];
        words.extend(self.scene.overrides(overrides));
        words
    }

    /// The run folder as the node `name` sees it.
    pub fn run(&self, name: &str) -> RunDir {
        self.scene.run(if self.own_disks { name } else { "run" })
    }

    /// Starts `tsm-launch` on `node-a` and `node-b`, the first when the second cannot be quicker.
    pub fn start(&self, words: &[String]) -> [Running; 2] {
        let joined = || events(&self.run("node-a").events(), "join").len();
        let before = joined();
        let mut first = self.start_one("node-a", words);
        first.until("the first node", || (joined() > before).then_some(()));
        [first, self.start_one("node-b", words)]
    }

    pub fn start_one(&self, name: &str, words: &[String]) -> Running {
        start(self.command(name, words))
    }

    /// `tsm-launch` on the node `name`. A mounted disk is gone with the last process that sees it.
    fn command(&self, name: &str, words: &[String]) -> Command {
        let (disk, run) = (self.scene.path(name), self.scene.path("run"));
        fs_err::create_dir_all(&run).unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--uts", "--propagation=private"]);
        let mut script = r#"hostname "$0" && "#.to_string();
        if self.own_disks {
            fs_err::create_dir_all(&disk).unwrap();
            script += r#"mount --bind "$1" "$2" && "#;
        }
        script += r#"shift 2 && exec "$@""#;
        let launch = self.scene.launch(words);
        command.args(["sh", "-c", &script, name]);
        command.args([&disk, &run]).arg(launch.get_program());
        // A busy machine is no lost node.
        command.args(["--key-file=key", "--max-restarts=3", "--node-timeout=5s"]);
        command.arg(format!("--rendezvous=127.0.0.1:{}", self.port.number));
        command.args(launch.get_args());
        command.current_dir(self.scene.path("."));
        for (name, _) in launch.get_envs() {
            command.env_remove(name);
        }
        // As the ranks of one node have it, with which these are compared.
        command.env("OMP_NUM_THREADS", "1");
        command
    }
}
