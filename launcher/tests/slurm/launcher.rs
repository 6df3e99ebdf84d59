//! The launcher in jobs of SLURM: two nodes, a rank that fails, pre-emption with requeue and resume, the
//! time limit, and nothing that is left behind.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tsm_job::config::duration::format as seconds;

use crate::cluster;
use crate::cluster::Cluster;
use crate::demo::{DEMO, write_lists};
use crate::program::write_program;

const LAUNCH: &str = env!("CARGO_BIN_EXE_tsm-launch");

/// A worker that counts to the number in the file `goal`, 20 steps a second, goes on where it was, and saves on
/// SIGUSR2: all that the launcher needs to know of a trainer.
const TRAINER: &str = r#"#!/bin/bash
steps="$TSM_RUN_DIR/steps-$RANK"
n=$(cat "$steps" 2>/dev/null || echo 0)
echo "rank $RANK of $WORLD_SIZE on $SLURMD_NODENAME from step $n, resume ${TSM_RESUME_FROM:-none}, start ${TSM_START_FROM:-none}" >> "$TSM_RUN_DIR/starts"
trap 'echo $n > "$steps"; exit 75' USR2
while [ "$n" -lt "$(cat goal)" ]; do
  n=$((n + 1))
  echo "{\"kind\":\"step\",\"step\":$n,\"epoch\":0}" >&"$TSM_AGENT_FD"
  touch "$TSM_RUN_DIR/going-$RANK"
  sleep 0.05
done
echo $n > "$steps"
"#;

/// Four nodes share the cores of this machine: none is lost because it had to wait for them.
const NODE_TIMEOUT: Duration = Duration::from_secs(5);

/// A folder of its own on the cluster, with a stand-in for the trainer and the demo's lists.
struct Scene {
    cluster: Arc<Cluster>,
    dir: PathBuf,
}

impl Scene {
    fn new(name: &str) -> Option<Scene> {
        let cluster = cluster()?;
        let dir = cluster.path().join(name);
        write_lists(&dir);
        write_program(&dir.join("trainer"), TRAINER);
        Some(Scene { cluster, dir })
    }

    /// Submits a script of two nodes that execs the launcher with these words, as `tsm-launch slurm` writes it.
    fn submit(&self, options: &[&str], words: &str) -> crate::JobId {
        let script = format!(
            "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=1\n\
             #SBATCH --requeue\n#SBATCH --open-mode=append\ncd {}\nexec {LAUNCH} --node-timeout {} {words}\n",
            self.dir.display(),
            seconds(NODE_TIMEOUT)
        );
        self.cluster.sbatch(options, &script)
    }

    fn read(&self, name: &str) -> String {
        fs_err::read_to_string(self.dir.join(name)).unwrap_or_default()
    }

    /// Waits until each of two ranks has made its file `<name>-<rank>` in `folder`.
    fn until_both_have(&self, folder: &Path, name: &str) {
        for path in [0, 1].map(|rank| folder.join(format!("{name}-{rank}"))) {
            let what = path.display().to_string();
            self.cluster.until(&what, || path.exists().then_some(()));
        }
    }

    /// Waits for the end of a job, which is `state` after so many restarts; what it said.
    fn wait(&self, job: crate::JobId, state: &str, restarts: u32) -> String {
        let end = self.cluster.wait(job);
        let said = self.cluster.job_output(job);
        assert_eq!(
            (end.state.as_str(), end.restarts),
            (state, restarts),
            "{said}"
        );
        said
    }

    /// SIGUSR2 to the launcher of this job.
    fn ask_to_save(&self, job: crate::JobId) {
        let id = job.to_string();
        let words = ["--batch", "--signal=USR2", &id];
        self.cluster.output("scancel", &words);
    }

    /// Has both ranks save, and the turn after that be the last.
    fn save_and_go_on(&self, job: crate::JobId, run: &Path) {
        self.ask_to_save(job);
        self.until_both_have(run, "steps");
        fs_err::write(self.dir.join("goal"), "0").unwrap();
    }

    /// No process that was started in this folder lives.
    fn assert_nothing_is_left(&self) {
        let here = |pid: &str| {
            let cwd = fs_err::read_link(format!("/proc/{pid}/cwd")).ok()?;
            let words = fs_err::read(format!("/proc/{pid}/cmdline")).ok()?;
            let words = String::from_utf8_lossy(&words).replace('\0', " ");
            (cwd.starts_with(&self.dir) && !words.is_empty()).then_some(words)
        };
        self.cluster.until("the end of all processes", || {
            let all = fs_err::read_dir("/proc").unwrap().flatten();
            let left: Vec<_> = all.filter_map(|e| here(e.file_name().to_str()?)).collect();
            left.is_empty().then_some(())
        });
    }
}

#[test]
fn a_job_of_two_nodes_finds_everything_by_itself() {
    let Some(scene) = Scene::new("two") else {
        return;
    };
    let job = scene.submit(
        &[],
        r#"--cpus 2 --run-dir run -- sh -c 'echo rank $RANK of $WORLD_SIZE node $NODE_RANK on $SLURMD_NODENAME'"#,
    );
    let end = scene.cluster.wait(job);
    let said = scene.cluster.job_output(job);
    assert_eq!(
        (end.state.as_str(), end.exit),
        ("COMPLETED", (0, 0)),
        "{said}"
    );
    let nodes: Vec<String> = tsm_launch::start::slurm::nodelist::expand(&end.nodes).unwrap();
    for rank in 0..4 {
        let line = format!("rank {rank} of 4 node {} on {}", rank / 2, nodes[rank / 2]);
        assert!(said.contains(&line), "{line}\n{said}");
        let log = scene.read(&format!("run/logs/{}-{rank}.out", nodes[rank / 2]));
        assert_eq!(log.trim(), line);
    }
    let manifest: serde_json::Value =
        serde_json::from_str(&scene.read("run/manifest.json")).unwrap();
    assert_eq!(
        (&manifest["outcome"], &manifest["world_size"]),
        (&"succeeded".into(), &4.into())
    );
    let slurm = scene.cluster.output("scontrol", &["--version"]);
    let version = slurm.split_whitespace().last();
    assert_eq!(manifest["versions"]["slurm"].as_str(), version, "{slurm}");
    scene.assert_nothing_is_left();
}

#[test]
fn a_rank_that_fails_on_the_other_node_ends_the_job_with_its_code() {
    let Some(scene) = Scene::new("fails") else {
        return;
    };
    let job = scene.submit(
        &[],
        r#"--cpus 2 --run-dir run -- sh -c 'if [ $RANK = 3 ]; then echo "the disk is on fire" >&2; exit 17; fi; exec sleep 300'"#,
    );
    let end = scene.cluster.wait(job);
    let said = scene.cluster.job_output(job);
    assert_eq!((end.state.as_str(), end.exit.0), ("FAILED", 17), "{said}");
    let node = tsm_launch::start::slurm::nodelist::expand(&end.nodes)
        .unwrap()
        .remove(1);
    for part in [
        "rank 3 failed first: exit code 17".to_string(),
        format!("host {node}"),
        "the disk is on fire".into(),
    ] {
        assert!(said.contains(&part), "{part}\n{said}");
    }
    assert!(!said.contains("queued again, and goes on"), "{said}");
    scene.assert_nothing_is_left();
}

/// The folder of the run of `job`, below `runs`.
fn run_of(scene: &Scene, job: crate::JobId) -> PathBuf {
    scene.dir.join(format!("runs/demo-slurm-{job}"))
}

#[test]
fn a_training_that_failed_goes_on_by_the_command_of_its_hint() {
    let Some(scene) = Scene::new("mended") else {
        return;
    };
    let fails = TRAINER.replacen('\n', "\n[ -e mended ] || exit 17\n", 1);
    write_program(&scene.dir.join("trainer"), &fails);
    fs_err::write(scene.dir.join("goal"), "0").unwrap();
    let job = scene.submit(&[], &format!("--trainer trainer --cpus 1 {DEMO}"));
    let said = scene.wait(job, "FAILED", 0);
    let hint = format!("hint: once the cause is gone, continue with: scontrol requeue {job}\n");
    assert!(said.contains(&hint), "{said}");
    fs_err::write(scene.dir.join("mended"), "").unwrap();
    scene.cluster.until("the job to be queued again", || {
        scene.cluster.slurm().requeue(job).is_ok().then_some(())
    });
    scene.cluster.until("its next turn", || {
        Some(scene.cluster.job(job)).filter(|j| j.restarts == 1)
    });
    scene.wait(job, "COMPLETED", 1);
    let run = run_of(&scene, job);
    let starts = fs_err::read_to_string(run.join("starts")).unwrap();
    let resumed = format!("resume {},", run.display());
    assert_eq!(starts.matches(&resumed).count(), 2, "{starts}");
    scene.assert_nothing_is_left();
}

#[test]
fn a_pre_empted_job_saves_is_queued_again_and_goes_on() {
    let Some(scene) = Scene::new("preempted") else {
        return;
    };
    fs_err::write(scene.dir.join("goal"), "100000").unwrap();
    let nodes = "--nodelist=n[1-2]";
    let job = scene.submit(
        &["--partition=low", nodes],
        &format!("--trainer trainer --cpus 1 {DEMO}"),
    );
    let run = run_of(&scene, job);
    scene.until_both_have(&run, "going");
    let script = "#!/bin/bash\nuntil [ -e ".to_string()
        + &scene.dir.join("go").display().to_string()
        + " ]; do sleep 0.1; done\n";
    let urgent = scene.cluster.sbatch(
        &["--partition=high", "--nodes=2", "--exclusive", nodes],
        &script,
    );
    // It has saved, and waits for its next turn.
    scene.until_both_have(&run, "steps");
    let again = scene.cluster.until("the job to be queued again", || {
        Some(scene.cluster.job(job)).filter(|j| j.restarts == 1)
    });
    assert!(again.requeue);
    // The next turn is the last.
    fs_err::write(scene.dir.join("goal"), "0").unwrap();
    fs_err::write(scene.dir.join("go"), "").unwrap();
    scene.cluster.wait(urgent);
    let end = scene.cluster.wait(job);
    let said = scene.cluster.job_output(job);
    assert_eq!(
        (end.state.as_str(), end.exit),
        ("COMPLETED", (0, 0)),
        "{said}"
    );
    let starts = fs_err::read_to_string(run.join("starts")).unwrap();
    assert_eq!(starts.lines().count(), 4, "{starts}");
    let resumed = starts
        .lines()
        .filter(|l| l.contains(&format!("resume {}", run.display())));
    let resumed: Vec<_> = resumed.collect();
    assert_eq!(
        resumed.len(),
        2,
        "the second turn continues the run folder\n{starts}"
    );
    assert!(
        resumed.iter().all(|line| !line.contains("from step 0,")),
        "{starts}"
    );
    assert!(said.contains("the workers save and end"), "{said}");
    let first: serde_json::Value =
        serde_json::from_str(&fs_err::read_to_string(run.join("manifest-1.json")).unwrap())
            .unwrap();
    assert_eq!(first["exit_code"], 75, "{said}");
    scene.assert_nothing_is_left();
}

/// What SLURM suspends has given its coordinator up when it goes on, and its other nodes have no agent any more.
#[test]
fn a_job_that_was_suspended_is_queued_again() {
    let Some(scene) = Scene::new("suspended") else {
        return;
    };
    fs_err::write(scene.dir.join("goal"), "100000").unwrap();
    let words = format!("--trainer trainer --cpus 1 {DEMO}");
    let job = scene.submit(&["--nodelist=n[3-4]"], &words);
    let run = run_of(&scene, job);
    scene.until_both_have(&run, "going");
    let id = job.to_string();
    scene.cluster.output("scontrol", &["suspend", &id]);
    // Longer than the lease: that is what is tested.
    std::thread::sleep(NODE_TIMEOUT + Duration::from_secs(1));
    scene.cluster.output("scontrol", &["resume", &id]);
    scene.cluster.until("the end of the turn", || {
        let job = scene.cluster.job(job);
        (job.restarts == 1 || job.state == "FAILED").then_some(())
    });
    fs_err::write(scene.dir.join("goal"), "0").unwrap();
    let said = scene.wait(job, "COMPLETED", 1);
    for part in [
        "the job did not run for ",
        &format!("job {job} is queued again, and goes on from here"),
    ] {
        assert!(said.contains(part), "{part}\n{said}");
    }
    assert!(!run.join("failure.json").exists(), "nobody failed\n{said}");
    let starts = fs_err::read_to_string(run.join("starts")).unwrap();
    let resumed = format!("resume {}, ", run.display());
    assert_eq!(starts.matches(&resumed).count(), 2, "{starts}");
    scene.assert_nothing_is_left();
}

/// The first turn of a run was told its folder, or a checkpoint to begin from: those after it go on with the run, as it
/// was begun, also when somebody edits the config meanwhile.
#[test]
fn a_turn_goes_on_with_the_run_of_the_first_wherever_that_is_and_began() {
    let Some(scene) = Scene::new("turns") else {
        return;
    };
    fs_err::write(scene.dir.join("old.safetensors"), "").unwrap();
    let old = scene.dir.join("old.safetensors").display().to_string();
    let config = fs_err::read_to_string(DEMO).unwrap();
    for (words, from) in [
        ("--run-dir own", "none"),
        ("--resume old.safetensors", &old),
    ] {
        fs_err::write(scene.dir.join("goal"), "100000").unwrap();
        fs_err::write(scene.dir.join("my.yaml"), &config).unwrap();
        let words = format!("{words} --trainer trainer --cpus 1 my.yaml");
        let job = scene.submit(&["--nodelist=n[3-4]"], &words);
        let run = match words.contains("--run-dir") {
            true => scene.dir.join("own"),
            false => run_of(&scene, job),
        };
        scene.until_both_have(&run, "going");
        let edited = config.replacen("momentum: 0.9", "momentum: 0.5", 1);
        assert_ne!(edited, config);
        fs_err::write(scene.dir.join("my.yaml"), edited).unwrap();
        scene.save_and_go_on(job, &run);
        let said = scene.wait(job, "COMPLETED", 1);
        let starts = fs_err::read_to_string(run.join("starts")).unwrap();
        let (first, then) = (
            format!("resume {from}, start none"),
            format!("resume {}, start {from}", run.display()),
        );
        for how in [first, then] {
            let these = starts.lines().filter(|line| line.ends_with(&how));
            assert_eq!(these.count(), 2, "{how}\n{starts}");
        }
        let warning = format!("warning: my.yaml is not what the run in {}", run.display());
        assert_eq!(said.matches(&warning).count(), 1, "{said}");
        assert!(!run.join("config-2.yaml").exists(), "{said}");
    }
    scene.assert_nothing_is_left();
}

#[test]
fn of_two_launches_in_a_job_each_finds_its_own_run_again() {
    let Some(scene) = Scene::new("stages") else {
        return;
    };
    fs_err::write(scene.dir.join("goal"), "100000").unwrap();
    // Both are called after their program, which is bash.
    let script = format!(
        "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=1\n\
         #SBATCH --requeue\n#SBATCH --open-mode=append\ncd {}\n\
         {LAUNCH} --cpus 1 -- bash -c 'echo one >> one-$RANK'\nexec {LAUNCH} --cpus 1 -- bash trainer\n",
        scene.dir.display()
    );
    let job = scene.cluster.sbatch(&["--nodelist=n[3-4]"], &script);
    let run = scene.dir.join(format!("runs/bash-slurm-{job}-2"));
    scene.until_both_have(&run, "going");
    scene.save_and_go_on(job, &run);
    let said = scene.wait(job, "COMPLETED", 1);
    let finished = format!(
        "has finished in {}/runs/bash-slurm-{job} ",
        scene.dir.display()
    );
    assert_eq!(said.matches(&finished).count(), 1, "{said}");
    assert_eq!(scene.read("one-0") + &scene.read("one-1"), "one\none\n");
    let starts = fs_err::read_to_string(run.join("starts")).unwrap();
    let resumed = format!("resume {}, ", run.display());
    let resumed = starts.lines().filter(|line| line.contains(&resumed));
    assert_eq!(
        (resumed.count(), starts.lines().count()),
        (2, 4),
        "{starts}"
    );
    scene.assert_nothing_is_left();
}

/// To the launcher it is any program.
#[test]
fn a_program_that_saves_on_sigusr2_is_queued_again_and_one_without_a_handler_is_not() {
    let Some(scene) = Scene::new("program") else {
        return;
    };
    fs_err::write(scene.dir.join("goal"), "100000").unwrap();
    let nodes = ["--nodelist=n[3-4]"];
    let job = scene.submit(&nodes, "--cpus 1 --max-restarts 2 -- ./trainer");
    let run = scene.dir.join(format!("runs/trainer-slurm-{job}"));
    scene.until_both_have(&run, "going");
    scene.save_and_go_on(job, &run);
    let said = scene.wait(job, "COMPLETED", 1);
    assert!(
        said.contains(&format!("job {job} is queued again")),
        "{said}"
    );

    let going = scene.dir.join("going");
    let script = format!("touch {}-$RANK; exec sleep 300", going.display());
    let words = format!("--cpus 1 --max-restarts 2 -- sh -c '{script}'");
    let job = scene.submit(&nodes, &words);
    scene.until_both_have(&scene.dir, "going");
    scene.ask_to_save(job);
    let end = scene.cluster.wait(job);
    let said = scene.cluster.job_output(job);
    assert_eq!(
        (end.state.as_str(), end.exit.0, end.restarts),
        ("FAILED", 140, 0),
        "{said}"
    );
    assert!(said.contains("SIGUSR2 was passed on and ended"), "{said}");
    scene.assert_nothing_is_left();
}

/// SLURM signals ranks and agents alike; a rank hears it once, however many agents tell of it.
#[test]
fn a_signal_to_the_step_reaches_each_rank_once() {
    let Some(scene) = Scene::new("once") else {
        return;
    };
    let heard = |rank: u32| scene.dir.join(format!("heard-{rank}"));
    let script = r#"#!/bin/bash
trap 'echo USR1 >> heard-$RANK' USR1
trap 'echo USR2 >> heard-$RANK; exit 0' USR2
: > heard-$RANK
while :; do sleep 0.05 & wait $!; done
"#;
    fs_err::write(scene.dir.join("witness"), script).unwrap();
    let job = scene.submit(
        &["--nodelist=n[3-4]"],
        "--cpus 1 --run-dir run -- bash witness",
    );
    let id = job.to_string();
    scene.until_both_have(&scene.dir, "heard");
    let scancel = |words: &[&str]| {
        scene.cluster.output("scancel", &[words, &[&id]].concat());
    };
    scancel(&["--signal=USR1"]);
    scene.cluster.until("word of both agents", || {
        let events = scene.read("run/events.jsonl");
        (events.matches(r#""signal":"SIGUSR1""#).count() == 2).then_some(())
    });
    for rank in 0..2 {
        scene.cluster.until("the signal", || {
            (fs_err::read_to_string(heard(rank)).unwrap() != "").then_some(())
        });
    }
    // Whatever was passed on before comes before this.
    scancel(&["--batch", "--signal=USR2"]);
    scene.wait(job, "COMPLETED", 0);
    for rank in 0..2 {
        let all = fs_err::read_to_string(heard(rank)).unwrap();
        assert_eq!(all, "USR1\nUSR2\n", "rank {rank}");
    }
    scene.assert_nothing_is_left();
}

#[test]
fn a_job_that_does_not_find_its_run_again_says_so() {
    let Some(scene) = Scene::new("forgotten") else {
        return;
    };
    fs_err::write(scene.dir.join("goal"), "100000").unwrap();
    let job = scene.submit(&[], &format!("--trainer trainer --cpus 1 {DEMO}"));
    let run = run_of(&scene, job);
    scene.until_both_have(&run, "going");
    let id = job.to_string();
    scene.cluster.output("scontrol", &["requeuehold", &id]);
    scene.cluster.until("the end of the first turn", || {
        let waits = scene.cluster.job(job).state == "PENDING";
        (waits && run.join("steps-1").exists()).then_some(())
    });
    // Its first node is another one now, which has seen no more of it than its config.
    let config = fs_err::read(run.join("config.yaml")).unwrap();
    fs_err::remove_dir_all(&run).unwrap();
    fs_err::create_dir(&run).unwrap();
    fs_err::write(run.join("config.yaml"), config).unwrap();
    fs_err::write(scene.dir.join("goal"), "0").unwrap();
    scene.cluster.output("scontrol", &["release", &id]);
    let said = scene.wait(job, "COMPLETED", 1);
    let warning = format!(
        "warning: job {job} was queued again, but {} holds no run on this node: it starts anew",
        run.display()
    );
    assert!(said.contains(&warning), "{said}");
    // And the turn after this one would find it.
    assert!(run.join("manifest.json").exists());
    scene.assert_nothing_is_left();
}

#[test]
fn a_job_saves_before_its_time_limit_and_a_finished_one_is_not_run_again() {
    let Some(scene) = Scene::new("limit") else {
        return;
    };
    fs_err::write(scene.dir.join("goal"), "100000").unwrap();
    // SLURM signals up to 60 s early, so at once where the limit is a minute.
    let job = scene.submit(
        &["--time=1", "--signal=B:USR2@50", "--nodelist=n[3-4]"],
        &format!("--trainer trainer --cpus 1 {DEMO}"),
    );
    let run = run_of(&scene, job);
    scene.until_both_have(&run, "steps");
    fs_err::write(scene.dir.join("goal"), "0").unwrap();
    let said = scene.wait(job, "COMPLETED", 1);
    assert!(
        said.contains(&format!("job {job} is queued again")),
        "{said}"
    );

    // Somebody queues the finished job again: nothing is trained.
    let before = fs_err::read_to_string(run.join("starts")).unwrap();
    scene.cluster.until("the job to be queued again", || {
        scene.cluster.slurm().requeue(job).is_ok().then_some(())
    });
    scene.cluster.until("its next turn", || {
        Some(scene.cluster.job(job)).filter(|j| j.restarts == 2)
    });
    let end = scene.cluster.wait(job);
    assert_eq!(end.exit, (0, 0));
    let said = scene.cluster.job_output(job);
    assert!(said.contains("has finished in"), "{said}");
    assert_eq!(fs_err::read_to_string(run.join("starts")).unwrap(), before);
    scene.assert_nothing_is_left();
}
