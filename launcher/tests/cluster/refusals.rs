//! Who may not take part, and that it harms nobody.

use crate::demo::DEMO;
use crate::job::Job;
use crate::nodes::Cluster;
use std::io::{Read, Write};
use std::net::TcpStream;
use tsm_job::exit;
use tsm_launch::cluster::key::Key;

#[test]
fn a_wrong_key_another_program_and_garbage_are_refused_and_the_job_goes_on() {
    let Some(cluster) = Cluster::new(3) else {
        return;
    };
    let mut job = Job::new(&cluster);
    job.start(1, "--nodes 2", "--meet --exit 0");
    job.wait_until_joined(1);

    // Somebody who looks for web servers.
    let answer = cluster.node(3).run(|| {
        let mut stream = TcpStream::connect("10.77.0.1:29400").expect("it listens");
        let request = b"GET / HTTP/1.1\r\nHost: 10.77.0.1\r\nAccept: */*\r\n\r\n";
        stream.write_all(request).expect("it reads");
        let mut answer = Vec::new();
        // It may break off the connection.
        let _ = stream.read_to_end(&mut answer);
        answer
    });
    assert!(!answer.starts_with(b"HTTP"));
    job.wait_for("refused", 1);

    // A node of another job with the same meeting point.
    let right = fs_err::read(cluster.scene.path("run.key")).unwrap();
    fs_err::remove_file(cluster.scene.path("run.key")).unwrap();
    Key::random()
        .write_file(&cluster.scene.path("run.key"))
        .unwrap();
    job.start(3, "--nodes 2", "--meet --exit 0");
    assert_eq!(job.end_of(3), exit::PREFLIGHT);
    let text = "error: cannot join the job: 10.77.0.1:29400 ";
    assert!(job.err(3).starts_with(text) && job.err(3).contains("key"));
    job.wait_for("refused", 2);
    fs_err::write(cluster.scene.path("run.key"), right).unwrap();

    // One with another command.
    job.start(3, "--nodes 2", "--meet --exit 1");
    assert_eq!(job.end_of(3), exit::PREFLIGHT);
    let text = "node-3 was started with another config or program than the first node";
    assert!(job.err(3).contains(text));

    job.start(2, "--nodes 2", "--meet --exit 0");
    assert_eq!(job.end()[..2], [0, 0]);
    assert!(job.err(1).contains(text));
    for refused in job.events("refused") {
        let peer = refused["peer"].as_str().unwrap();
        assert!(peer.starts_with("10.77.0.3:"), "{refused}");
    }
    assert!(job.err(1).contains("refused a connection: 10.77.0.3:"));
    assert_eq!(job.json("manifest.json")["world_size"], 4);
}

#[test]
fn a_node_that_was_started_with_other_rules_learns_that_they_do_not_count() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let mut job = Job::new(&cluster);
    job.start(1, "--nodes 2", "--meet --exit 0");
    job.wait_until_joined(1);
    job.start(2, "--nodes 3 --grace 5s --no-view", "--meet --exit 0");
    assert_eq!(job.end(), [0, 0]);
    let text = "was started with --nodes 3, --grace 5s: what the first node has counts, --nodes 2, no --grace\n";
    for (n, who) in [(1, "node-2"), (2, "this node")] {
        let text = format!("warning: {who} {text}");
        assert!(job.err(n).contains(&text), "{}", job.err(n));
    }
}

#[test]
fn a_node_with_another_config_is_sent_away() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let mut job = Job::with_trainer(&cluster, "--meet --exit 0");
    let words = ["--cpus=2", "--nodes=2", "--trainer", "trainer", DEMO];
    job.start_words(1, &words);
    job.wait_until_joined(1);
    job.start_words(2, &[&words[..], &["optim.lr=0.5"]].concat());
    assert_eq!(job.end_of(2), exit::PREFLIGHT);
    assert!(job.err(2).contains("was started with another config"));
    job.start_words(2, &words);
    assert_eq!(job.end(), [0, 0]);
}

#[test]
fn too_few_nodes_end_the_wait() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let mut job = Job::on_all(&cluster, "--nodes 3 --join-timeout 1s", "--hang");
    assert_eq!(job.end(), [exit::PREFLIGHT, exit::PREFLIGHT]);
    let text = "2 nodes (node-1, node-2) joined within 1s, 3 are needed";
    for n in 1..=2 {
        assert!(job.err(n).contains(text), "node-{n}");
    }
}

#[test]
fn nodes_that_cannot_reach_each_other_are_named() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    // The others reach the meeting point, and nothing else of the first node.
    cluster
        .node(1)
        .ip("addr add 10.78.0.1/24 dev eth0\naddr del 10.77.0.1/24 dev eth0\naddr add 10.77.0.1/32 dev lo\nroute add 10.77.0.0/24 dev eth0 src 10.77.0.1\n");
    let mut job = Job::on_all(&cluster, "--nodes 2", "--hang");
    assert_eq!(job.end(), [exit::PREFLIGHT, exit::PREFLIGHT]);
    let text = "node-2 cannot reach node-1 at any of its addresses: 10.78.0.1 (eth0)";
    for n in 1..=2 {
        assert!(job.err(n).contains(text), "node-{n}");
    }
}
