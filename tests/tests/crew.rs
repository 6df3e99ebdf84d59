//! Trainers started as a launcher starts them, one by one, so that a test can signal one of them and
//! read what each tells its launcher.

use crate::job::{Outcome, Running, Scene, TRAINER, config, start_with_stdin};
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use tsm_job::message::WorkerMessage;
use tsm_launch::port::Port;

/// The variables that one generation of ranks has in common.
pub struct Job {
    pub world_size: u32,
    pub restart_count: u32,
    /// Run folder to go on from, which is also the one to go on in.
    pub resume: bool,
    /// Rank 0 can listen on it, and nobody else gets it.
    port: Port,
    arguments: Vec<String>,
}

/// One trainer.
pub struct Rank {
    pub running: Running,
    told: Arc<Mutex<Vec<WorkerMessage>>>,
}

impl Job {
    pub fn new(scene: &Scene, world_size: u32, overrides: &[&str]) -> Job {
        let mut arguments = vec!["--config".into(), config("demo.yaml").display().to_string()];
        arguments.extend(scene.overrides(overrides));
        arguments.push("launch.device=cpu".into());
        Job {
            world_size,
            restart_count: 0,
            resume: false,
            port: Port::reserve().expect("a free port"),
            arguments,
        }
    }

    pub fn with(mut self, setting: &str) -> Job {
        self.arguments.push(setting.into());
        self
    }

    pub fn resumed(self) -> Job {
        Job {
            resume: true,
            ..self
        }
    }

    /// The environment and arguments of a rank, for `program` or what ends up running it.
    pub fn command(&self, mut program: Command, run: &Path, rank: u32) -> Command {
        for name in tsm_launch::plan::RANK_VARIABLES {
            program.env_remove(name);
        }
        for (name, value) in [
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("WORLD_SIZE", self.world_size),
            ("LOCAL_WORLD_SIZE", self.world_size),
            ("MASTER_PORT", u32::from(self.port.number)),
            ("TSM_RESTART_COUNT", self.restart_count),
            // Standard input is the socket to the launcher.
            ("TSM_AGENT_FD", 0),
            ("OMP_NUM_THREADS", 1),
        ] {
            program.env(name, value.to_string());
        }
        program.env("MASTER_ADDR", "127.0.0.1");
        program.env("GLOO_SOCKET_IFNAME", "lo");
        program.env("TSM_RUN_DIR", run);
        if self.resume {
            program.env("TSM_RESUME_FROM", run);
        }
        program.args(&self.arguments);
        program
    }

    pub fn start(&self, scene: &Scene, run: &str, rank: u32) -> Rank {
        let mut program = Command::new(TRAINER);
        program.current_dir(scene.path("."));
        Rank::start(self.command(program, &scene.path(run), rank))
    }

    pub fn start_all(&self, scene: &Scene, run: &str) -> Vec<Rank> {
        (0..self.world_size)
            .map(|rank| self.start(scene, run, rank))
            .collect()
    }
}

impl Rank {
    pub fn start(command: Command) -> Rank {
        let (ours, theirs) = UnixStream::pair().expect("a socket");
        let told = Arc::new(Mutex::new(Vec::new()));
        let list = told.clone();
        // Ends with the trainer, which alone holds the other end.
        std::thread::spawn(move || {
            for line in BufReader::new(ours).lines().map_while(Result::ok) {
                let message = serde_json::from_str(&line).expect("a message of the protocol");
                list.lock().expect("no panic above").push(message);
            }
        });
        let stdin = Stdio::from(std::os::fd::OwnedFd::from(theirs));
        let running = start_with_stdin(command, stdin);
        Rank { running, told }
    }

    /// What the rank has said so far.
    pub fn told(&self) -> Vec<WorkerMessage> {
        self.told.lock().expect("no panic above").clone()
    }

    /// Waits until the rank says something that `wanted` takes.
    pub fn until<T>(&mut self, what: &str, wanted: impl Fn(&WorkerMessage) -> Option<T>) -> T {
        let told = self.told.clone();
        let look = || {
            let told = told.lock().expect("no panic above");
            told.iter().find_map(&wanted)
        };
        self.running.until(what, look)
    }

    /// Waits until so many steps are finished.
    pub fn until_step(&mut self, wanted: u64) {
        self.until(&format!("step {wanted}"), |m| match m {
            WorkerMessage::Step { step, .. } if *step >= wanted => Some(()),
            _ => None,
        });
    }

    pub fn until_section(&mut self, wanted: &str) {
        self.until(wanted, |m| match m {
            WorkerMessage::Section { name } if name == wanted => Some(()),
            _ => None,
        });
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.running.pid(), signal).expect("the rank runs");
    }

    pub fn ask_to_save(&self) {
        self.signal(rustix::process::Signal::USR2);
    }
}

/// Waits for the end of all ranks; panics unless each has the exit code `want`.
pub fn finish(ranks: Vec<Rank>, want: i32) -> Vec<Outcome> {
    let outcomes: Vec<Outcome> = ranks
        .into_iter()
        .map(|r| r.running.finish(crate::job::DEADLINE))
        .collect();
    let codes: Vec<i32> = outcomes.iter().map(|o| o.code).collect();
    assert!(codes.iter().all(|&c| c == want), "{codes:?}\n{outcomes:#?}");
    outcomes
}
