use super::*;
use crate::cluster::coordinator::tests::{join_of, place_of};
use crate::cluster::message::NodeReport;
use crate::oom::OomKills;
use crate::supervisor::Rank;
use std::time::Duration;
use tokio::io::duplex;

const LONG: Duration = Duration::from_secs(60);

/// A connection to `hub` that has proven itself, from this address.
async fn connection(hub: &Hub, peer: &str) -> Connection {
    let (ours, theirs) = duplex(1 << 16);
    let key = Key::random();
    let (ours, theirs) = tokio::join!(
        wire::authenticate(wire::Role::Coordinator, ours, peer, &key, LONG),
        wire::authenticate(wire::Role::Agent, theirs, "the coordinator", &key, LONG)
    );
    hub.door().enter(ours).await;
    theirs.unwrap()
}

fn join() -> FromAgent {
    FromAgent::Join(Box::new(join_of("gpu-03", 1)))
}

/// How the next node is lost.
async fn loss(hub: &mut Hub) -> String {
    loop {
        match hub.next().await {
            Heard::Lost { how, .. } => return how,
            Heard::Said { .. } => {}
            Heard::Refused(refusal) => panic!("{refusal}"),
        }
    }
}

#[tokio::test]
async fn a_loss_speaks_of_the_agent_and_its_address() {
    let mut hub = Hub::new();
    let mut agent = connection(&hub, "10.0.0.3:4711").await;
    agent.sender.send(&join()).await.unwrap();
    drop(agent);
    let how = loss(&mut hub).await;
    assert_eq!(how, "its agent at 10.0.0.3:4711 broke off the connection");
    assert!(hub.nodes.is_empty(), "nothing is kept of it");

    let mut agent = connection(&hub, "10.0.0.3:4712").await;
    agent.sender.send(&join()).await.unwrap();
    agent.sender.close().await.unwrap();
    assert_eq!(loss(&mut hub).await, "its agent left");

    let mut agent = connection(&hub, "10.0.0.3:4713").await;
    agent.sender.send(&join()).await.unwrap();
    agent.sender.send(&"dance").await.unwrap();
    let how = loss(&mut hub).await;
    let text = "its agent at 10.0.0.3:4713 sent a message that this tsm-launch does not know";
    assert!(how.starts_with(text), "{how}");
}

#[tokio::test]
async fn who_has_the_key_and_greets_in_another_language_is_refused_aloud() {
    let mut hub = Hub::new();
    let mut agent = connection(&hub, "10.0.0.3:4711").await;
    agent
        .sender
        .send(&serde_json::json!({"kind": "join"}))
        .await
        .unwrap();
    assert!(matches!(hub.next().await, Heard::Lost { .. }));
    let Heard::Refused(refusal) = hub.next().await else {
        panic!("it is refused");
    };
    assert_eq!(refusal.peer, "10.0.0.3:4711");
    let text = refusal.to_string();
    assert!(
        text.contains("a message that this tsm-launch does not know"),
        "{text}"
    );
    assert!(
        text.ends_with("hint: use the same tsm-launch on all nodes"),
        "{text}"
    );
}

/// 256 ranks with 64 KiB of last words each.
#[tokio::test]
async fn a_report_that_no_frame_holds_does_not_lose_the_node() {
    let mut hub = Hub::new();
    let agent = connection(&hub, "10.0.0.3:4711").await;
    let link = Link::over(agent);
    let mut place = place_of("gpu-03");
    place.stderr = vec!["x".repeat(1 << 10); 64];
    let report = NodeReport {
        ranks: vec![(Rank::default(), place); 256],
        started_at: Duration::ZERO,
        oom_kills: OomKills::default(),
        xids: Vec::new(),
        warnings: Vec::new(),
        missing: None,
    };
    let report = Box::new(report);
    let generation = 7;
    link.to.send(FromAgent::Clean { generation, report });
    link.to.send(FromAgent::Signal { signal: 2 });
    let mut ranks = 0;
    loop {
        match hub.next().await {
            Heard::Said { message, .. } => match message {
                FromAgent::Ranks { ranks: part, .. } => ranks += part.len(),
                FromAgent::Clean { report, .. } => ranks += report.ranks.len(),
                FromAgent::Signal { .. } => break,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(ranks, 256);
}

#[tokio::test]
async fn a_message_to_a_node_that_no_frame_holds_loses_it_with_the_reason() {
    let mut hub = Hub::new();
    let mut agent = connection(&hub, "10.0.0.3:4711").await;
    agent.sender.send(&join()).await.unwrap();
    let Heard::Said { node, .. } = hub.next().await else {
        panic!("it joins");
    };
    let message = Some("x".repeat(wire::MAX_TO_AGENT));
    hub.send(node, ToAgent::Exit { code: 0, message });
    let how = loss(&mut hub).await;
    assert!(
        how.contains("exchange messages of up to 16777216 bytes"),
        "{how}"
    );
}

/// Who talks without end is read no faster than it is understood.
#[tokio::test]
async fn a_flood_waits_outside() {
    let hub = Hub::new();
    let mut hub = hub;
    let mut agent = connection(&hub, "10.0.0.3:4711").await;
    agent.sender.send(&join()).await.unwrap();
    hub.next().await;
    let text = "x".repeat(10_000);
    let notice = FromAgent::Notice { text };
    let flood = async {
        for _ in 0..10 * ARRIVALS {
            agent.sender.send(&notice).await.unwrap();
        }
    };
    let stopped = tokio::time::timeout(Duration::from_millis(500), flood).await;
    assert!(stopped.is_err(), "all of it was taken in");
    assert!(hub.remote.1.len() <= ARRIVALS);
}
