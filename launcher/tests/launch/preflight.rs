//! Nodes and the network between them are measured: the slow, the broken and the wrong one is found.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;
use tsm_launch::doctor::preflight::{
    Measured, Outcome, Ring, Scale, Task, Verdict, conviction, judge, next_round,
};

use tsm_launch::port::Port;

use crate::harness::{DEADLINE, Scene};

fn scale(wait: Duration) -> Scale {
    Scale {
        bytes: 1 << 20,
        budget: Duration::from_millis(200),
        wait,
        ..Scale::default()
    }
}

/// What the cable to a node does.
#[derive(Clone, Copy, PartialEq)]
enum Cable {
    /// Lets 64 KiB through every half millisecond, 130 MB/s at most: so it is no matter how busy the machine is.
    Good,
    /// Lets 1 KiB through every half millisecond, 2 MB/s at most.
    Slow,
    /// Flips a bit far behind the greeting.
    Wrong,
    Cut,
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// The address under which others find a node at the end of such a cable.
fn lay(cable: Cable, node: SocketAddr) -> SocketAddr {
    if cable == Cable::Cut {
        let held = Port::reserve().unwrap();
        let address = local(held.number);
        // Nobody is to listen there later.
        std::mem::forget(held);
        return address;
    }
    let listener = TcpListener::bind(local(0)).unwrap();
    let address = listener.local_addr().unwrap();
    // Both threads end with the connection.
    thread::spawn(move || {
        let (from, _) = listener.accept().unwrap();
        // The node may have given up already, when its partner failed.
        let Ok(to) = TcpStream::connect(node) else {
            return;
        };
        let back = (to.try_clone().unwrap(), from.try_clone().unwrap());
        thread::spawn(move || carry(back.0, back.1, Cable::Good));
        carry(from, to, cable);
    });
    address
}

fn carry(mut from: TcpStream, mut to: TcpStream, cable: Cable) {
    let mut piece = vec![
        0;
        if cable == Cable::Slow {
            1 << 10
        } else {
            64 << 10
        }
    ];
    let mut carried = 0;
    while let Ok(len @ 1..) = from.read(&mut piece) {
        if cable == Cable::Wrong && carried < 100_000 && carried + len >= 100_000 {
            piece[len / 2] ^= 1;
        }
        carried += len;
        if len > 1 {
            thread::sleep(Duration::from_micros(500));
        }
        if to.write_all(&piece[..len]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

fn prove(nonce: [u8; 16]) -> [u8; 32] {
    let mut proof = [7; 32];
    proof[..16].copy_from_slice(&nonce);
    proof
}

/// One group, measured as the nodes would do it.
fn measure(members: &[usize], cables: &[Cable], wait: Duration) -> Vec<Result<Measured, String>> {
    let rings: Vec<Ring> = members.iter().map(|_| Ring::open().unwrap()).collect();
    let lay = |(ring, &node): (&Ring, &usize)| lay(cables[node], local(ring.port));
    let addresses: Vec<SocketAddr> = rings.iter().zip(members).map(lay).collect();
    let start = |(me, ring): (usize, Ring)| {
        ring.start(Task::new(addresses.clone(), me, &scale(wait)), prove)
    };
    let started: Vec<_> = rings.into_iter().enumerate().map(start).collect();
    started
        .into_iter()
        .map(|answer| answer.blocking_recv().unwrap())
        .collect()
}

fn preflight(cables: &[Cable], wait: Duration) -> Vec<Vec<Outcome>> {
    let mut done: Vec<Vec<Outcome>> = Vec::new();
    loop {
        let groups = next_round(cables.len(), &done);
        if groups.is_empty() {
            return done;
        }
        let measured = |members: Vec<usize>| {
            let answers = measure(&members, cables, wait);
            Outcome::new(members, answers)
        };
        done.push(groups.into_iter().map(measured).collect());
    }
}

#[test]
fn healthy_nodes_sum_up_right_also_three_in_a_ring() {
    for number in [2, 3, 5] {
        let members: Vec<usize> = (0..number).collect();
        for answer in measure(&members, &vec![Cable::Good; number], DEADLINE) {
            let measured = answer.unwrap();
            assert_eq!(measured.wrong, None);
            assert!(measured.gbit_s > 0.0 && measured.round_trip > Duration::ZERO);
        }
    }
}

#[test]
fn the_slow_node_is_named() {
    let cables = [Cable::Good, Cable::Good, Cable::Slow, Cable::Good];
    // Other work on this machine can make a healthy cable slow for a moment, but not ten times.
    let all_good = |verdicts: &[Verdict]| [0, 1, 3].iter().all(|&i| verdicts[i] == Verdict::Good);
    let mut done = preflight(&cables, DEADLINE);
    for _ in 0..9 {
        if !all_good(&judge(4, &done)) {
            done = preflight(&cables, DEADLINE);
        }
    }
    let verdicts = judge(4, &done);
    assert!(
        matches!(verdicts[2], Verdict::Slow { gbit_s, usual } if gbit_s < 0.1 && usual > 2.0 * gbit_s),
        "{verdicts:?} {done:?}"
    );
    for good in [0, 1, 3] {
        assert_eq!(verdicts[good], Verdict::Good, "{done:?}");
    }
    let text = conviction("gpu-2", &verdicts[2]).unwrap().text;
    assert!(
        text.starts_with("gpu-2 is slow with every partner: 0.0"),
        "{text}"
    );
}

#[test]
fn the_node_that_sums_up_wrong_is_named() {
    let cables = [Cable::Good, Cable::Wrong, Cable::Good, Cable::Good];
    let done = preflight(&cables, DEADLINE);
    let verdicts = judge(4, &done);
    assert!(
        matches!(&verdicts[1], Verdict::Faulty(e) if e.contains("sums are wrong")),
        "{done:?}"
    );
    // A busy machine may make a healthy one look slow, but no sum wrong.
    for good in [0, 2, 3] {
        assert!(!matches!(verdicts[good], Verdict::Faulty(_)), "{done:?}");
    }
}

#[test]
fn the_node_that_cannot_be_reached_is_named() {
    let cables = [Cable::Good, Cable::Good, Cable::Good, Cable::Cut];
    let done = preflight(&cables, Duration::from_secs(5));
    let verdicts = judge(4, &done);
    assert!(
        matches!(&verdicts[3], Verdict::Faulty(e) if e.contains("cannot connect to 127.0.0.1:")),
        "{verdicts:?}"
    );
    for good in [0, 1, 2] {
        assert!(!matches!(verdicts[good], Verdict::Faulty(_)), "{done:?}");
    }
}

#[test]
fn a_stranger_is_not_let_in() {
    let (a, b) = (Ring::open().unwrap(), Ring::open().unwrap());
    let members = vec![local(a.port), local(b.port)];
    let task = |me| Task::new(members.clone(), me, &scale(DEADLINE));
    let own = a.start(task(0), prove);
    let stranger = b.start(task(1), |_| [0; 32]);
    for answer in [own, stranger] {
        let error = answer.blocking_recv().unwrap().unwrap_err();
        assert!(
            error.contains("does not belong to this job") || error.contains("cannot connect"),
            "{error}"
        );
    }
}

#[test]
fn a_node_alone_is_measured_before_its_ranks() {
    let scene = Scene::new();
    let options = "--cpus 2 --preflight full --preflight-scale 1048576,50ms,60s";
    let outcome = scene.launch(options, "--exit 0");
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let shown = "tsm-launch: preflight: memory copies ";
    assert!(outcome.err.contains(shown), "{}", outcome.err);
    let report = &scene.json("manifest.json")["preflight"][0];
    let node = &report["nodes"][0];
    assert!(node["memory_gbyte_s"].as_f64() > Some(0.0), "{report}");
    assert!(node["loopback_gbit_s"].as_f64() > Some(0.0), "{report}");
    assert!(report["groups"].as_array().is_some_and(Vec::is_empty));
    let events = scene.read("events.jsonl");
    let order: Vec<usize> = [r#""event":"preflight""#, r#""event":"spawn""#]
        .map(|event| events.find(event).expect("an event"))
        .to_vec();
    assert!(order.is_sorted(), "{events}");
    let outcome = Scene::new().launch("--cpus 1", "--exit 0");
    assert!(!outcome.err.contains("preflight"), "{}", outcome.err);
}
