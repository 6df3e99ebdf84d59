//! The page about a running job.

use crate::harness::{Scene, finish, until};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};

/// Asks for a page; head and body. `None`: nobody listens there.
fn get(host: Ipv4Addr, port: u16, page: &str) -> Option<(String, String)> {
    let mut stream = TcpStream::connect((IpAddr::V4(host), port)).ok()?;
    let request = format!("GET {page} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).ok()?;
    let (head, body) = reply.split_once("\r\n\r\n")?;
    Some((head.into(), body.into()))
}

#[test]
fn the_page_of_a_running_job_tells_ranks_steps_and_restarts_to_this_machine_alone() {
    let scene = Scene::new();
    let path = |name| scene.path(name).display().to_string();
    let (ready, end) = (path("ready"), path("end"));
    let actions = format!(
        "--step 1 --step 2 --when TSM_GENERATION=0 --on-rank 1 --exit 3 --end \
         --step 7 --touch {ready}{{rank}} --wait-for {end}"
    );
    let running = scene.start("--cpus 2 --max-restarts 1 --grace 5s", &actions);
    let pids = scene.wait_for_pids("ready", 2);
    let address = scene.json("status.json");
    assert_eq!(address["pid"], running.pid());
    let url = address["url"].as_str().expect("an address");
    let port = url.strip_prefix("http://127.0.0.1:").expect("loopback");
    let port: u16 = port.trim_end_matches('/').parse().expect("a port");
    let here = |page: &str| get(Ipv4Addr::LOCALHOST, port, page).expect("it listens");

    let status: Value = until("both ranks at step 7", || {
        let (head, body) = here("/status.json");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        let status: Value = serde_json::from_str(&body).expect("JSON");
        let ranks = status["ranks"].as_array().expect("a list");
        (ranks.len() == 2 && ranks.iter().all(|rank| rank["step"] == 7)).then_some(status)
    });
    assert_eq!(status["phase"], "run", "{status:#}");
    assert_eq!(status["generation"], 1, "{status:#}");
    assert_eq!(status["world_size"], 2, "{status:#}");
    for (rank, pid) in pids.iter().enumerate() {
        let told = &status["ranks"][rank];
        assert_eq!((&told["rank"], &told["pid"]), (&json!(rank), &json!(pid)));
        assert_eq!(told["state"], "running", "{status:#}");
    }
    let restarts = status["restarts"].as_array().expect("a list");
    assert_eq!(restarts.len(), 1, "{status:#}");
    let cause = restarts[0]["cause"].as_str().expect("a text");
    assert!(cause.contains("program error"), "{cause}");
    let host = tsm_launch::manifest::host();
    assert_eq!(status["nodes"][0]["host"], host.as_str(), "{status:#}");

    let (head, text) = here("/metrics");
    assert!(
        head.contains("Content-Type: text/plain; version=0.0.4"),
        "{head}"
    );
    for line in [
        "tsm_phase{phase=\"run\"} 1",
        "tsm_generation 1",
        "tsm_restarts_total 1",
        "tsm_world_size 2",
        &format!("tsm_node_ranks{{node=\"0\",host=\"{host}\"}} 2"),
        &format!("tsm_rank_step{{rank=\"0\",host=\"{host}\"}} 7"),
        &format!("tsm_rank_step{{rank=\"1\",host=\"{host}\"}} 7"),
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    // Whoever listens on all addresses is found here too.
    assert_eq!(get(Ipv4Addr::new(127, 0, 0, 2), port, "/"), None);

    fs_err::write(&end, "").unwrap();
    assert_eq!(finish(running).code, 0);
    assert!(!scene.run_dir().join("status.json").exists());
    // By now another test may have the port.
    let run = scene.run_dir().display().to_string();
    let left = get(Ipv4Addr::LOCALHOST, port, "/metrics");
    assert!(left.is_none_or(|(_, text)| !text.contains(&run)));
}
