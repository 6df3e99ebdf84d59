//! Nodes that keep failing get no ranks any more, and everybody is told.

use crate::job::Job;
use crate::nodes::Cluster;

/// Ranks of three nodes with two workers each; rank 4 or 5 is on `node-3`. At the end of the first two starts `actions`
/// are done by rank 4; the third start waits until `release` exists.
fn job<'a>(cluster: &'a Cluster, first: &str, second: &str, then: &str) -> Job<'a> {
    let start = |generation: u32, actions: &str| {
        format!(
            "--when TSM_GENERATION={generation} --meet --end --when FAILS=r4g{generation} {actions} --end "
        )
    };
    let script = format!(
        "export FAILS=r${{RANK}}g$TSM_GENERATION; exec {} {}{}--when TSM_GENERATION={then} --exit 0 --end --hang",
        crate::harness::FAKE,
        start(0, first),
        start(1, second),
    );
    let mut job = Job::new(cluster);
    let words = [
        "--cpus=2",
        "--nodes=2:3",
        "--max-restarts=5",
        "--grace=5s",
        "--",
        "sh",
        "-c",
        &script,
    ];
    for n in 1..=cluster.nodes.len() {
        job.start_words(n, &words);
        job.wait_until_joined(n);
    }
    job
}

fn assert_told(job: &Job, why: &str, must: bool) {
    let how = match must {
        true => "gets no ranks any more",
        false => "gets no ranks as long as the others suffice",
    };
    let err = job.err(1);
    assert!(
        err.contains(&format!("tsm-launch: node-3 {how}: {why}")),
        "{err}"
    );
    let own = job.err(3);
    assert!(
        own.contains(&format!("tsm-launch: this node {how}: {why}")),
        "{own}"
    );
    let record = &job.events("left_out")[0];
    assert_eq!(
        (record["host"].as_str(), record["must"].as_bool()),
        (Some("node-3"), Some(must))
    );
    let manifest = job.json("manifest.json");
    let [entry] = manifest["left_out"].as_array().unwrap().as_slice() else {
        panic!("{:#}", manifest["left_out"]);
    };
    assert_eq!(entry["host"], "node-3");
    assert!(
        entry["reason"].as_str().unwrap().starts_with(why),
        "{entry:#}"
    );
    assert_eq!(
        (&entry["must"], entry["until"].is_null()),
        (&must.into(), true)
    );
    let generations = manifest["generations"].as_array().unwrap();
    let last = generations.last().unwrap();
    assert_eq!(last["nodes"], serde_json::json!(["node-1", "node-2"]));
}

#[test]
fn a_node_where_two_starts_failed_is_left_out_with_the_reason() {
    let Some(cluster) = Cluster::new(3) else {
        return;
    };
    let mut job = job(&cluster, "--step 5 --kill 15", "--step 9 --kill 15", "2");
    assert_eq!(job.end(), [0; 3], "{job}");
    let why = "2 of the last 2 failures began there, the last: killed from outside";
    assert_told(&job, why, false);
    // The ranks of the other nodes were stopped by the launcher, and lost nobody.
    assert!(!job.err(1).contains("they lost another rank"), "{job}");
}

#[test]
fn a_node_with_broken_hardware_is_left_out_at_once() {
    let Some(cluster) = Cluster::new(3) else {
        return;
    };
    let line: String = "CUDA error: uncorrectable ECC error encountered\n"
        .bytes()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let actions = format!("--step 5 --raw {line} --exit 1");
    let mut job = job(&cluster, &actions, "--hang", "1");
    assert_eq!(job.end(), [0; 3], "{job}");
    assert_told(&job, "hardware", true);
}

/// The second of two launchers on one machine dies: only its ranks are lost.
#[test]
fn two_launchers_on_one_host_are_two_nodes() {
    let Some(cluster) = Cluster::new(1) else {
        return;
    };
    let mut job = Job::new(&cluster);
    let ready = cluster.scene.path("ready").display().to_string();
    let actions = format!("--meet --step 7 --touch {ready}{{rank}} --hang");
    for n in 1..=2 {
        job.start(n, "--nodes 2", &actions);
        job.wait_for("join", n);
    }
    job.wait_for_pids("ready", 0..4);
    job.wait_for("spawn", 4);
    job.signal(2, rustix::process::Signal::KILL);
    assert_eq!(job.end(), [tsm_job::exit::PEER, 137], "{job}");
    let failure = job.json("failure.json");
    assert!(failure["rank"].is_null(), "{failure:#}");
    assert_eq!(failure["node_rank"], 1);
    let others = failure["others"].as_array().unwrap();
    let roles: Vec<&str> = others.iter().map(|o| o["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["stopped", "stopped", "node_lost", "node_lost"]);
    assert!(
        job.err(1).contains("where: host node-1, ranks 2-3\n"),
        "{job}"
    );
}
