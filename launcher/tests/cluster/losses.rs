//! Launchers that die or stop, and cables that are pulled: no rank outlives its lease.

use crate::ground::Ground;
use crate::harness::{alive, until};
use crate::job::Job;
use crate::nodes::Cluster;
use rustix::process::Signal;
use std::time::{Duration, Instant};
use tsm_job::config::duration;
use tsm_job::exit;
use tsm_launch::cluster::message::LEASE;
use tsm_launch::contain::Kind;

/// A lost node is noticed within the lease; this is far more than that, for a busy machine, and far less than TCP waits.
const SOON: Duration = Duration::from_secs(60);

/// Two nodes of two ranks that have met and hang; the pids by rank, and those of the daemons that they have started.
/// Their children must not survive either.
fn hanging<'a>(cluster: &'a Cluster, options: &str) -> (Job<'a>, Vec<i32>) {
    hanging_on(cluster, options, None)
}

fn hanging_on<'a>(
    cluster: &'a Cluster,
    options: &str,
    ground: Option<Ground>,
) -> (Job<'a>, Vec<i32>) {
    let path = |name| cluster.scene.path(name).display().to_string();
    let (ready, daemon) = (path("ready"), path("daemon"));
    let actions = format!(
        "--meet --ignore-sigterm --fork --daemon {daemon}{{rank}} --touch {ready}{{rank}} --hang"
    );
    let lease = duration::format(LEASE);
    let options = format!("--nodes 2 --grace 500ms --node-timeout {lease} {options}");
    let mut job = Job::new(cluster);
    job.ground = ground;
    job.start_all(&options, &actions);
    let ranks = job.wait_for_pids("ready", 0..4);
    let daemons = job.wait_for_pids("daemon", 0..4);
    job.wait_for("spawn", 4);
    // Those of one node are next to each other.
    let of = |node: usize| [&ranks[2 * node..][..2], &daemons[2 * node..][..2]].concat();
    (job, [of(0), of(1)].concat())
}

fn wait_for_death(pids: &[i32]) -> Duration {
    let start = Instant::now();
    until("ranks to die", || {
        pids.iter().all(|&pid| !alive(pid)).then_some(())
    });
    start.elapsed()
}

/// What is said of node 2 when it was lost.
fn assert_node_2_is_named(job: &Job, how: &str) {
    let failure = job.json("failure.json");
    assert_eq!(failure["rank"], serde_json::Value::Null, "{failure:#}");
    assert_eq!(failure["host"], "node-2", "{failure:#}");
    assert_eq!(failure["class"], "node_lost", "{failure:#}");
    assert_eq!(failure["exit_code"], exit::PEER);
    let others = failure["others"].as_array().unwrap().iter();
    let roles: Vec<_> = others.map(|o| o["role"].clone()).collect();
    assert_eq!(
        roles,
        ["stopped", "stopped", "node_lost", "node_lost"],
        "{failure:#}"
    );
    let err = job.err(1);
    assert!(err.contains("node node-2 was lost first"));
    assert!(err.contains("where: host node-2, ranks 2-3"));
    assert!(err.contains(how), "{how}");
    let lost = job.events("lost");
    assert_eq!(lost.len(), 1);
    assert_eq!(lost[0]["host"], "node-2");
    assert_eq!(job.json("manifest.json")["outcome"], "failed");
}

fn assert_gave_the_coordinator_up(job: &Job) {
    let (err, lease) = (job.err(2), duration::format(LEASE));
    let said = format!("no answer from the coordinator for {lease}");
    assert!(err.contains(&said), "{err}");
}

#[test]
fn a_killed_agent_takes_its_ranks_with_it_and_is_named() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let (mut job, pids) = hanging(&cluster, "");
    job.signal(2, Signal::KILL);
    assert_eq!(job.end_of(2), 137);
    cluster.node(2).assert_empty();
    wait_for_death(&pids);
    assert_eq!(job.end(), [exit::PEER, 137]);
    // Broken off or reset: that depends on what it had not read.
    assert_node_2_is_named(&job, "node-2 was lost first: its agent at 10.77.0.2:");
}

#[test]
fn a_killed_agent_leaves_no_daemon_where_it_may_make_no_control_group() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let ground = Ground::new(Kind::Environment);
    let (mut job, pids) = hanging_on(&cluster, "", ground);
    for spawn in job.events("spawn") {
        assert_eq!(spawn["containment"], "environment");
    }
    job.signal(2, Signal::KILL);
    assert_eq!(job.end_of(2), 137);
    cluster.node(2).assert_empty();
    wait_for_death(&pids);
    assert_eq!(job.end(), [exit::PEER, 137]);
}

#[test]
fn a_killed_coordinator_leaves_no_rank_anywhere() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let (mut job, pids) = hanging(&cluster, "");
    job.signal(1, Signal::KILL);
    assert!(wait_for_death(&pids) < SOON);
    assert_eq!(job.end(), [137, exit::PEER]);
    let err = job.end_of_err(2);
    assert!(
        err.starts_with("error: the connection to the coordinator"),
        "{err}"
    );
}

#[test]
fn a_stopped_agent_is_lost_and_its_guard_kills_its_ranks() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let (mut job, pids) = hanging(&cluster, "");
    job.signal(2, Signal::STOP);
    assert!(wait_for_death(&pids[4..]) < SOON);
    assert_eq!(job.code(2), None, "it is stopped");
    assert_eq!(job.end_of(1), exit::PEER);
    assert_node_2_is_named(&job, &format!("silent for {}", duration::format(LEASE)));
    job.signal(2, Signal::CONT);
    assert_eq!(job.end(), [exit::PEER, exit::PEER]);
    assert!(job.end_of_err(2).starts_with("error: "));
}

#[test]
fn ranks_do_not_wait_for_a_stopped_coordinator() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let (mut job, pids) = hanging(&cluster, "");
    job.signal(1, Signal::STOP);
    assert!(wait_for_death(&pids[4..]) < SOON);
    assert_eq!(job.end_of(2), exit::PEER);
    assert_gave_the_coordinator_up(&job);
    job.signal(1, Signal::CONT);
    assert_eq!(job.end(), [exit::PEER, exit::PEER]);
    // The node that has left is not all there is to say.
    assert_node_2_is_named(
        &job,
        "after the coordinator itself, on node-1, had not run for ",
    );
    let hint = "hint: the node itself may be well: see whether the launcher there was stopped";
    assert!(job.err(1).contains(hint), "{}", job.err(1));
    assert_eq!(job.events("stalled").len(), 1);
    assert!(
        job.err(1)
            .contains("warning: the coordinator did not run for ")
    );
}

#[test]
fn both_sides_of_a_cut_end_within_the_lease() {
    const AT_MOST: Duration = LEASE.saturating_add(Duration::from_secs(1));
    let mut survived = Vec::new();
    // A machine that is too busy takes longer.
    while survived.len() < 5 && survived.iter().all(|&time| time >= AT_MOST) {
        let Some(cluster) = Cluster::new(2) else {
            return;
        };
        survived.push(cut_in_two(&cluster));
    }
    assert!(survived.iter().any(|&time| time < AT_MOST), "{survived:?}");
}

/// How long the ranks of the node that was cut off have survived it.
fn cut_in_two(cluster: &Cluster) -> Duration {
    let (mut job, pids) = hanging(cluster, "");
    let cut = Instant::now();
    cluster.pull_cable(2);
    wait_for_death(&pids[4..]);
    let survived = cut.elapsed();
    assert_eq!(job.end(), [exit::PEER, exit::PEER]);
    assert!(cut.elapsed() < SOON);
    assert_node_2_is_named(&job, &format!("silent for {}", duration::format(LEASE)));
    assert_gave_the_coordinator_up(&job);
    survived
}

/// Whoever queues the job again when it is over must not find ranks of it in the run folder.
#[test]
fn the_coordinator_outlives_the_ranks_of_a_lost_node() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    // Its own ranks end at once, those of a stopped agent when its guard ends them.
    let ready = cluster.scene.path("ready").display().to_string();
    let actions = format!("--meet --touch {ready}{{rank}} --hang");
    let mut job = Job::on_all(&cluster, "--nodes 2", &actions);
    let pids = job.wait_for_pids("ready", 0..4);
    job.signal(2, Signal::STOP);
    assert_eq!(job.end_of(1), exit::PEER);
    let left: Vec<_> = pids.iter().filter(|&&pid| alive(pid)).collect();
    assert!(left.is_empty(), "{left:?} of {pids:?} still run");
    job.signal(2, Signal::CONT);
    assert_eq!(job.end(), [exit::PEER, exit::PEER]);
}

#[test]
fn a_cable_that_is_out_for_half_a_second_is_no_loss() {
    const LEASE: Duration = Duration::from_secs(4);
    // A machine that is too busy leaves it out for longer.
    const AT_MOST: Duration = Duration::from_secs(2);
    for attempt in 0.. {
        let Some(cluster) = Cluster::new(2) else {
            return;
        };
        let go = cluster.scene.path("go").display().to_string();
        let ready = cluster.scene.path("ready").display().to_string();
        let actions = format!("--meet --touch {ready}{{rank}} --wait-for {go} --say back --exit 0");
        let mut job = Job::on_all(&cluster, "--nodes 2 --node-timeout 4s", &actions);
        job.wait_for_pids("ready", 0..4);
        let since = Instant::now();
        cluster.pull_cable(2);
        // The length of the blip is what is tested.
        std::thread::sleep(Duration::from_millis(500));
        cluster.plug_cable(2);
        if since.elapsed() > AT_MOST && attempt < 5 {
            continue;
        }
        // The coordinator has heard the node since then, or has given it up.
        std::thread::sleep(LEASE);
        fs_err::write(&go, "").unwrap();
        assert_eq!(job.end(), [0, 0]);
        assert!(job.events("lost").is_empty());
        assert_eq!(job.read("logs/node-2-3.err"), "back\n");
        return;
    }
}
