//! Jobs that lose nodes and gain others.

use crate::demo::DEMO;
use crate::harness::FAKE;
use crate::job::Job;
use crate::nodes::Cluster;
use rustix::process::Signal;
use serde_json::Value;
use tsm_job::exit;

/// Rank, host and generation of every start of a worker, in order.
fn spawns(job: &Job, generation: u32) -> Vec<(u64, String)> {
    let spawns = job.events("spawn").into_iter();
    let spawns = spawns.filter(|e| e["generation"] == generation);
    let of = |e: Value| {
        (
            e["rank"].as_u64().unwrap(),
            e["host"].as_str().unwrap().to_string(),
        )
    };
    let mut all: Vec<_> = spawns.map(of).collect();
    all.sort();
    all
}

fn on(hosts: &[&str]) -> Vec<(u64, String)> {
    let ranks = hosts.iter().flat_map(|host| [host, host]);
    (0..).zip(ranks.map(|host| host.to_string())).collect()
}

#[test]
fn a_spare_takes_the_place_of_a_lost_node() {
    let Some(cluster) = Cluster::new(3) else {
        return;
    };
    let ready = cluster.scene.path("ready").display().to_string();
    let actions = format!(
        "--meet --when TSM_GENERATION=0 --step 7 --touch {ready}{{rank}} --hang --end --exit 0"
    );
    let mut job = Job::on_all(&cluster, "--nodes 2 --max-restarts 2", &actions);
    job.wait_for_pids("ready", 0..4);
    job.wait_for("spawn", 4);
    job.signal(2, Signal::KILL);
    assert_eq!(job.end(), [0, 137, 0]);
    assert_eq!(spawns(&job, 0), on(&["node-1", "node-2"]));
    assert_eq!(spawns(&job, 1), on(&["node-1", "node-3"]));
    let lost = &job.events("lost")[0];
    assert_eq!(lost["host"], "node-2");
    // The next start comes when no rank of the lost node can run any more.
    let start = &job.events("start")[1];
    let lease = tsm_launch::cluster::message::LEASE.as_secs_f64() * 1e3;
    let between = start["ms"].as_f64().unwrap() - lost["ms"].as_f64().unwrap();
    assert!(between > lease * 0.8, "{between} ms");
    let manifest = job.json("manifest.json");
    assert_eq!(manifest["outcome"], "succeeded");
    let generations = manifest["generations"].as_array().unwrap();
    assert_eq!(generations.len(), 2, "{manifest:#}");
    // What is written there is about the failure that was answered by a restart.
    let failure = job.json("failure.json");
    assert_eq!(failure["host"], "node-2");
    for (n, text) in [
        (2, "joined job run of node-1; its output is there, in "),
        (2, "this is node 1 of 2, with ranks 2-3"),
        (3, "joined job run of node-1 as a spare, until it is needed"),
        (3, "this is node 1 of 2, with ranks 2-3, start 2"),
    ] {
        assert!(job.err(n).contains(text), "{text}");
    }
    for text in [
        "node-3 joined: a spare until it is needed",
        "restarts left: 1",
    ] {
        assert!(job.err(1).contains(text), "{text}");
    }
}

#[test]
fn a_spare_that_is_stopped_leaves_and_the_job_goes_on() {
    let Some(cluster) = Cluster::new(3) else {
        return;
    };
    let go = cluster.scene.path("go");
    let actions = format!("--wait-for {} --exit 0", go.display());
    let mut job = Job::new(&cluster);
    for n in 1..=3 {
        job.start(n, "--nodes 2", &actions);
        job.wait_until_joined(n);
    }
    job.wait_for("spawn", 4);
    job.signal(3, Signal::INT);
    assert_eq!(job.end_of(3), 130);
    job.wait_for("lost", 1);
    fs_err::write(go, "").unwrap();
    assert_eq!(job.end(), [0, 0, 130]);
    let said = job.err(1);
    assert!(
        said.contains("SIGINT on node-3: it leaves, which has no ranks; the job goes on"),
        "{said}"
    );
}

/// No two starts run at once, though nobody can ask the lost node.
#[test]
fn the_next_start_waits_until_the_ranks_of_a_node_that_cannot_be_reached_are_dead() {
    for stopped in [false, true] {
        let Some(cluster) = Cluster::new(3) else {
            return;
        };
        let ready = cluster.scene.path("ready").display().to_string();
        // A zombie does not run.
        let script = format!(
            r#"if [ $TSM_GENERATION = 1 ]; then
                for rank in 2 3; do
                    if grep -q "^State:.[RSDT]" /proc/$(cat {ready}$rank)/status 2>/dev/null; then exit 99; fi
                done
                exit 0
            fi
            exec "$0" --ignore-sigterm --meet --step 1 --touch {ready}$RANK --hang"#
        );
        let mut job = Job::new(&cluster);
        let words = ["--cpus=2", "--nodes=2", "--grace=200ms", "--max-restarts=2"];
        let words = [&words[..], &["--", "sh", "-c", &script, FAKE]].concat();
        for n in 1..=3 {
            job.start_words(n, &words);
            job.wait_until_joined(n);
        }
        job.wait_for_pids("ready", 0..4);
        job.wait_for("spawn", 4);
        match stopped {
            true => job.signal(2, Signal::STOP),
            false => cluster.pull_cable(2),
        }
        assert_eq!(job.end_of(1), 0, "stopped: {stopped}");
        assert_eq!(spawns(&job, 1), on(&["node-1", "node-3"]));
        if stopped {
            job.signal(2, Signal::CONT);
        }
        assert_eq!(job.end(), [0, exit::PEER, 0], "stopped: {stopped}");
    }
}

#[test]
fn an_elastic_job_shrinks_and_grows() {
    let Some(cluster) = Cluster::new(3) else {
        return;
    };
    let at = |name: &str| cluster.scene.path(name).display().to_string();
    let (first, second, save, done) = (at("first"), at("second"), at("save"), at("done"));
    let actions = format!(
        "--exit-on 12 75 --meet \
         --when TSM_GENERATION=0 --step 4 --section checkpoint --section train --step 5 --touch {first}{{rank}} --hang --end \
         --when TSM_GENERATION=1 --step 6 --touch {second}{{rank}} --wait-for {save} --section checkpoint --section train --hang --end \
         --print-env --touch {done}{{rank}} --exit 0"
    );
    let mut job = Job::with_trainer(&cluster, &actions);
    let words = [
        "--cpus=2",
        "--nodes=1:2",
        "--max-restarts=3",
        "--show-ranks=all",
        "--trainer",
        "trainer",
        DEMO,
    ];
    for n in 1..=2 {
        job.start_words(n, &words);
        job.wait_until_joined(n);
    }
    job.wait_for_pids("first", 0..4);
    job.wait_for("spawn", 4);
    job.signal(2, Signal::KILL);
    job.wait_for_pids("second", 0..2);
    assert_eq!(spawns(&job, 1), on(&["node-1"]));
    job.start_words(3, &words);
    job.wait_until_joined(3);
    fs_err::write(&save, "").unwrap();
    assert_eq!(job.end(), [0, 137, 0]);
    assert_eq!(spawns(&job, 0), on(&["node-1", "node-2"]));
    assert_eq!(spawns(&job, 2), on(&["node-1", "node-3"]));
    let err = job.err(1);
    let resume = err
        .lines()
        .find_map(|l| Some(l.split_once("continue with: tsm-launch")?.1));
    let resume = resume.expect("a command that goes on");
    let run = at("run");
    for option in [
        " --cpus 2",
        " --nodes 1:2",
        " --max-restarts 3",
        " --rendezvous 10.77.0.1:29400",
        " --key-file run.key",
        " --trainer trainer",
        &format!(" --resume {run}"),
    ] {
        assert!(resume.contains(option), "{option}: {resume}");
    }
    assert!(err.contains("node-3 is taken in: the workers save and start again"));
    for rank in 0..4 {
        let log = job.read(&format!(
            "logs/node-{}-{rank}.out",
            if rank < 2 { 1 } else { 3 }
        ));
        for line in [
            "TSM_RESTART_COUNT=2".to_string(),
            format!("TSM_RESUME_FROM={}", at("run")),
            "WORLD_SIZE=4".to_string(),
        ] {
            assert!(log.contains(&format!("{line}\n")), "{line} of rank {rank}");
        }
    }
    let outcomes: Vec<Value> = job
        .events("generation_end")
        .into_iter()
        .map(|e| e["outcome"].clone())
        .collect();
    assert_eq!(outcomes, ["failed", "grown", "succeeded"]);
}

#[test]
fn all_nodes_save_when_one_is_to_be_taken_away() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let ready = cluster.scene.path("ready").display().to_string();
    let actions = format!("--exit-on 12 75 --meet --step 3 --touch {ready}{{rank}} --hang");
    let mut job = Job::with_trainer(&cluster, &actions);
    for n in 1..=2 {
        job.start_words(n, &["--cpus=2", "--nodes=2", "--trainer", "trainer", DEMO]);
        job.wait_until_joined(n);
    }
    job.wait_for_pids("ready", 0..4);
    job.signal(2, Signal::USR2);
    assert_eq!(job.end(), [75, 75]);
    assert!(
        job.err(1)
            .contains("SIGUSR2 on node-2: the workers save and end")
    );
    assert!(!job.path("failure.json").exists());
}

#[test]
fn a_job_that_no_longer_has_enough_nodes_ends() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let ready = cluster.scene.path("ready").display().to_string();
    let actions = format!("--meet --step 1 --touch {ready}{{rank}} --hang");
    let options = "--nodes 2 --max-restarts 2 --join-timeout 1s";
    let mut job = Job::on_all(&cluster, options, &actions);
    job.wait_for_pids("ready", 0..4);
    job.wait_for("spawn", 4);
    job.signal(2, Signal::KILL);
    let codes = job.end();
    assert_eq!(codes[1], 137);
    assert_eq!(codes[0], exit::PREFLIGHT);
    for text in [
        "waiting up to 1s for 1 node to join",
        "1 node (node-1) is left, 2 are needed",
    ] {
        assert!(job.err(1).contains(text), "{text}");
    }
}
