//! What SLURM says, and what it does to which process.

use std::ffi::OsString;
use std::time::SystemTime;
use tsm_launch::plan::shell;
use tsm_launch::start::slurm::nodelist::{compress, expand};
use tsm_launch::start::slurm::{Allocation, Place, StopCause, srun};

use crate::cluster;
use crate::cluster::Cluster;

#[test]
fn four_nodes_answer() {
    let Some(cluster) = cluster() else { return };
    let mut names: Vec<_> = cluster
        .output("srun", &["-N4", "printenv", "SLURMD_NODENAME"])
        .lines()
        .map(String::from)
        .collect();
    names.sort();
    assert_eq!(names, ["n1", "n2", "n3", "n4"]);
}

#[test]
fn node_lists_are_read_as_scontrol_reads_them() {
    let Some(cluster) = cluster() else { return };
    let lists = [
        "gpu[001-003,7],login1",
        "rack[1-2]n[01-10]",
        "n[9-11]",
        "n[099-101]",
        "n[08-010]",
        "n[003-5]",
        "[1-2]",
        "n[01,1]",
        "a,b,a",
        "n1[2-3]x[09-11]",
        "x[18446744073709551615]",
    ];
    for list in lists {
        let theirs = cluster.output("scontrol", &["show", "hostnames", list]);
        assert_eq!(
            expand(list).unwrap(),
            theirs.lines().collect::<Vec<_>>(),
            "{list}"
        );
        // And SLURM reads what we write.
        let ours = compress(&expand(list).unwrap());
        assert_eq!(
            cluster.output("scontrol", &["show", "hostnames", &ours]),
            theirs,
            "{list} as {ours}"
        );
    }
    for list in [
        "n[2-1]",
        "n[]",
        "n[a]",
        "n[1-2-3]",
        "n[1,]",
        "n[0-99999999999]",
    ] {
        let refused = cluster
            .command("scontrol")
            .args(["show", "hostnames", list])
            .output()
            .unwrap();
        assert!(refused.stdout.is_empty() && expand(list).is_err(), "{list}");
    }
}

/// The allocation that the printed environment `text` describes.
fn allocation(text: &str) -> Allocation {
    let value = |name: &str| {
        let line = text
            .lines()
            .find(|line| line.split_once('=').is_some_and(|(n, _)| n == name));
        line.and_then(|line| line.split_once('='))
            .map(|(_, value)| value.to_string())
    };
    Allocation::from_env(value).unwrap().expect("a job")
}

#[test]
fn an_allocation_is_read_in_a_batch_shell_a_step_and_a_shell() {
    let Some(cluster) = cluster() else { return };
    let script = "#!/bin/bash\nenv > batch.env\nsrun sh -c 'env > step.env.$SLURM_NODEID'\n";
    let options = [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=2",
        "--gpus-per-node=3",
    ];
    let job = cluster.sbatch(&options, script);
    let done = cluster.wait(job);
    assert_eq!(
        (done.state.as_str(), done.exit),
        ("COMPLETED", (0, 0)),
        "{}",
        cluster.job_output(job)
    );
    let read = |name: &str| allocation(&fs_err::read_to_string(cluster.path().join(name)).unwrap());
    let batch = read("batch.env");
    assert_eq!(batch.place, Place::Batch);
    assert_eq!((batch.job, batch.nodes.len()), (job, 2));
    assert_eq!(
        (
            batch.gpus_per_node,
            batch.cpus.as_slice(),
            batch.restart_count
        ),
        (Some(3), [2, 2].as_slice(), 0)
    );
    for node in 0..2 {
        let step = read(&format!("step.env.{node}"));
        assert_eq!(step.place, Place::Step { id: 0, node });
        assert_eq!(
            (step.nodes, step.gpus_per_node),
            (batch.nodes.clone(), Some(3))
        );
    }
    let by_hand = cluster.output("salloc", &["--nodes=2", "--gpus-per-node=1", "env"]);
    let by_hand = allocation(&by_hand);
    assert_eq!(
        (by_hand.place, by_hand.nodes.len(), by_hand.gpus_per_node),
        (Place::Shell, 2, Some(1))
    );
    let many = cluster.output(
        "srun",
        &[
            "-N1",
            "--ntasks-per-node=2",
            "sh",
            "-c",
            "[ $SLURM_PROCID = 1 ] || env",
        ],
    );
    let error = Allocation::from_env(|name| {
        let line = many
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.map(String::from)
    });
    assert!(error.unwrap_err().message.contains("2 times on a node"));
}

#[test]
fn an_agent_is_started_on_each_node_with_all_of_it_and_with_the_key() {
    let Some(cluster) = cluster() else { return };
    // The script of somebody who thinks of one task per GPU.
    let options = [
        "--nodes=2",
        "--ntasks-per-node=4",
        "--cpus-per-task=1",
        "--gpus-per-task=2",
        "--gpu-bind=single:1",
        "--export=ALL,SLURM_HINT=nomultithread",
    ];
    let env = cluster.sbatch(&options, "#!/bin/bash\nenv\n");
    cluster.wait(env);
    let mut job = allocation(&cluster.job_output(env));
    job.nodes = vec!["n2".into(), "n3".into()];
    let say = "read key; echo agent $SLURM_NODEID $SLURMD_NODENAME $key gpus=$CUDA_VISIBLE_DEVICES cpus=$SLURM_CPUS_ON_NODE";
    let agent: Vec<OsString> = vec!["sh".into(), "-c".into(), say.into()];
    let srun = srun(&job, &job.nodes, None, &agent);
    let script = format!(
        "#!/bin/bash\nunset {}\necho secret | {}\n",
        srun.env_remove.join(" "),
        shell(&srun.argv)
    );
    let mut options = options.to_vec();
    options.push("--nodelist=n[2-3]");
    let started = cluster.sbatch(&options, &script);
    let done = cluster.wait(started);
    let said = cluster.job_output(started);
    assert_eq!(done.exit, (0, 0), "{said}");
    let mut agents: Vec<_> = said
        .lines()
        .filter(|line| line.starts_with("agent"))
        .collect();
    agents.sort();
    assert_eq!(
        agents,
        [
            "agent 0 n2 secret gpus=0,1,2,3,4,5,6,7 cpus=4",
            "agent 1 n3 secret gpus=0,1,2,3,4,5,6,7 cpus=4"
        ],
        "{said}"
    );
}

/// A script whose shell and whose two tasks write down every signal, and go on.
const WITNESSES: &str = r#"#!/bin/bash
witness() { for s in USR2 TERM; do trap "echo $s >> $1" $s; done; : > $1; while :; do sleep 0.05 & wait $!; done; }
if [ -n "$TASK" ]; then witness $SLURM_JOB_ID.task$SLURM_NODEID; fi
echo "start ${SLURM_RESTART_COUNT:-0}"
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
TASK=1 srun --ntasks-per-node=1 bash $(realpath "$0") & witness $SLURM_JOB_ID.batch
"#;

impl Cluster {
    fn witnesses(&self, options: &[&str]) -> tsm_launch::start::slurm::JobId {
        let mut all = vec!["--nodes=2", "--ntasks-per-node=1"];
        all.extend(options);
        let job = self.sbatch(&all, WITNESSES);
        for name in ["batch", "task0", "task1"] {
            self.until("the witnesses", || {
                self.path()
                    .join(format!("{job}.{name}"))
                    .exists()
                    .then_some(())
            });
        }
        job
    }

    fn saw(&self, job: tsm_launch::start::slurm::JobId, name: &str) -> String {
        fs_err::read_to_string(self.path().join(format!("{job}.{name}"))).unwrap()
    }
}

#[test]
fn a_signal_to_the_batch_shell_reaches_it_alone() {
    let Some(cluster) = cluster() else { return };
    let job = cluster.witnesses(&[]);
    cluster.output("scancel", &["--batch", "--signal=USR2", &job.to_string()]);
    cluster.until("the signal", || {
        (cluster.saw(job, "batch") == "USR2\n").then_some(())
    });
    cluster.output("scancel", &["--signal=USR2", &job.to_string()]);
    for task in ["task0", "task1"] {
        cluster.until("the signal", || {
            (cluster.saw(job, task) == "USR2\n").then_some(())
        });
    }
    assert_eq!(
        cluster.saw(job, "batch"),
        "USR2\n",
        "a signal to the steps is none to the batch shell"
    );
    cluster.output("scancel", &[&job.to_string()]);
    cluster.until("SIGTERM", || {
        ["batch", "task0", "task1"]
            .iter()
            .all(|name| cluster.saw(job, name).contains("TERM"))
            .then_some(())
    });
    let state = cluster.job(job);
    assert_eq!(state.stop_cause(0), StopCause::Cancelled, "{state:?}");
    assert_eq!(cluster.wait(job).state, "CANCELLED");
}

#[test]
fn a_preempted_job_is_told_by_its_tasks_and_queued_again_by_us() {
    // A cluster of its own: every node is needed, and nothing else may be pre-empted.
    let Some(_here) = cluster() else { return };
    let cluster = Cluster::start().expect("a second cluster beside the first");
    let job = cluster.witnesses(&["--exclusive", "--nodes=4"]);
    let urgent = cluster.sbatch(
        &["--partition=high", "--nodes=4", "--exclusive"],
        "#!/bin/bash\nsleep 1\n",
    );
    cluster.until("SIGTERM", || {
        (cluster.saw(job, "task0") == "TERM\n").then_some(())
    });
    let state = cluster.job(job);
    assert!(
        matches!(state.stop_cause(0), StopCause::Preempted { until: Some(until) } if until > SystemTime::now()),
        "{state:?}"
    );
    assert!(state.requeue, "{state:?}");
    assert_eq!(
        cluster.saw(job, "batch"),
        "",
        "the batch shell is told nothing"
    );
    // Everything is saved; now the nodes are given up.
    cluster.slurm().requeue(job).unwrap();
    assert_eq!(cluster.job(job).stop_cause(0), StopCause::Requeued);
    assert_eq!(cluster.wait(urgent).exit, (0, 0));
    let done = cluster.wait(job);
    assert_eq!((done.state.as_str(), done.restarts), ("COMPLETED", 1));
    assert!(cluster.job_output(job).contains("start 1"));
}
