//! `--log-format json`: whatever reads it has to read nothing else.

use crate::harness::{FAKE, Scene, finish, start};
use serde_json::Value;

#[test]
fn every_line_is_an_object_that_of_ranks_and_those_of_the_launcher() {
    let scene = Scene::new();
    let mut words = "--log-format json --cpus 2 --max-restarts 1 --grace 5s --run-dir run --"
        .split(' ')
        .collect::<Vec<_>>();
    words.push(FAKE);
    // No UTF-8, a NUL, control characters and a progress bar; then a line without an end.
    words.extend("--raw ff00fe1b5b31310a0d31300d32300a --meet --on-rank 1 --step 3".split(' '));
    words.extend(["--say", "it \"broke\" \\ here"]);
    words
        .extend("--when TSM_GENERATION=0 --exit 3 --end --step 4 --raw 656e64 --exit 4".split(' '));
    let outcome = finish(start(&mut scene.command(&words)));
    assert_eq!(outcome.code, 4, "{}{}", outcome.out, outcome.err);
    let read = |text: &str| -> Vec<Value> {
        let lines = text.lines();
        let parsed =
            lines.map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l:?}")));
        parsed.collect()
    };
    assert!(read(&outcome.err).iter().all(Value::is_object));
    let records = read(&outcome.out);
    let host = tsm_launch::manifest::host();
    for record in &records {
        let mut keys: Vec<_> = record.as_object().expect("an object").keys().collect();
        keys.sort();
        assert_eq!(keys, ["host", "line", "rank", "stream", "time"], "{record}");
        assert_eq!(record["host"], host.as_str(), "{record}");
        let time = record["time"].as_str().expect("a time");
        assert!(time.len() >= 20 && time.ends_with('Z'), "{record}");
    }
    let lines = |rank: Option<u32>, stream: &str| -> Vec<&str> {
        let of = records
            .iter()
            .filter(|r| r["rank"] == rank.map_or(Value::Null, Value::from));
        of.inspect(|r| assert_eq!(r["stream"], stream))
            .map(|r| r["line"].as_str().expect("a text"))
            .collect()
    };
    let raw = "\u{fffd}\0\u{fffd}\x1b[11";
    let twice = [raw, "20", "it \"broke\" \\ here"];
    assert_eq!(
        lines(Some(1), "stderr"),
        [&twice[..], &twice, &["end"]].concat()
    );
    assert_eq!(lines(Some(0), "stderr"), [raw, "20", raw, "20"]);
    let own = lines(None, "launcher").join("\n");
    for said in [
        "restarts left: 0",
        "error: rank 1 failed first: exit code 4",
        "  hint: ",
    ] {
        assert!(own.contains(said), "{said}\n{own}");
    }
}
