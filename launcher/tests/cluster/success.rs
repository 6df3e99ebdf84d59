//! Jobs that end well.

use crate::harness::until;
use crate::job::Job;
use crate::nodes::Cluster;
use std::collections::BTreeMap;

/// The environment that a rank has printed.
fn environment(job: &Job, n: usize, rank: usize) -> BTreeMap<String, String> {
    let text = job.read(&format!("logs/node-{n}-{rank}.out"));
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    pairs.map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

#[test]
fn every_rank_of_three_nodes_finds_the_others() {
    let Some(cluster) = Cluster::new(3) else {
        return;
    };
    for node in &cluster.nodes {
        // Every host has this one, and nobody else can be reached through it.
        node.ip("link add docker0 type veth peer name docker1\naddr add 172.17.0.1/16 dev docker0\nlink set docker0 up\nlink set docker1 up\n");
    }
    // It would be the first choice, but leads nowhere.
    cluster.node(1).ip("link add ib0 type veth peer name ib1\naddr add 10.9.0.1/24 dev ib0\nlink set ib0 up\nlink set ib1 up\n");
    let mut job = Job::on_all(
        &cluster,
        "--nodes 3",
        "--meet --say met --print-env --exit 0",
    );
    assert_eq!(job.end(), [0, 0, 0]);
    let port = environment(&job, 1, 0)["MASTER_PORT"].clone();
    assert!(port.parse::<u16>().is_ok_and(|p| p > 0), "{port}");
    for rank in 0..6 {
        let (node, local) = (rank / 2, rank % 2);
        let env = environment(&job, node + 1, rank);
        for (name, value) in [
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", local.to_string()),
            ("WORLD_SIZE", "6".into()),
            ("LOCAL_WORLD_SIZE", "2".into()),
            ("GROUP_RANK", node.to_string()),
            ("GROUP_WORLD_SIZE", "3".into()),
            ("ROLE_NAME", "default".into()),
            ("ROLE_RANK", rank.to_string()),
            ("ROLE_WORLD_SIZE", "6".into()),
            ("NODE_RANK", node.to_string()),
            ("MASTER_ADDR", "10.77.0.1".into()),
            ("MASTER_PORT", port.clone()),
            ("GLOO_SOCKET_IFNAME", "eth0".into()),
            ("NCCL_SOCKET_IFNAME", "=eth0".into()),
            ("TSM_RUN_DIR", job.path("").display().to_string()),
            ("TSM_GENERATION", "0".into()),
        ] {
            let value = value.trim_end_matches('/');
            assert_eq!(env[name], value, "{name} of rank {rank}");
        }
        // On the first node's screen, and in a file of its own.
        let line = format!("node-{} {rank} | RANK={rank}\n", node + 1);
        assert!(job.out(1).contains(&line), "{line}");
        let log = job.read(&format!("logs/node-{}-{rank}.err", node + 1));
        assert_eq!(log, "met\n");
    }
    assert!(
        job.err(1)
            .contains("6 workers on 3 nodes (node-1, node-2, node-3)")
    );
    assert_eq!((job.end_of_err(2), job.out(2)), Default::default());
    assert!(!job.path("failure.json").exists());
    let manifest = job.json("manifest.json");
    assert_eq!(manifest["outcome"], "succeeded", "{manifest:#}");
    assert_eq!(manifest["world_size"], 6);
    assert_eq!(manifest["nodes"][2]["host"], "node-3", "{manifest:#}");
    assert_eq!(manifest["ranks"][5]["end"]["code"], 0);
    assert_eq!(job.events("spawn").len(), 6);
    assert_eq!(job.events("exit").len(), 6);
}

#[test]
fn two_jobs_on_the_same_nodes_do_not_disturb_each_other() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let mut good = Job::named(&cluster, "good", 29_400);
    let mut bad = Job::named(&cluster, "bad", 29_401);
    let failed = cluster.scene.path("failed").display().to_string();
    for n in 1..=2 {
        good.start(
            n,
            "--nodes 2",
            &format!("--meet --wait-for {failed} --say good --exit 0"),
        );
        bad.start(n, "--nodes 2", "--meet --on-rank 3 --say bad --exit 5");
    }
    assert_eq!((bad.end_of(1), bad.end_of(2)), (5, 5));
    fs_err::write(&failed, "").unwrap();
    assert_eq!(good.end(), [0, 0]);
    assert!(!good.err(1).contains("bad") && !bad.err(1).contains("good"));
    assert!(!good.path("failure.json").exists());
    assert_eq!(bad.json("failure.json")["exit_code"], 5);
}

/// Connections that the first node's kernel has refused.
fn resets(cluster: &Cluster) -> u64 {
    let text = cluster
        .node(1)
        .run(|| fs_err::read_to_string("/proc/thread-self/net/snmp").expect("/proc"));
    let mut tcp = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (tcp.next().expect("names"), tcp.next().expect("values"));
    let at = names.split(' ').position(|name| name == "OutRsts");
    let value = values.split(' ').nth(at.expect("OutRsts"));
    value.and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
fn the_first_node_may_come_last() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let mut job = Job::new(&cluster);
    job.start(2, "--nodes 2", "--meet --exit 0");
    until("it to find nobody", || (resets(&cluster) > 0).then_some(()));
    job.start(1, "--nodes 2", "--meet --exit 0");
    assert_eq!(job.end(), [0, 0]);
    assert_eq!(job.json("manifest.json")["nodes"][0]["host"], "node-1");
}
