//! Ctrl-C and other signals, to any of the launchers.

use crate::harness::alive;
use crate::job::Job;
use crate::nodes::Cluster;
use rustix::process::Signal;
use std::time::Duration;

/// Two nodes of two ranks that have met, and end with 0 on SIGINT, or ignore it.
fn hanging<'a>(cluster: &'a Cluster, polite: bool) -> (Job<'a>, Vec<i32>) {
    let ready = cluster.scene.path("ready").display().to_string();
    let sigint = if polite { "--exit-on 2 0" } else { "" };
    let actions = format!("{sigint} --meet --touch {ready}{{rank}} --hang");
    let trap = if polite { "" } else { r#"trap "" INT; "# };
    let script = format!(r#"{trap}exec "$0" "$@""#);
    let mut words = vec![
        "--cpus=2",
        "--nodes=2",
        "--grace=300s",
        "--",
        "sh",
        "-c",
        &script,
    ];
    words.push(crate::harness::FAKE);
    words.extend(actions.split_whitespace());
    let mut job = Job::new(cluster);
    for n in 1..=2 {
        job.start_words(n, &words);
        job.wait_until_joined(n);
    }
    let pids = job.wait_for_pids("ready", 0..4);
    (job, pids)
}

#[test]
fn ctrl_c_at_any_node_stops_all_in_order() {
    for (n, place) in [(1, ""), (2, "node-2")] {
        let Some(cluster) = Cluster::new(2) else {
            return;
        };
        let (mut job, _) = hanging(&cluster, true);
        job.signal(n, Signal::INT);
        assert_eq!(job.end(), [130, 130], "Ctrl-C at node-{n}");
        let signals = job.events("signal");
        assert_eq!(signals.len(), 1);
        assert_eq!(signals[0]["place"], place);
        let at = if n == 2 { " on node-2" } else { "" };
        let text = format!("SIGINT{at}: stopping 4 workers; Ctrl-C again kills them");
        assert!(job.err(1).contains(&text), "{text}");
        let manifest = job.json("manifest.json");
        assert_eq!(manifest["outcome"], "stopped");
        for rank in 0..4 {
            assert_eq!(manifest["ranks"][rank]["end"]["code"], 0);
        }
        assert!(!job.path("failure.json").exists());
    }
}

#[test]
fn the_second_ctrl_c_kills_on_all_nodes() {
    for n in 1..=2 {
        let Some(cluster) = Cluster::new(2) else {
            return;
        };
        let (mut job, pids) = hanging(&cluster, false);
        job.signal(n, Signal::INT);
        job.wait_for("signal", 1);
        assert!(pids.iter().all(|&pid| alive(pid)), "they ignore the first");
        job.signal(n, Signal::INT);
        assert_eq!(job.end(), [130, 130], "Ctrl-C at node-{n}");
        assert!(job.took(1) < Duration::from_secs(200), "not the grace");
        let ranks = &job.json("manifest.json")["ranks"];
        for rank in 0..4 {
            assert_eq!(ranks[rank]["end"]["signal"], 9, "{ranks:#}");
        }
    }
}

#[test]
fn sigterm_to_an_agent_stops_the_job() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let (mut job, _) = hanging(&cluster, true);
    job.signal(2, Signal::TERM);
    assert_eq!(job.end(), [143, 143]);
}

#[test]
fn ctrl_backslash_at_an_agent_stops_the_job() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let (mut job, _) = hanging(&cluster, true);
    job.signal(2, Signal::QUIT);
    assert_eq!(job.end(), [131, 131]);
    assert!(job.err(1).contains("SIGQUIT on node-2: stopping 4 workers"));
}

#[test]
fn user_signals_are_passed_on_to_all_nodes() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let ready = cluster.scene.path("ready").display().to_string();
    let actions = format!("--exit-on 10 0 --meet --touch {ready}{{rank}} --hang");
    let mut job = Job::on_all(&cluster, "--nodes 2", &actions);
    job.wait_for_pids("ready", 0..4);
    job.signal(2, Signal::USR1);
    assert_eq!(job.end(), [0, 0]);
}

#[test]
fn ctrl_c_while_nodes_are_missing_ends_those_that_wait() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    for n in 1..=2 {
        let mut job = Job::named(&cluster, ["one", "two"][n - 1], 29_400);
        for node in 1..=2 {
            job.start(node, "--nodes 3", "--hang");
            job.wait_until_joined(node);
        }
        job.signal(n, Signal::INT);
        assert_eq!(job.end(), [130, 130], "Ctrl-C at node-{n}");
        assert!(job.err(1).contains("leaving, no worker runs"));
    }
}

#[test]
fn an_agent_that_finds_no_coordinator_says_so() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let mut job = Job::new(&cluster);
    job.start(2, "--nodes 2 --join-timeout 500ms", "--hang");
    assert_eq!(job.end(), [69]);
    let err = job.err(2);
    assert!(err.contains("10.77.0.1:29400"), "{err}");
    // And one that still looks for it hears Ctrl-C.
    job.start(2, "--nodes 2", "--hang");
    job.signal(2, Signal::INT);
    assert_eq!(job.end(), [130]);
}
