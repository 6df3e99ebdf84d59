//! Training as a job of SLURM on two nodes: to its end, through a pre-emption, and into a failure.
//!
//! Needs root, slurmctld, slurmd and munged; says so and passes where they are missing, unless
//! TSM_REQUIRE_SLURM is set.

#[path = "../slurm-cluster/cluster.rs"]
#[allow(
    dead_code,
    reason = "launcher/tests/slurm uses the cluster too, and more of it"
)]
mod cluster;

use crate::job::{
    DEADLINE, LAUNCH, Scene, TRAINER, config, contains, events, history, json, kill_rank, start,
};
use crate::resume::{assert_identical, learned, tensors};
use cluster::Cluster;
use rustix::process::{Pid, Signal, kill_process};
use std::path::PathBuf;
use std::sync::Arc;
use tsm_job::{RunDir, exit};
use tsm_launch::start::slurm::nodelist::expand;
use tsm_launch::start::slurm::{Job, JobId};

const STEPS_PER_EPOCH: u64 = 20;
const LAST: u64 = 2 * STEPS_PER_EPOCH;

/// Everything random is on.
const JOB: [&str; 7] = [
    "run.seed=5",
    "model.head.dropout=0.5",
    "data.train.size=24",
    "data.train.flip=0.5",
    "train.epochs=2",
    "train.keep_last=100",
    "train.log_every=1",
];

/// Jobs of two nodes with a rank each, which train on the same clips.
struct Jobs {
    cluster: Arc<Cluster>,
    scene: Scene,
}

/// A job that was submitted.
struct Submitted {
    id: JobId,
    run: RunDir,
    output: PathBuf,
}

impl Jobs {
    fn new() -> Option<Jobs> {
        let cluster = Cluster::shared();
        let required = std::env::var_os("TSM_REQUIRE_SLURM").is_some();
        assert!(
            cluster.is_some() || !required,
            "TSM_REQUIRE_SLURM is set, and SLURM cannot run here"
        );
        let cluster = cluster?;
        let scene = Scene::new();
        scene.motion_set(2 * 4 * STEPS_PER_EPOCH as usize, 8);
        Some(Jobs { cluster, scene })
    }

    /// `tsm-launch slurm` for two nodes of these, as a user would type it.
    fn submit(&self, nodes: &str, overrides: &[&str]) -> Submitted {
        let trainer = format!("--with=--trainer={TRAINER}");
        let nodes = format!("--extra=--nodelist={nodes}");
        let mut command = self.cluster.command(LAUNCH);
        command.current_dir(self.scene.path("."));
        // Where the job runs must not change what it computes.
        command.env("OMP_NUM_THREADS", "1");
        command.args(["slurm", "--nodes", "2", "--cpus", "1", "--partition", "low"]);
        // Four nodes share the cores of this machine: none is lost because it had to wait for them.
        command.arg("--with=--node-timeout=5s");
        command.args([&trainer, &nodes]).arg(config("demo.yaml"));
        command.args(self.scene.overrides(overrides));
        let said = start(command).finish(DEADLINE);
        assert_eq!(said.code, exit::OK, "{said:?}");
        let word = |before: &str| {
            let line = said.out.lines().find_map(|l| l.strip_prefix(before));
            let line = line.unwrap_or_else(|| panic!("no {before:?}: {said:?}"));
            line.split_whitespace().next().unwrap().to_string()
        };
        let id = word("job ").parse().expect("the number of a job");
        Submitted {
            id: JobId { id, array: None },
            run: RunDir::new(word("run folder ")),
            output: word("output ").into(),
        }
    }

    /// Waits until the job has finished so many steps.
    fn until_step(&self, job: &Submitted, step: u64) {
        self.cluster
            .until(&format!("step {step} of job {}", job.id), || {
                let steps = events(&job.run.metrics(), "step");
                let ended = events(&job.run.events(), "end");
                assert!(ended.is_empty(), "{}", job.said());
                steps.iter().any(|s| s["step"] == step).then_some(())
            });
    }

    /// Waits for the end; panics unless SLURM says this of it.
    fn assert_ended(&self, job: &Submitted, state: &str, code: i32) -> Job {
        let end = self.cluster.wait(job.id);
        let said = job.said();
        assert_eq!((end.state.as_str(), end.exit), (state, (code, 0)), "{said}");
        end
    }

    /// The steps of a job that SLURM knows of.
    fn steps_of(&self, job: &Submitted) -> String {
        let id = format!("--jobs={}", job.id);
        self.cluster.output("squeue", &["-h", "--steps", &id])
    }

    /// No step of this job is left, and no process of any.
    fn assert_nothing_is_left(&self, job: &Submitted) {
        assert_eq!(self.steps_of(job), "");
        let scene = self.scene.path("motion");
        let scene = scene.parent().expect("a folder");
        let here = |e: fs_err::DirEntry| {
            let cwd = fs_err::read_link(e.path().join("cwd")).ok()?;
            let words = fs_err::read(e.path().join("cmdline")).ok()?;
            let words = String::from_utf8_lossy(&words).replace('\0', " ");
            (cwd.starts_with(scene) && !words.is_empty()).then_some(words)
        };
        self.cluster.until("the end of all processes", || {
            let all = fs_err::read_dir("/proc").unwrap().flatten();
            all.filter_map(here).next().is_none().then_some(())
        });
    }
}

impl Submitted {
    /// What the launcher and rank 0 have printed in all turns.
    fn said(&self) -> String {
        fs_err::read_to_string(&self.output).unwrap_or_default()
    }

    /// A signal to the process of a rank, as it was last started.
    fn signal_rank(&self, rank: u64, signal: Signal) {
        let spawns = events(&self.run.events(), "spawn");
        let spawn = spawns.iter().rfind(|e| e["rank"] == rank).expect("started");
        let pid = spawn["pid"].as_i64().and_then(|p| i32::try_from(p).ok());
        let pid = pid.and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, signal).expect("the rank runs");
    }

    /// Both nodes are in the manifest, with a rank each; returns their names.
    fn assert_two_nodes(&self, end: &Job, outcome: &str, code: i32) -> Vec<String> {
        let manifest = json(&self.run.manifest());
        assert_eq!(manifest["outcome"], outcome, "{manifest:#}");
        assert_eq!(manifest["exit_code"], code);
        assert_eq!(manifest["world_size"], 2);
        let nodes = expand(&end.nodes).unwrap();
        assert_eq!(nodes.len(), 2);
        let mut joined: Vec<_> = manifest["nodes"].as_array().unwrap().iter().collect();
        joined.sort_by_key(|n| n["host"].as_str().map(String::from));
        for (node, name) in joined.iter().zip(&nodes) {
            assert_eq!(
                (&node["host"], &node["devices"][0]),
                (&(**name).into(), &"cpu".into())
            );
        }
        nodes
    }

    /// What a training leaves that came to its end.
    fn assert_trained(&self) {
        let metrics = history(&self.run);
        let steps: Vec<u64> = metrics.steps.iter().map(|s| s.step).collect();
        assert_eq!(steps, (1..=LAST).collect::<Vec<_>>());
        assert_eq!(metrics.validations.len(), 2);
        assert!(tensors(&self.run, LAST).exists());
        let of = |name: &str| self.run.path().join(name);
        assert!(of("report.md").exists() && self.run.summary().exists());
        let boards = fs_err::read_dir(self.run.tb()).unwrap().flatten();
        assert!(boards.map(|f| f.metadata().unwrap().len()).sum::<u64>() > 1000);
        assert!(!self.run.failure().exists());
    }
}

#[test]
fn two_nodes_train_to_the_end() {
    let Some(jobs) = Jobs::new() else { return };
    let job = jobs.submit("n[1-2]", &JOB);
    let end = jobs.assert_ended(&job, "COMPLETED", exit::OK);
    let nodes = job.assert_two_nodes(&end, "succeeded", exit::OK);
    job.assert_trained();
    contains(
        &job.said(),
        &[
            &format!("2 workers on 2 nodes ({}, {})", nodes[0], nodes[1]),
            "report in ",
        ],
    );
    for (rank, node) in nodes.iter().enumerate() {
        assert!(job.run.log(node, rank as u32, false).exists(), "{node}");
    }
    jobs.assert_nothing_is_left(&job);
}

#[test]
fn a_pre_empted_training_goes_on_as_if_nothing_had_happened() {
    let Some(jobs) = Jobs::new() else { return };
    let cluster = &jobs.cluster;
    let job = jobs.submit("n[1-2]", &JOB);
    jobs.until_step(&job, 3);
    // It must not be done before SLURM has made up its mind.
    job.signal_rank(1, Signal::STOP);
    let go = jobs.scene.path("go");
    let script = format!(
        "#!/bin/bash\nuntil [ -e {} ]; do sleep 0.1; done\n",
        go.display()
    );
    let nodes = [
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--nodelist=n[1-2]",
    ];
    let urgent = cluster.sbatch(&nodes, &script);
    cluster.until("the pre-emption", || {
        job.said()
            .contains("the workers save and end")
            .then_some(())
    });
    job.signal_rank(1, Signal::CONT);
    let queued = cluster.until("the job to be queued again", || {
        Some(cluster.job(job.id)).filter(|j| j.restarts == 1)
    });
    assert!(queued.requeue);
    fs_err::write(&go, "").unwrap();
    // Meanwhile, one that nobody interrupts.
    let whole = jobs.submit("n[3-4]", &JOB);
    cluster.wait(urgent);
    let end = jobs.assert_ended(&job, "COMPLETED", exit::OK);
    assert_eq!(end.restarts, 1);
    job.assert_two_nodes(&end, "succeeded", exit::OK);
    job.assert_trained();

    let first = json(&job.run.path().join("manifest-1.json"));
    assert_eq!(
        (&first["outcome"], &first["exit_code"]),
        (&"stopped".into(), &75.into())
    );
    let starts = events(&job.run.metrics(), "start");
    let starts: Vec<u64> = starts.iter().map(|s| s["step"].as_u64().unwrap()).collect();
    let [0, saved] = starts[..] else {
        panic!("{starts:?}");
    };
    assert!((3..LAST).contains(&saved), "{saved}");
    contains(
        &job.said(),
        &[&format!("saved at step {saved};"), "resumed from "],
    );

    jobs.assert_ended(&whole, "COMPLETED", exit::OK);
    let learned = |job: &Submitted| {
        history(&job.run)
            .steps
            .iter()
            .map(learned)
            .collect::<Vec<_>>()
    };
    assert_eq!(learned(&whole), learned(&job));
    assert_identical(&tensors(&whole.run, LAST), &tensors(&job.run, LAST));
    jobs.assert_nothing_is_left(&job);
}

#[test]
fn a_rank_killed_on_the_second_node_fails_the_job_for_good() {
    let Some(jobs) = Jobs::new() else { return };
    let endless = [&JOB[..], &["train.epochs=10000"]].concat();
    let job = jobs.submit("n[3-4]", &endless);
    jobs.until_step(&job, 2);
    assert_ne!(jobs.steps_of(&job), "");
    kill_rank(&job.run, 1);
    let end = jobs.assert_ended(&job, "FAILED", exit::SIGNAL_BASE + libc::SIGKILL);
    let nodes = job.assert_two_nodes(&end, "failed", 137);
    let failure = json(&job.run.failure());
    assert_eq!(
        (&failure["rank"], &failure["host"], &failure["exit_code"]),
        (&1.into(), &(*nodes[1]).into(), &137.into()),
        "{failure:#}"
    );
    contains(
        &job.said(),
        &[
            "rank 1 failed first",
            "SIGKILL",
            &format!("host {}", nodes[1]),
        ],
    );
    assert!(!job.said().contains("queued again"), "{}", job.said());
    assert_eq!((end.restarts, end.requeue), (0, true));
    assert!(!job.run.summary().exists());
    jobs.assert_nothing_is_left(&job);
}
