//! A rank fails: all nodes stop, and the right one is named.

use crate::demo::DEMO;
use crate::harness::FAKE;
use crate::job::Job;
use crate::nodes::Cluster;
use crate::program::write_program;
use rustix::process::Signal;
use serde_json::Value;
use std::time::Duration;
use tsm_job::exit;

/// Ranks 0 to 3 on two nodes; `actions` of rank `culprit` bring the end about, the others hang. The codes, the failure
/// and the coordinator's report.
fn failing(culprit: u32, actions: &str) -> Option<(Vec<i32>, Value, String)> {
    let cluster = Cluster::new(2)?;
    let actions = format!("--meet --when RANK={culprit} {actions} --end --hang");
    let mut job = Job::on_all(&cluster, "--nodes 2 --grace 300s", &actions);
    let codes = job.end();
    // Whoever ends by SIGTERM ends at once.
    assert!(job.took(1) < Duration::from_secs(200), "not the grace");
    let manifest = job.json("manifest.json");
    assert_eq!(manifest["outcome"], "failed");
    assert_eq!(manifest["exit_code"], codes[0]);
    assert_eq!(job.events("exit").len(), 4);
    // On the other node only what failed, and where to read about it.
    let words = job.end_of_err(2);
    let file = job.path("failure.json").display().to_string();
    assert!(words.starts_with(&format!("error: rank {culprit} failed first: ")));
    assert!(words.contains(" on node-2\n") && words.contains(&file));
    assert!(words.contains("the screen of node-1"), "{words}");
    Some((codes, job.json("failure.json"), job.err(1)))
}

#[test]
fn the_code_of_a_rank_on_another_node_is_the_code_of_every_launcher() {
    for (culprit, actions, code, text) in [
        (3, "--exit 17", 17, "rank 3 failed first: exit code 17"),
        (
            2,
            "--kill 9",
            137,
            "rank 2 failed first: signal 9 (SIGKILL)",
        ),
        (
            3,
            "--error-file ValueError:x --exit 1",
            1,
            "exception: ValueError:x",
        ),
    ] {
        let Some((codes, failure, err)) = failing(culprit, actions) else {
            return;
        };
        assert_eq!(codes, [code, code], "{err}");
        assert!(err.contains(text), "{text}\n{err}");
        assert!(err.contains("where: host node-2, cpu, pid "), "{err}");
        assert_eq!(failure["rank"], culprit, "{err}");
        assert_eq!(failure["host"], "node-2", "{err}");
        assert_eq!(failure["exit_code"], code);
        let others = failure["others"].as_array().unwrap();
        assert_eq!(others.len(), 3, "{failure:#}");
        for other in others {
            assert_eq!(other["role"], "stopped", "{failure:#}");
            let node = other["rank"].as_u64().unwrap() / 2 + 1;
            assert_eq!(other["host"], format!("node-{node}"));
        }
    }
}

/// The connections of a rank that dies break, its peers complain as gloo does, and end too.
#[test]
fn the_culprit_is_right_when_its_peers_on_other_nodes_follow_at_once() {
    for (culprit, after_ms) in [(3, 0), (2, 1), (1, 1), (0, 2), (3, 5), (2, 0)] {
        let Some(cluster) = Cluster::new(3) else {
            return;
        };
        let actions = format!(
            "--meet --when RANK={culprit} --say culprit --sleep-ms 50 --exit 17 --end --wait-lost --sleep-ms {after_ms} \
             --raw 436f6e6e656374696f6e20636c6f7365642062792070656572205b31302e37372e302e315d0a --exit 1"
        );
        let mut job = Job::on_all(&cluster, "--nodes 3", &actions);
        assert_eq!(job.end(), [17; 3], "rank {culprit}, {after_ms} ms");
        let failure = job.json("failure.json");
        let host = format!("node-{}", culprit / 2 + 1);
        assert_eq!(failure["rank"], culprit, "after {after_ms} ms");
        assert_eq!(failure["host"], host);
        assert!(job.err(1).contains("    | culprit\n"));
        for other in failure["others"].as_array().unwrap() {
            let role = other["role"].as_str().unwrap();
            assert!(["lost_peer", "stopped"].contains(&role), "{failure:#}");
        }
    }
}

#[test]
fn a_rank_that_ignores_sigterm_on_another_node_gets_the_grace_and_then_sigkill() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let actions = "--when RANK=3 --ignore-sigterm --end --meet --when RANK=0 --exit 5 --end --hang";
    let mut job = Job::on_all(&cluster, "--nodes 2 --grace 700ms", actions);
    assert_eq!(job.end(), [5, 5]);
    assert!(job.took(1) >= Duration::from_millis(700));
    let err = job.err(1);
    assert!(err.contains("the grace is over: killing rank 3"));
    assert!(err.contains("rank 0 failed first: exit code 5"));
    let ranks = &job.json("manifest.json")["ranks"];
    assert_eq!(ranks[2]["end"]["signal"], 15, "{ranks:#}");
    assert_eq!(ranks[3]["end"]["signal"], 9, "{ranks:#}");
}

#[test]
fn a_program_that_one_node_lacks_is_named_with_its_node() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let mut job = Job::new(&cluster);
    // It is the same command, but only the first node has the program.
    let program = cluster.scene.path("program");
    let script = "#!/bin/sh\n[ $GROUP_RANK = 0 ] && exec sleep 1000\nexec /no/such/program\n";
    write_program(&program, script);
    let program = program.display().to_string();
    for n in 1..=2 {
        job.start_words(n, &["--cpus=1", "--nodes=2", "--", &program]);
        job.wait_until_joined(n);
    }
    assert_eq!(job.end(), [127, 127]);
    let failure = job.json("failure.json");
    assert_eq!(
        (&failure["rank"], &failure["host"]),
        (&1.into(), &"node-2".into())
    );
    assert!(job.err(1).contains("/no/such/program"));
}

/// More than a message holds: the last 32 KiB of each of 48 ranks.
#[test]
fn a_node_whose_ranks_all_say_much_is_not_lost_by_it() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let mut job = Job::new(&cluster);
    let go = cluster.scene.path("go").display().to_string();
    let script = format!(
        "if [ $RANK = 0 ]; then exec $0 --hang; fi
         line=$(printf %1900s | tr ' ' x)
         for i in $(seq 20); do echo \"$RANK $i $line\" >&2; done
         if [ $RANK = 5 ]; then exec $0 --say 'ValueError: the culprit' --touch {go} --exit 17; fi
         exec $0 --wait-for {go} --hang"
    );
    for (n, cpus) in [(1, "--cpus=1"), (2, "--cpus=48")] {
        let words = [
            cpus,
            "--nodes=2",
            "--show-ranks=none",
            "--",
            "sh",
            "-c",
            &script,
            FAKE,
        ];
        job.start_words(n, &words);
        job.wait_until_joined(n);
    }
    assert_eq!(job.end(), [17, 17]);
    let failure = job.json("failure.json");
    assert_eq!(
        (&failure["rank"], &failure["end"]["code"]),
        (&5.into(), &17.into())
    );
    let stderr = failure["stderr"].as_array().unwrap();
    assert_eq!(stderr.last().unwrap(), "ValueError: the culprit");
    assert!(
        stderr[stderr.len() - 2]
            .as_str()
            .unwrap()
            .starts_with("5 20 xxx")
    );
    assert_eq!(failure["others"].as_array().unwrap().len(), 48);
    assert!(job.events("lost").is_empty());
}

/// The ranks of two nodes, which wait for each other and so do not save: what `fail` does to rank 0 or node 2 while they
/// are to, and the node or rank that is named.
fn failing_save(on_usr2: &str, fail: impl Fn(&Job)) -> Option<(Vec<i32>, Value, String)> {
    let cluster = Cluster::new(2)?;
    let ready = cluster.scene.path("ready").display().to_string();
    let mut job = Job::with_trainer(&cluster, "");
    let script = format!(
        "#!/bin/sh\ntrap '' USR2\nexec {FAKE} --hello --meet {on_usr2} --touch {ready}{{rank}} --hang\n"
    );
    write_program(&cluster.scene.path("trainer"), &script);
    let words = [
        "--cpus=2",
        "--nodes=2",
        "--grace=300s",
        "--trainer",
        "trainer",
        DEMO,
    ];
    for n in 1..=2 {
        job.start_words(n, &words);
        job.wait_until_joined(n);
    }
    job.wait_for_pids("ready", 0..4);
    job.wait_for("spawn", 4);
    job.signal(1, Signal::USR2);
    job.wait_for("signal", 1);
    fail(&job);
    let codes = job.end();
    assert!(job.took(1) < Duration::from_secs(200), "not the grace");
    Some((codes, job.json("failure.json"), job.err(1)))
}

#[test]
fn a_save_that_a_rank_or_a_node_fails_in_does_not_keep_the_others_for_the_grace() {
    let on_usr2 = "--when RANK=0 --exit-on 12 13 --end";
    let Some((codes, failure, err)) = failing_save(on_usr2, |_| {}) else {
        return;
    };
    assert_eq!(codes, [13, 13], "{err}");
    assert_eq!(
        (&failure["rank"], &failure["host"]),
        (&0.into(), &"node-1".into())
    );
    let said = "rank 0 on node-1 ended with exit code 13 while the workers save: stopping the others, grace 5m";
    assert_eq!(err.matches(said).count(), 1, "{err}");
    for other in failure["others"].as_array().unwrap() {
        assert_eq!(other["role"], "stopped", "{failure:#}");
    }

    let lose = |job: &Job| job.signal(2, Signal::KILL);
    let Some((codes, failure, err)) = failing_save("", lose) else {
        return;
    };
    assert_eq!(codes, [exit::PEER, 137], "{err}");
    assert_eq!(failure["host"], "node-2", "{failure:#}");
    assert_eq!(failure["class"], "node_lost", "{failure:#}");
}
