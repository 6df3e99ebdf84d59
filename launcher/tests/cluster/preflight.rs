//! `--preflight full`: nodes are measured before the job starts, and those that would harm it get no ranks.
//!
//! The cables are made slow enough that they, and not this machine, are what is measured.

use crate::demo::DEMO;
use crate::harness::until;
use crate::job::Job;
use crate::nodes::Cluster;
use rustix::process::Signal;
use serde_json::Value;
use std::time::Duration;
use tsm_job::exit;

/// Quick: bytes, time and patience that suffice for a cable of 100 Mbit/s.
const SHORT: &str = "--preflight full --preflight-scale 262144,400ms,5s --join-timeout 30s";
/// Something can be done in the middle of it.
const LONG: &str = "--preflight full --preflight-scale 262144,60s,120s --join-timeout 1s";

/// `num` nodes with cables of 100 Mbit/s, those of `slow` of 5.
fn cluster(num: usize, slow: &[usize]) -> Option<Cluster> {
    let cluster = Cluster::new(num)?;
    for n in 1..=num {
        let mbit_s = if slow.contains(&n) { 5 } else { 100 };
        if let Err(e) = cluster.slow_down(n, mbit_s) {
            eprintln!("skipped: {e}; needs tc and its tbf");
            return None;
        }
    }
    Some(cluster)
}

/// Waits until a round of measurements is under way.
fn wait_for_round(job: &Job, number: u64) {
    until("a round of measurements", || {
        let rounds = job.events("preflight_round");
        rounds.iter().any(|r| r["number"] == number).then_some(())
    });
}

/// Severity and text of all that was found in one measurement.
fn findings(report: &Value) -> Vec<(String, String)> {
    let text = |v: &Value| v.as_str().expect("a text").to_string();
    let all = report["findings"].as_array().expect("a list").iter();
    all.map(|f| (text(&f["severity"]), text(&f["text"])))
        .collect()
}

fn hosts_of_start(job: &Job) -> Vec<Value> {
    let start = &job.events("start")[0];
    start["hosts"].as_array().expect("a list").clone()
}

#[test]
fn good_nodes_are_measured_and_the_job_runs() {
    let Some(cluster) = cluster(4, &[]) else {
        return;
    };
    let options = format!("--nodes 4 {SHORT}");
    let mut job = Job::on_all(&cluster, &options, "--meet --exit 0");
    assert_eq!(job.end(), [0; 4]);
    let reports = job.events("preflight");
    assert_eq!(reports.len(), 1);
    let found = findings(&reports[0]);
    // This machine does other things, so their memory may differ.
    assert!(found.iter().all(|(severity, _)| severity != "error"));
    let (severity, network) = found.last().expect("findings");
    assert!(network.ends_with("Gbit/s, every sum is right"), "{found:?}");
    assert_eq!((severity.as_str(), &network[..8]), ("ok", "4 nodes "));
    assert_eq!(reports[0]["nodes"].as_array().unwrap().len(), 4);
    for group in reports[0]["groups"][0].as_array().unwrap() {
        let gbit_s = group["gbit_s"].as_f64().unwrap();
        assert!((0.001..0.2).contains(&gbit_s), "{group}");
    }
    assert_eq!(job.json("manifest.json")["preflight"][0]["generation"], 0);
    let shown = "tsm-launch: preflight: memory copies ";
    assert!(job.err(1).contains(shown), "{shown}");
}

#[test]
fn a_slow_node_is_named_and_a_spare_takes_its_place() {
    let Some(cluster) = cluster(4, &[2]) else {
        return;
    };
    let text = "node-2 is slow with every partner: 0.0";
    for (name, nodes, num) in [("spare", "3", 4), ("elastic", "2:3", 3), ("none", "3", 3)] {
        let mut job = Job::named(&cluster, name, 29_400);
        for n in 1..=num {
            job.start(n, &format!("--nodes {nodes} {SHORT}"), "--meet --exit 0");
            job.wait_until_joined(n);
        }
        let codes = job.end();
        let said = job.err(1);
        assert!(said.contains(text), "{said}");
        assert!(said.contains("hint: all ranks wait for it: leave it out"));
        let report = &job.events("preflight")[0];
        let errors: Vec<String> = findings(report)
            .into_iter()
            .filter(|(severity, _)| severity == "error")
            .map(|(_, text)| text)
            .collect();
        assert!(
            errors.len() == 1 && errors[0].starts_with(text),
            "{errors:?}"
        );
        assert_eq!(report["left_out"][0]["host"], "node-2");
        let manifest = job.json("manifest.json");
        assert_eq!(manifest["preflight"][0]["left_out"], report["left_out"]);
        if name == "none" {
            assert_eq!(codes, [exit::PREFLIGHT; 3]);
            assert!(job.events("start").is_empty());
            for n in 1..=3 {
                let text = "2 nodes left, 3 are needed";
                assert!(job.err(n).contains(text), "node-{n}");
            }
        } else {
            assert_eq!(codes, vec![0; num], "{name}");
            let mut hosts = hosts_of_start(&job);
            hosts.sort_by_key(Value::to_string);
            let good: &[&str] = match name {
                "spare" => &["node-1", "node-3", "node-4"],
                _ => &["node-1", "node-3"],
            };
            assert_eq!(hosts, good);
            assert_eq!(job.events("left_out")[0]["host"], "node-2");
            assert!(said.contains("gets no ranks any more: node-2 is slow"));
        }
    }
}

#[test]
fn nodes_that_cannot_reach_each_other_are_named() {
    let Some(cluster) = cluster(4, &[]) else {
        return;
    };
    cluster.isolate(&[3, 4]);
    let options = format!("--nodes 4 {SHORT}");
    let mut job = Job::on_all(&cluster, &options, "--meet --exit 0");
    assert_eq!(job.end(), [exit::PREFLIGHT; 4]);
    let text = "node-3 and node-4 did badly together, and each well with another node: cannot connect to 10.77.0.";
    for n in 1..=4 {
        assert!(job.err(n).contains(text), "node-{n}");
    }
}

#[test]
fn of_two_nodes_a_spare_tells_which_one_is_cut_off() {
    let Some(cluster) = cluster(3, &[]) else {
        return;
    };
    // It reaches the others, but a firewall keeps them from it.
    if let Err(e) = cluster.close(2) {
        return eprintln!("skipped: {e}; needs htb and u32");
    }
    let mut job = Job::on_all(&cluster, &format!("--nodes 2 {SHORT}"), "--meet --exit 0");
    let codes = job.end();
    assert_eq!(codes, [0; 3]);
    assert_eq!(hosts_of_start(&job), ["node-1", "node-3"]);
    assert!(job.err(1).contains("measuring with the spares"));
    assert!(job.err(1).contains("node-2 fails with every partner"));
}

#[test]
fn a_node_that_is_cut_off_in_the_middle_is_named() {
    let Some(cluster) = cluster(3, &[]) else {
        return;
    };
    let mut job = Job::on_all(&cluster, &format!("--nodes 3 {LONG}"), "--meet --exit 0");
    wait_for_round(&job, 1);
    cluster.pull_cable(2);
    let codes = job.end();
    assert_eq!(codes, [exit::PREFLIGHT, exit::PEER, exit::PREFLIGHT]);
    assert!(job.took(1) < Duration::from_secs(60), "not the budget");
    for text in [
        "node-2 is lost: silent for",
        "2 nodes (node-1, node-3) joined within 1s, 3 are needed",
    ] {
        assert!(job.err(1).contains(text), "{text}");
    }
}

#[test]
fn a_spare_replaces_a_node_that_ends_in_the_middle() {
    let Some(cluster) = cluster(3, &[]) else {
        return;
    };
    let scale = "--preflight full --preflight-scale 262144,3s,60s";
    let mut job = Job::on_all(&cluster, &format!("--nodes 2 {scale}"), "--meet --exit 0");
    wait_for_round(&job, 1);
    job.signal(2, Signal::KILL);
    assert_eq!(job.end(), [0, 137, 0]);
    assert_eq!(hosts_of_start(&job), ["node-1", "node-3"]);
    assert!(job.err(1).contains("node-2 is lost"));
    assert_eq!(job.events("preflight").len(), 1);
}

#[test]
fn ctrl_c_ends_the_measurement_at_once() {
    let Some(cluster) = cluster(2, &[]) else {
        return;
    };
    for (n, round) in [(1, 1), (2, 1)] {
        let mut job = Job::named(&cluster, ["one", "two"][n - 1], 29_400);
        for n in 1..=2 {
            job.start(n, &format!("--nodes 2 {LONG}"), "--meet --exit 0");
            job.wait_until_joined(n);
        }
        wait_for_round(&job, round);
        job.signal(n, Signal::INT);
        assert_eq!(job.end(), [130, 130], "Ctrl-C at node-{n}");
        assert!(job.took(1) < Duration::from_secs(60), "not the budget");
        assert!(job.err(1).contains("leaving, no worker runs"));
    }
}

#[test]
fn a_node_that_fails_alone_gets_no_ranks() {
    let Some(cluster) = cluster(2, &[]) else {
        return;
    };
    cluster.node(2).ip("link set lo down\n");
    let text =
        "node-2: a sum over two threads through loopback failed: cannot connect to 127.0.0.1:";
    // The join timeout is that of a job which has all its nodes.
    let mut job = Job::on_all(&cluster, &format!("--nodes 1:2 {SHORT}"), "--meet --exit 0");
    assert_eq!(job.end(), [0, 0]);
    assert_eq!(hosts_of_start(&job), ["node-1"]);
    assert!(
        job.err(1)
            .contains(&format!("gets no ranks any more: {text}"))
    );
    let mut job = Job::named(&cluster, "both", 29_400);
    for n in 1..=2 {
        job.start(n, &format!("--nodes 2 {SHORT}"), "--meet --exit 0");
        job.wait_until_joined(n);
    }
    assert_eq!(job.end(), [exit::PREFLIGHT; 2]);
    assert!(job.err(1).contains(text) && job.err(2).contains(text));
}

#[test]
fn a_broken_node_alone_gets_no_ranks() {
    let Some(cluster) = Cluster::new(1) else {
        return;
    };
    cluster.node(1).ip("link set lo down\n");
    let mut job = Job::on_all(&cluster, SHORT, "--exit 0");
    assert_eq!(job.end(), [exit::PREFLIGHT]);
    let text =
        "node-1: a sum over two threads through loopback failed: cannot connect to 127.0.0.1:";
    assert!(job.err(1).contains(text) && job.err(1).contains("0 nodes left, 1 are needed"));
}

/// Nodes that come later are measured too, one of them without stopping anybody.
#[test]
fn a_faulty_node_that_joins_an_elastic_job_disturbs_nobody_and_a_good_one_is_taken_in() {
    let Some(cluster) = cluster(3, &[]) else {
        return;
    };
    cluster.node(2).ip("link set lo down\n");
    let at = |name: &str| cluster.scene.path(name).display().to_string();
    let (ready, save, going) = (at("ready"), at("save"), at("going"));
    let actions = format!(
        "--exit-on 12 75 --meet \
         --when TSM_GENERATION=0 --step 1 --touch {ready}{{rank}} --wait-for {save}1 --step 2 --section checkpoint \
         --section train --step 3 --touch {going}{{rank}} --wait-for {save}3 --section checkpoint --section train --hang --end \
         --exit 0"
    );
    let mut job = Job::with_trainer(&cluster, &actions);
    let options = "--cpus=2 --nodes=1:2 --max-restarts=1 --show-ranks=all --trainer trainer --preflight full \
                   --preflight-scale 262144,400ms,5s --join-timeout 1s";
    let words: Vec<&str> = options.split_whitespace().chain([DEMO]).collect();
    job.start_words(1, &words);
    job.wait_for_pids("ready", 0..2);
    job.start_words(2, &words);
    until("the faulty node to be left out", || {
        let said = "gets no ranks any more: node-2: a sum over two threads through loopback failed";
        job.err(1).contains(said).then_some(())
    });
    fs_err::write(format!("{save}1"), "").unwrap();
    job.wait_for_pids("going", 0..2);
    assert_eq!(job.events("start").len(), 1, "nobody was stopped for it");
    job.start_words(3, &words);
    until("the good node to be measured", || {
        (job.events("preflight").len() == 3).then_some(())
    });
    assert_eq!(job.events("start").len(), 1);
    fs_err::write(format!("{save}3"), "").unwrap();
    let ends = job.end();
    assert_eq!((ends[0], ends[2]), (0, 0), "{}", job.err(1));
    let starts = job.events("start");
    assert_eq!(starts.len(), 2);
    assert_eq!(starts[1]["hosts"], serde_json::json!(["node-1", "node-3"]));
    // Alone it was measured while the others ran, in the pause with them.
    let nodes = |i: usize| {
        job.events("preflight")[i]["groups"]
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!((nodes(2), nodes(3)), (0, 1));
}
