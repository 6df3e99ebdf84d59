//! Who has the key of a job may run commands on all of its nodes.

use crate::harness::{alive, until};
use crate::job::Job;
use crate::nodes::Cluster;
use crate::secret::{assert_would_be_seen, exposed};

#[test]
fn no_process_of_a_job_shows_the_key() {
    let Some(cluster) = Cluster::new(2) else {
        return;
    };
    let marker = cluster.scene.path("");
    assert_would_be_seen(&marker);
    let path = |name| cluster.scene.path(name).display().to_string();
    let (ready, end) = (path("ready"), path("end"));
    let actions = format!("--meet --fork --touch {ready}{{rank}} --wait-for {end}");
    let mut job = Job::on_all(&cluster, "--nodes 2", &actions);
    job.wait_for_pids("ready", 0..4);
    // Launcher, guard, two workers and a child of each.
    for node in &cluster.nodes {
        until("all processes", || {
            (node.processes().len() >= 6).then_some(())
        });
    }
    assert_eq!(exposed(&marker), [""; 0]);
    // And not in another form.
    let key = fs_err::read_to_string(path("run.key")).expect("the key");
    let digits = key.trim().as_bytes().chunks(2);
    let bytes = digits.map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap());
    let bytes: Vec<u8> = bytes.collect();
    let secrets = [bytes, key.trim().to_uppercase().into_bytes()];
    for (pid, command) in cluster.nodes.iter().flat_map(|node| node.processes()) {
        for name in ["cmdline", "environ"] {
            let text = match fs_err::read(format!("/proc/{pid}/{name}")) {
                // A program that the launcher has asked for something.
                Err(_) if !alive(pid) => continue,
                text => text.expect("it runs"),
            };
            for secret in &secrets {
                let found = text.windows(secret.len()).any(|part| part == secret);
                assert!(!found, "{name} of {command}");
            }
        }
    }
    fs_err::write(&end, "").unwrap();
    assert_eq!(job.end(), [0, 0]);
}
