//! A key that comes without a file.

use std::process::Stdio;

use tsm_launch::cluster::key::Key;
use tsm_launch::port::Port;

use crate::harness::{NODE_TIMEOUT, Scene, finish, start};

/// Prints what it has open, and what it reads.
const LOOK: &str = "ls -l /proc/self/fd | sed 's/^.* \\([0-9]* -> \\)/\\1/'; cat; echo end";

#[test]
fn two_nodes_are_given_their_key_by_descriptors_that_no_rank_inherits() {
    let scene = Scene::new();
    let key = Key::random();
    key.write_file(&scene.path("the.key")).unwrap();
    let held = Port::reserve().unwrap();
    let point = format!("127.0.0.1:{}", held.number);
    let words = |fd| {
        let common = "--run-dir run --nodes 2 --cpus 1 --rendezvous";
        let mut words: Vec<&str> = common.split(' ').collect();
        words.extend([
            &point,
            "--node-timeout",
            NODE_TIMEOUT,
            "--key-fd",
            fd,
            "--",
            "sh",
            "-c",
            LOOK,
        ]);
        words.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let mut by_stdin = scene.command(&[]);
    let mut by_stdin = start(by_stdin.args(words("0")).stdin(Stdio::piped()));
    by_stdin.write(key.to_line().as_bytes());
    let mut by_number = scene.command_of("sh");
    by_number.args(["-c", "exec \"$0\" \"$@\" 7<the.key"]);
    let by_number = start(by_number.arg(scene.own_launcher()).args(words("7")));
    for node in [by_number, by_stdin] {
        let outcome = finish(node);
        assert_eq!(outcome.code, 0, "{}", outcome.err);
    }
    for rank in 0..2 {
        let log = String::from_utf8(scene.log(rank, "out")).unwrap();
        assert!(log.ends_with("\nend\n"), "nothing to read: {log}");
        assert!(log.contains("\n0 -> /dev/null\n"), "{log}");
        assert!(!log.contains("the.key"), "{log}");
        assert!(!log.contains(key.to_line().trim()), "{log}");
    }
}
