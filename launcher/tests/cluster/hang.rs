//! A job over two nodes that makes no step any more.

use crate::job::Job;
use crate::nodes::Cluster;
use serde_json::json;
use tsm_job::exit;

/// Rank 3 sleeps, and the others wait for ever, one step further.
#[test]
fn the_late_rank_of_another_node_is_named_with_its_stack() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let path = |name| cluster.scene.path(name).display().to_string();
    let (ready, go) = (path("ready"), path("go"));
    let actions = format!(
        "--touch {ready}{{rank}} --step 1 --wait-for {go} --step 2 \
         --when RANK=3 --sleep-ms 600000 --end --step 3 --hang"
    );
    let options = "--nodes 2 --hang-timeout 5s --grace 5s";
    let mut job = Job::on_all(&cluster, options, &actions);
    let pids = job.wait_for_pids("ready", 0..4);
    fs_err::write(&go, "").unwrap();
    assert_eq!(job.end(), [exit::PEER, exit::PEER]);
    let (here, there) = (job.err(1), job.err(2));
    let headline = "error: rank 3 hangs: no step for too long";
    for part in [
        "(limit 5s): rank 3 is ",
        headline,
        "where: host node-2, cpu, pid ",
    ] {
        assert!(here.contains(part), "{part}\n{here}");
    }
    assert!(there.contains(headline), "{there}");
    let failure = job.json("failure.json");
    assert_eq!(failure["class"], "hang", "{failure:#}");
    assert_eq!(failure["late"], json!([3]), "{failure:#}");
    assert_eq!(
        (&failure["host"], &failure["pid"]),
        (&json!("node-2"), &json!(pids[3]))
    );
    let stacks = failure["stacks"].as_str().expect("a text");
    assert!(stacks.contains("clock_nanosleep"), "of rank 3: {stacks}");
    assert!(stacks.contains("futex"), "of the others: {stacks}");
}
