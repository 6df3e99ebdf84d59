use crate::blame::tests::{fault, rank, said};
use crate::blame::{Culprit, Fault, Lost, NodeEnds, Role, Seen, first_failure, role};
use crate::end::End;
use crate::oom::OomKills;
use crate::report::{Home, Place, Run, failure};
use crate::supervisor::Rank;
use std::path::Path;
use std::time::Duration;
use tsm_job::exit;

const MS: Duration = Duration::from_millis(1);

/// A rank in this role; with [`Role::Origin`] it was killed from outside.
fn in_role(wanted: Role) -> Rank {
    let stopped = |end| Rank {
        after_stop: true,
        sent: vec![libc::SIGTERM],
        ..rank(0, end)
    };
    let rank = match wanted {
        Role::Origin => rank(0, End::Signal(libc::SIGKILL)),
        Role::OwnError => Rank {
            record: said("error", "no such clip"),
            ..stopped(End::Code(1))
        },
        Role::OwnCode => stopped(End::Code(3)),
        Role::LostPeer => rank(0, End::Code(exit::PEER)),
        Role::Stopped | Role::LastWords => stopped(End::Signal(libc::SIGTERM)),
        Role::Succeeded => rank(0, End::Code(0)),
        Role::Stuck | Role::NodeLost => Rank::default(),
    };
    if wanted != Role::NodeLost {
        assert_eq!(role(&rank, || words(wanted).into()), wanted);
    }
    rank
}

/// The end of the stderr of a rank in this role.
fn words(role: Role) -> &'static str {
    match role {
        Role::LastWords => "error: no such clip",
        _ => "",
    }
}

/// The sentence and the lines about the others, for ranks at these times; those of `nodes[i]` are on node `i`, whose
/// clocks are off by up to 1 ms. The first rank of the first node is to be named.
fn told(nodes: &[&[(Role, u64)]]) -> (String, String) {
    let mut ranks: Vec<Vec<Rank>> = Vec::new();
    let words: Vec<&str> = nodes
        .iter()
        .copied()
        .flatten()
        .map(|(role, _)| words(*role))
        .collect();
    for node in nodes {
        let mut of_node: Vec<Rank> = node
            .iter()
            .map(|&(role, at)| Rank {
                ended_at: MS * at as u32,
                first_at: MS * at as u32,
                order: at as usize,
                ..in_role(role)
            })
            .collect();
        if let [(_, at), (Role::Origin, _)] = node {
            of_node[0].order = *at as usize;
        }
        ranks.push(of_node);
    }
    let (mut number, mut ends) = (0, Vec::new());
    const HOSTS: [&str; 3] = ["n1", "n2", "n3"];
    for (i, of_node) in ranks.iter().enumerate() {
        let seen = |rank| {
            number += 1;
            Seen {
                number: number - 1,
                rank,
                at: rank.first_at,
            }
        };
        let lost = nodes[i].iter().any(|(role, _)| *role == Role::NodeLost);
        ends.push(NodeEnds {
            host: HOSTS[i],
            ranks: of_node.iter().map(seen).collect(),
            uncertainty: if nodes.len() > 1 { MS } else { Duration::ZERO },
            lost: lost.then_some(Lost {
                heard: MS * 900,
                given_up: MS * 999,
                how: "gone",
            }),
        });
    }
    let fault = first_failure(&ends, None, |i| words[i].into()).unwrap();
    assert_eq!(fault.culprit, Culprit::Rank(0), "{nodes:?}");
    let others = lines(&ends, &fault, &ranks, &words);
    (fault.reason, others)
}

fn lines(ends: &[NodeEnds], fault: &Fault, ranks: &[Vec<Rank>], words: &[&str]) -> String {
    let all: Vec<Rank> = ranks.iter().flatten().cloned().collect();
    let (mut homes, mut places) = (Vec::new(), Vec::new());
    for (node_rank, node) in ends.iter().enumerate() {
        for _ in &node.ranks {
            homes.push(Home {
                node_rank,
                uncertainty: node.uncertainty,
                is_lost: node.lost.is_some(),
            });
            places.push(Place {
                host: node.host.into(),
                device: "cpu".into(),
                pid: 1,
                stderr_file: "err".into(),
                error_file: "/nonexistent".into(),
                exception: None,
                stderr: words
                    .get(places.len())
                    .map_or(Vec::new(), |w| vec![w.to_string()]),
                oom_kill: None,
                stuck_in: None,
            });
        }
    }
    let run = Run {
        id: "r",
        dir: Path::new("runs/r"),
        exit_code: 1,
        tells: true,
        oom_kills: OomKills::default(),
        xids: &[],
        homes: &homes,
        stacks: None,
        earlier: &[],
        missing: None,
        resume: None,
    };
    let text = failure(&run, fault, &all, &places).to_string();
    let (_, text) = text.split_once("; the others:\n").unwrap();
    let lines = text.lines().take_while(|line| line.starts_with("    "));
    lines.map(str::trim).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_sentence_is_true_beside_every_other_end() {
    use Role::{
        LastWords, LostPeer, NodeLost, Origin, OwnCode, OwnError, Stopped, Stuck, Succeeded,
    };
    let clocks = "less than the clocks tell";
    // The role of the one that is named, at 100 ms; role and time of another on its node, or on another node.
    let cases = [
        // On one node the order is sure.
        (
            Origin,
            Some((Stopped, 103)),
            None,
            "its end came first in the kernel's order",
            "rank 1: stopped by the launcher: signal 15 (SIGTERM), 3.0 ms after",
        ),
        (
            Origin,
            Some((Stopped, 97)),
            None,
            "no other rank failed before it",
            "rank 1: stopped by the launcher: signal 15 (SIGTERM), 3.0 ms before",
        ),
        (
            Origin,
            Some((Succeeded, 93)),
            None,
            "no other rank failed before it",
            "rank 1: succeeded, 7.0 ms before",
        ),
        (
            Origin,
            Some((Succeeded, 103)),
            None,
            "its end came first in the kernel's order",
            "rank 1: succeeded, 3.0 ms after",
        ),
        (
            Origin,
            Some((LostPeer, 98)),
            None,
            "rank 1 failed earlier, but by what it says it lost another rank",
            "rank 1: lost another rank: exit code 76, 2.0 ms before",
        ),
        (
            Origin,
            Some((LostPeer, 101)),
            None,
            "its end came first in the kernel's order",
            "rank 1: lost another rank: exit code 76, 1.0 ms after",
        ),
        (
            Origin,
            Some((OwnError, 98)),
            None,
            "rank 1 told of an own error earlier, but while it was being stopped",
            "rank 1: had an error of its own: exit code 1, 2.0 ms before",
        ),
        (
            Origin,
            Some((OwnCode, 98)),
            None,
            "rank 1 ended earlier with an own code, but while it was being stopped",
            "rank 1: exit code 3, 2.0 ms before",
        ),
        (
            Origin,
            Some((LastWords, 98)),
            None,
            "rank 1 had told of an error earlier, but ended by the stop",
            "rank 1: had told of an error, and was stopped by the launcher: signal 15 (SIGTERM), 2.0 ms before",
        ),
        (
            LastWords,
            Some((LostPeer, 98)),
            None,
            "rank 1 failed earlier, but by what it says it lost another rank",
            "rank 1: lost another rank: exit code 76, 2.0 ms before",
        ),
        (
            OwnError,
            Some((OwnCode, 98)),
            None,
            "rank 1 ended earlier with an own code, but told of no error",
            "rank 1: exit code 3, 2.0 ms before",
        ),
        (
            OwnError,
            Some((Stopped, 103)),
            None,
            "it announced its failure before any other rank ended",
            "rank 1: stopped by the launcher: signal 15 (SIGTERM), 3.0 ms after",
        ),
        (
            OwnError,
            Some((Succeeded, 98)),
            None,
            "no other rank failed before it",
            "rank 1: succeeded, 2.0 ms before",
        ),
        (
            OwnCode,
            Some((LostPeer, 98)),
            None,
            "rank 1 failed earlier, but by what it says it lost another rank",
            "rank 1: lost another rank: exit code 76, 2.0 ms before",
        ),
        (
            LostPeer,
            Some((LostPeer, 101)),
            None,
            "its end came first in the kernel's order",
            "rank 1: lost another rank: exit code 76, 1.0 ms after",
        ),
        (
            LostPeer,
            Some((Stopped, 99)),
            None,
            "no other rank failed before it",
            "rank 1: stopped by the launcher: signal 15 (SIGTERM), 1.0 ms before",
        ),
        (
            Origin,
            Some((Stuck, 0)),
            None,
            "its end came first in the kernel's order",
            "rank 1: did not end after SIGKILL, state unknown",
        ),
        // On another node the clocks tell, or do not.
        (
            Origin,
            None,
            Some((Stopped, 103)),
            "its end came first",
            "rank 1 on n2: stopped by the launcher: signal 15 (SIGTERM), 3.0 ms after",
        ),
        (
            Origin,
            None,
            Some((Stopped, 99)),
            "no other rank failed before it",
            "rank 1 on n2: stopped by the launcher: signal 15 (SIGTERM), within 1.0 ms of it, {clocks}",
        ),
        (
            Origin,
            None,
            Some((Stopped, 90)),
            "no other rank failed before it",
            "rank 1 on n2: stopped by the launcher: signal 15 (SIGTERM), 10.0 ms before",
        ),
        (
            Origin,
            None,
            Some((Succeeded, 93)),
            "no other rank failed before it",
            "rank 1 on n2: succeeded, 7.0 ms before",
        ),
        (
            Origin,
            None,
            Some((LostPeer, 90)),
            "rank 1 on n2 failed earlier, but by what it says it lost another rank",
            "rank 1 on n2: lost another rank: exit code 76, 10.0 ms before",
        ),
        (
            Origin,
            None,
            Some((LostPeer, 101)),
            "rank 1 on n2 failed at about the same time, but by what it says it lost another rank",
            "rank 1 on n2: lost another rank: exit code 76, within 1.0 ms of it, {clocks}",
        ),
        (
            Origin,
            None,
            Some((OwnError, 90)),
            "rank 1 on n2 told of an own error earlier, but while it was being stopped",
            "rank 1 on n2: had an error of its own: exit code 1, 10.0 ms before",
        ),
        (
            Origin,
            None,
            Some((OwnCode, 101)),
            "rank 1 on n2 ended at about the same time with an own code, but while it was being stopped",
            "rank 1 on n2: exit code 3, within 1.0 ms of it, {clocks}",
        ),
        (
            Origin,
            None,
            Some((Origin, 101)),
            "no other rank is known to have failed before it; rank 1 on n2 ended within 1.0 ms of it, {clocks}",
            "rank 1 on n2: signal 9 (SIGKILL), within 1.0 ms of it, {clocks}",
        ),
        (
            Origin,
            None,
            Some((Origin, 110)),
            "its end came first",
            "rank 1 on n2: signal 9 (SIGKILL), 10.0 ms after",
        ),
        (
            LostPeer,
            None,
            Some((Stopped, 99)),
            "no other rank failed before it",
            "rank 1 on n2: stopped by the launcher: signal 15 (SIGTERM), within 1.0 ms of it, {clocks}",
        ),
        // It was heard at 900 ms, but how its rank ended is not known.
        (
            Origin,
            None,
            Some((NodeLost, 0)),
            "no other rank is known to have failed before it",
            "rank 1 on n2: on a node that was lost; its end is not known",
        ),
    ];
    for (named, beside, elsewhere, reason, line) in cases {
        let first: Vec<(Role, u64)> = std::iter::once((named, 100)).chain(beside).collect();
        let second: Vec<(Role, u64)> = elsewhere.into_iter().collect();
        let nodes = [first.as_slice(), second.as_slice()];
        let nodes = &nodes[..1 + usize::from(elsewhere.is_some())];
        let fill = |text: &str| text.replace("{clocks}", clocks);
        assert_eq!(told(nodes), (fill(reason), fill(line)), "{nodes:?}");
    }
}

#[test]
fn several_others_are_counted_and_ranges_go_up() {
    use Role::{LostPeer, Origin, Stopped};
    // Ranks that are silent and were stopped are not said to have lost anybody.
    let (reason, lines) = told(&[&[(Origin, 100)], &[(Stopped, 99)], &[(Stopped, 98)]]);
    assert_eq!(reason, "no other rank failed before it");
    assert_eq!(
        lines,
        "ranks 1-2 on 2 hosts: stopped by the launcher: signal 15 (SIGTERM), within 2.0 ms of it, less than the clocks tell"
    );
    let (reason, lines) = told(&[&[(Origin, 100)], &[(LostPeer, 91), (LostPeer, 95)]]);
    assert_eq!(
        reason,
        "rank 1 on n2 and 1 more failed earlier, but by what they say they lost another rank"
    );
    assert_eq!(
        lines,
        "ranks 1-2 on n2: lost another rank: exit code 76, 5.0 to 9.0 ms before"
    );
    let (_, lines) = told(&[&[(Origin, 100)], &[(Stopped, 91), (Stopped, 109)]]);
    assert_eq!(
        lines,
        "ranks 1-2 on n2: stopped by the launcher: signal 15 (SIGTERM), 9.0 ms before to 9.0 ms after"
    );
}

/// A dying process closes its socket first: that is the moment of its failure, and the others are told by it.
#[test]
fn what_ended_between_the_first_sign_and_the_end_is_after_it() {
    let first = Rank {
        first_at: MS * 100,
        ended_at: MS * 400,
        order: 1,
        ..in_role(Role::Origin)
    };
    let other = Rank {
        first_at: MS * 200,
        ended_at: MS * 200,
        order: 2,
        ..in_role(Role::LostPeer)
    };
    let ranks = [first, other];
    let fault = fault(&ranks, |_| String::new()).unwrap();
    let end = |(number, rank): (usize, _)| Seen {
        number,
        rank,
        at: MS,
    };
    let ends = [NodeEnds {
        host: "n1",
        ranks: ranks.iter().enumerate().map(end).collect(),
        uncertainty: Duration::ZERO,
        lost: None,
    }];
    assert_eq!(fault.reason, "its end came first in the kernel's order");
    assert_eq!(
        lines(&ends, &fault, &[ranks.to_vec()], &[]),
        "rank 1: lost another rank: exit code 76, 100.0 ms after"
    );
}
