use super::connection::Receiver;
use super::frame::{OVERHEAD, Opened, Opener, Sealer};
use super::handshake::{HELLO_LEN, PROOF_LEN, shake};
use super::*;
use crate::cluster::message::{Beat, FromAgent, ToAgent};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf, duplex};

const LONG: Duration = Duration::from_secs(60);

/// Both ends of a connection in memory.
async fn pair(key: &Key) -> (Connection, Connection) {
    let (ours, theirs) = duplex(1 << 16);
    let (ours, theirs) = tokio::join!(
        authenticate(Role::Coordinator, ours, "the agent", key, LONG),
        authenticate(Role::Agent, theirs, "the coordinator", key, LONG)
    );
    (ours.unwrap(), theirs.unwrap())
}

/// What a coordinator says to somebody who says `bytes` and then waits.
async fn refused(bytes: &[u8]) -> Refusal {
    let (ours, mut theirs) = duplex(1 << 16);
    theirs.write_all(bytes).await.unwrap();
    let result = authenticate(
        Role::Coordinator,
        ours,
        "10.0.0.3:4711",
        &Key::random(),
        PROOF_DEADLINE,
    )
    .await;
    result.err().expect("a refusal")
}

fn hello_of_version(version: u32) -> Vec<u8> {
    [&b"tsm-wire"[..], &version.to_be_bytes(), &[9; 32]].concat()
}

#[tokio::test]
async fn messages_go_both_ways_in_order_and_end_with_a_good_bye() {
    let (mut coordinator, mut agent) = pair(&Key::random()).await;
    for i in 0..100_u32 {
        agent.sender.send(&("beat", i)).await.unwrap();
        coordinator.sender.send(&("ack", i)).await.unwrap();
    }
    agent.sender.close().await.unwrap();
    for i in 0..100 {
        let beat: Option<(String, u32)> = coordinator.receiver.recv().await.unwrap();
        assert_eq!(beat, Some(("beat".into(), i)));
        let ack: Option<(String, u32)> = agent.receiver.recv().await.unwrap();
        assert_eq!(ack, Some(("ack".into(), i)));
    }
    for _ in 0..3 {
        let end: Option<u32> = coordinator.receiver.recv().await.unwrap();
        assert_eq!(end, None);
    }
}

#[tokio::test]
async fn an_end_without_a_good_bye_is_an_error() {
    let (mut coordinator, mut agent) = pair(&Key::random()).await;
    coordinator.receiver.name_peer("gpu-03");
    agent.sender.send(&1).await.unwrap();
    drop(agent);
    assert_eq!(coordinator.receiver.recv().await.unwrap(), Some(1));
    let error = coordinator.receiver.recv::<u32>().await.unwrap_err();
    assert!(matches!(error.fault, Fault::Cut));
    assert_eq!(error.to_string(), "gpu-03 broke off the connection");
    assert!(coordinator.sender.send(&1).await.is_err());
}

#[tokio::test]
async fn both_sides_hear_of_a_wrong_key() {
    let (ours, theirs) = duplex(1 << 16);
    let (mine, other) = (Key::random(), Key::random());
    let (coordinator, agent) = tokio::join!(
        authenticate(Role::Coordinator, ours, "10.0.0.3:4711", &mine, LONG),
        authenticate(Role::Agent, theirs, "node-0:29400", &other, LONG)
    );
    let (coordinator, agent) = (coordinator.err().unwrap(), agent.err().unwrap());
    assert!(matches!(coordinator.why, Why::WrongKey));
    assert!(matches!(agent.why, Why::WrongKey));
    let text = "node-0:29400 does not have this job's key\n  hint: give every agent the key of its coordinator";
    assert_eq!(agent.to_string(), text);
    assert_eq!(Coded::from(agent).code, exit::PREFLIGHT);
}

#[tokio::test]
async fn both_sides_hear_of_another_version() {
    // One that says more in its hello than this one.
    let theirs = [hello_of_version(7), vec![1; 20]].concat();
    let refusal = refused(&theirs).await;
    assert!(matches!(refusal.why, Why::Version { theirs: 7 }));
    let text = "10.0.0.3:4711 speaks version 7 of the protocol, this tsm-launch speaks version 1\n  \
                hint: use the same tsm-launch on all nodes";
    assert_eq!(refusal.to_string(), text);

    let (ours, mut theirs) = duplex(1 << 16);
    theirs.write_all(&hello_of_version(0)).await.unwrap();
    let refusal = authenticate(Role::Coordinator, ours, "it", &Key::random(), LONG)
        .await
        .err();
    assert!(matches!(refusal.unwrap().why, Why::Version { theirs: 0 }));
    let mut heard = Vec::new();
    theirs.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard.len(), HELLO_LEN);
    assert_eq!(heard[..12], hello_of_version(VERSION)[..12]);
}

#[tokio::test(start_paused = true)]
async fn other_protocols_are_named_at_once() {
    let others: [(&[u8], &str); 7] = [
        (
            b"GET / HTTP/1.0\r\n\r\n",
            r#"it sent "GET / HTTP/1.0\r\n\r\n", which is HTTP"#,
        ),
        (
            b"HTTP/1.1 400 Bad Request\r\n",
            r#"it sent "HTTP/1.1 400 Bad Request\r\n", which is HTTP"#,
        ),
        (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            "it sent \"\\x16\\x03\\x01\\x02\\x00\\x01\\x00\\x01\\xfc\\x03\\x03\", which is TLS\n  \
             hint: give the TLS files to all nodes, or to none",
        ),
        (
            b"SSH-2.0-OpenSSH_9.2\r\n",
            r#"it sent "SSH-2.0-OpenSSH_9.2\r\n", which is ssh"#,
        ),
        (b"Welcome to gpu-03!\n", r#"it sent "Welcome to gpu-03!\n""#),
        (b"\0", r#"it sent "\x00""#),
        (b"tsm-wirf", r#"it sent "tsm-wirf""#),
    ];
    for (bytes, problem) in others {
        let refusal = refused(bytes).await;
        assert!(matches!(refusal.why, Why::NotOurs(_)), "{refusal}");
        let text = format!("10.0.0.3:4711 does not speak tsm-launch's protocol: {problem}");
        assert_eq!(refusal.to_string(), text);
    }
}

/// Lets `left` bytes be read, of the other side or of nobody.
struct CutOff {
    inner: DuplexStream,
    left: usize,
}

impl AsyncRead for CutOff {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut part = buf.take(self.left);
        if self.left == 0 {
            return Poll::Ready(Ok(()));
        }
        let read = Pin::new(&mut self.inner).poll_read(cx, &mut part);
        let n = part.filled().len();
        self.left -= n;
        // What `part` filled is initialized memory of `buf`.
        let filled = part.filled().to_vec();
        if n > 0 {
            buf.put_slice(&filled);
        }
        read
    }
}

impl AsyncWrite for CutOff {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_connection_may_be_cut_at_every_byte() {
    let key = Key::random();
    let frames = [OVERHEAD + 1, OVERHEAD + 3, OVERHEAD];
    let total = HELLO_LEN + PROOF_LEN + frames.iter().sum::<usize>();
    for left in 0..=total {
        let (ours, theirs) = duplex(1 << 16);
        let (coordinator, agent) = tokio::join!(
            authenticate(
                Role::Coordinator,
                CutOff { inner: ours, left },
                "it",
                &key,
                LONG
            ),
            authenticate(Role::Agent, theirs, "it", &key, LONG)
        );
        let Some(mut left) = left.checked_sub(HELLO_LEN + PROOF_LEN) else {
            let refusal = coordinator.err().unwrap();
            assert!(matches!(refusal.why, Why::Closed), "{left}: {refusal}");
            continue;
        };
        let (mut receiver, mut sender) = (coordinator.unwrap().receiver, agent.unwrap().sender);
        sender.send(&1).await.unwrap();
        sender.send(&234).await.unwrap();
        sender.close().await.unwrap();
        for (frame, message) in frames.into_iter().zip([Some(1), Some(234), None]) {
            if left < frame {
                let error = receiver.recv::<u32>().await.unwrap_err();
                assert!(matches!(error.fault, Fault::Cut), "{error}");
                break;
            }
            assert_eq!(receiver.recv::<u32>().await.unwrap(), message);
            left -= frame;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_slow_is_sent_away_in_time() {
    let start = tokio::time::Instant::now();
    let refusal = refused(&hello_of_version(VERSION)).await;
    assert!(
        matches!(refusal.why, Why::TooSlow(PROOF_DEADLINE)),
        "{refusal}"
    );
    assert_eq!(start.elapsed(), PROOF_DEADLINE);
    let text = "10.0.0.3:4711 did not prove within 2s that it has the key";
    assert_eq!(refusal.to_string(), text);

    // A byte now and then does not help.
    let (ours, mut theirs) = duplex(1 << 16);
    let drip = tokio::spawn(async move {
        for byte in hello_of_version(VERSION).into_iter().chain([0; 200]) {
            if theirs.write_all(&[byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
    });
    let start = tokio::time::Instant::now();
    let refusal = authenticate(
        Role::Coordinator,
        ours,
        "it",
        &Key::random(),
        PROOF_DEADLINE,
    )
    .await;
    assert!(matches!(refusal.err().unwrap().why, Why::TooSlow(_)));
    assert_eq!(start.elapsed(), PROOF_DEADLINE);
    drip.await.unwrap();
}

#[tokio::test]
async fn little_is_read_of_a_stranger() {
    let (ours, mut theirs) = duplex(1 << 16);
    let said = [hello_of_version(VERSION), vec![0; 1 << 15]].concat();
    theirs.write_all(&said).await.unwrap();
    let mut ours = ours;
    let shaken = shake(&mut ours, &Key::random(), Role::Coordinator, &NOT_BOUND).await;
    assert!(matches!(shaken.err().unwrap(), Why::WrongKey));
    drop(theirs);
    let mut unread = Vec::new();
    ours.read_to_end(&mut unread).await.unwrap();
    assert_eq!(said.len() - unread.len(), HELLO_LEN + PROOF_LEN);
}

#[tokio::test]
async fn an_echo_proves_nothing() {
    for role in [Role::Coordinator, Role::Agent] {
        let (mut ours, theirs) = duplex(1 << 16);
        let (mut read, mut write) = tokio::io::split(theirs);
        let echo = tokio::spawn(async move { tokio::io::copy(&mut read, &mut write).await });
        let shaken = shake(&mut ours, &Key::random(), role, &NOT_BOUND).await;
        assert!(matches!(shaken.err().unwrap(), Why::WrongKey));
        drop(ours);
        let _ = echo.await;
    }
}

#[tokio::test]
async fn a_proof_is_of_use_in_its_own_channel_only() {
    let key = Key::random();
    let (mut ours, mut theirs) = duplex(1 << 16);
    let (coordinator, agent) = tokio::join!(
        shake(&mut ours, &key, Role::Coordinator, &[1; 32]),
        shake(&mut theirs, &key, Role::Agent, &[2; 32])
    );
    assert!(matches!(coordinator.err().unwrap(), Why::WrongKey));
    assert!(matches!(agent.err().unwrap(), Why::WrongKey));
}

#[tokio::test]
async fn two_agents_do_not_join_each_other() {
    let key = Key::random();
    let (a, b) = duplex(1 << 16);
    let (a, b) = tokio::join!(
        authenticate(Role::Agent, a, "b", &key, LONG),
        authenticate(Role::Agent, b, "a", &key, LONG)
    );
    assert!(matches!(a.err().unwrap().why, Why::WrongKey));
    assert!(matches!(b.err().unwrap().why, Why::WrongKey));
}

/// Frames of an agent, and who can read them.
fn frames(bodies: &[&[u8]]) -> (Vec<Vec<u8>>, Opener) {
    let mut sealer = Sealer::new(&[5; 32], Role::Agent);
    let seal = |body: &&[u8]| {
        let mut frame = Vec::new();
        sealer.seal(body, &mut frame).unwrap();
        frame
    };
    let frames = bodies.iter().map(seal).collect();
    (frames, Opener::new(&[5; 32], Role::Agent))
}

fn is_forged(opened: Result<Opened, Fault>, number: u64) -> bool {
    matches!(opened, Err(Fault::Forged { frame }) if frame == number)
}

#[test]
fn every_changed_bit_is_noticed() {
    let (frames, mut opener) = frames(&[b"\"stop\""]);
    let frame = &frames[0];
    for bit in 0..8 * frame.len() {
        let mut changed = frame.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        match opener.open(&changed) {
            // A longer length asks for more; a code over other bytes does not fit.
            Ok(Opened::Missing(_)) => assert!(bit < 32),
            Err(Fault::TooLong { .. }) => assert!(bit < 32),
            Err(Fault::Forged { frame: 0 }) => {}
            other => panic!("bit {bit}: {other:?}"),
        }
    }
    assert_eq!(opener.open(frame).unwrap(), Opened::Body(b"\"stop\""));
}

#[test]
fn a_frame_counts_once_and_in_its_place() {
    let (frames, mut opener) = frames(&[b"1", b"2", b"3"]);
    assert!(is_forged(opener.open(&frames[1]), 0), "reordered");
    assert_eq!(opener.open(&frames[0]).unwrap(), Opened::Body(b"1"));
    assert!(is_forged(opener.open(&frames[0]), 1), "replayed");
    assert!(is_forged(opener.open(&frames[2]), 1), "one left out");
    assert_eq!(opener.open(&frames[1]).unwrap(), Opened::Body(b"2"));
    let mut reflected = Opener::new(&[5; 32], Role::Coordinator);
    assert!(is_forged(reflected.open(&frames[0]), 0), "reflected");
    let mut elsewhere = Opener::new(&[6; 32], Role::Agent);
    assert!(
        is_forged(elsewhere.open(&frames[0]), 0),
        "of another connection"
    );
    let injected = [&1_u32.to_be_bytes()[..], b"1", &[0; 16]].concat();
    assert!(is_forged(opener.open(&injected), 2), "injected");
}

#[tokio::test]
async fn a_recorded_connection_cannot_be_played_again() {
    // The same key, and everything that the agent once said.
    let key = Key::random();
    let (mut ours, theirs) = duplex(1 << 16);
    let (mut tap, tapped) = duplex(1 << 16);
    let relay = tokio::spawn(async move {
        let mut heard = Vec::new();
        let (mut from, mut to) = tokio::io::split(tapped);
        let (mut from_ours, mut to_ours) = tokio::io::split(theirs);
        let back = async { tokio::io::copy(&mut from_ours, &mut to).await };
        let forth = async {
            let mut buffer = [0; 256];
            while let Ok(n @ 1..) = from.read(&mut buffer).await {
                heard.extend_from_slice(&buffer[..n]);
                if to_ours.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
            }
        };
        let _ = tokio::join!(back, forth);
        heard
    });
    let (coordinator, agent) = tokio::join!(
        shake(&mut ours, &key, Role::Coordinator, &NOT_BOUND),
        shake(&mut tap, &key, Role::Agent, &NOT_BOUND)
    );
    assert!(coordinator.is_ok() && agent.is_ok());
    drop((ours, tap));
    let heard = relay.await.unwrap();
    assert_eq!(heard.len(), HELLO_LEN + PROOF_LEN);

    let (again, mut theirs) = duplex(1 << 16);
    theirs.write_all(&heard).await.unwrap();
    let refusal = authenticate(Role::Coordinator, again, "it", &key, LONG)
        .await
        .err()
        .unwrap();
    assert!(matches!(refusal.why, Why::WrongKey));
}

#[tokio::test]
async fn a_length_is_refused_before_memory_is_given() {
    for (from, max) in [
        (Role::Agent, MAX_FROM_AGENT),
        (Role::Coordinator, MAX_TO_AGENT),
    ] {
        let mut opener = Opener::new(&[5; 32], from);
        let header = |len: usize| (len as u32).to_be_bytes();
        assert_eq!(
            opener.open(&header(max)).unwrap(),
            Opened::Missing(max + OVERHEAD - 4)
        );
        for len in [max + 1, u32::MAX as usize] {
            let error = opener.open(&header(len)).unwrap_err();
            assert!(matches!(error, Fault::TooLong { len: l, max: m } if (l, m) == (len, max)));
        }

        let claim = [&header(max)[..], &[0; 10]].concat();
        let mut receiver = Receiver::new("it", opener, Box::new(io::Cursor::new(claim)));
        assert!(receiver.recv::<u32>().await.is_err());
        assert!(receiver.capacity() <= 1 << 17, "{}", receiver.capacity());
    }
}

#[tokio::test]
async fn a_message_that_is_too_long_is_not_sent_and_the_next_one_is() {
    let (mut coordinator, mut agent) = pair(&Key::random()).await;
    // Two quotes are a part of it.
    let longest = "x".repeat(MAX_FROM_AGENT - 2);
    let error = agent.sender.send(&format!("{longest}x")).await.unwrap_err();
    assert!(matches!(error.fault, Fault::TooLong { .. }));
    let text = "the coordinator and this side exchange messages of up to 1048576 bytes, this one has 1048577";
    assert_eq!(error.to_string(), text);

    let (sent, received) = tokio::join!(
        agent.sender.send(&longest),
        coordinator.receiver.recv::<String>()
    );
    sent.unwrap();
    assert_eq!(received.unwrap().unwrap(), longest);
    // The memory goes back, as thousands of agents may send a long message once.
    agent.sender.send(&1).await.unwrap();
    assert_eq!(coordinator.receiver.recv().await.unwrap(), Some(1));
    assert!(coordinator.receiver.capacity() <= 1 << 17);
}

#[tokio::test]
async fn a_message_that_is_not_known_names_who_sent_it() {
    let (mut coordinator, mut agent) = pair(&Key::random()).await;
    coordinator.receiver.name_peer("gpu-03 (10.0.0.3)");
    let unknown = serde_json::json!({"kind": "dance", "text": "x".repeat(200)});
    agent.sender.send(&unknown).await.unwrap();
    agent.sender.send(&7).await.unwrap();
    let received = coordinator.receiver.recv::<FromAgent>();
    let error = received.await.unwrap_err().to_string();
    let start = "gpu-03 (10.0.0.3) sent a message that this tsm-launch does not know: unknown variant `dance`";
    assert!(error.starts_with(start), "{error}");
    assert!(error.ends_with("xxx...\"") && error.len() < 1000, "{error}");
    assert_eq!(coordinator.receiver.recv().await.unwrap(), Some(7));
}

#[tokio::test(start_paused = true)]
async fn a_receive_that_is_given_up_loses_nothing() {
    let key = Key::random();
    let (ours, theirs) = duplex(1 << 16);
    let (slow, mut tap) = duplex(1 << 16);
    let (coordinator, agent) = tokio::join!(
        authenticate(Role::Coordinator, ours, "it", &key, LONG),
        authenticate(Role::Agent, theirs, "it", &key, LONG)
    );
    let (mut receiver, mut sender) = (coordinator.unwrap().receiver, agent.unwrap().sender);
    // The frames arrive byte by byte through another stream.
    for i in 0..20_u32 {
        sender.queue(&i).unwrap();
    }
    let bytes = sender.queued().to_vec();
    receiver.read_from(Box::new(slow));
    let drip = tokio::spawn(async move {
        for byte in bytes {
            tap.write_all(&[byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    });
    let (mut received, mut given_up) = (0, 0);
    while received < 20 {
        tokio::select! {
            biased;
            () = tokio::time::sleep(Duration::from_millis(1)) => given_up += 1,
            message = receiver.recv::<u32>() => {
                assert_eq!(message.unwrap(), Some(received));
                received += 1;
            }
        }
    }
    assert!(given_up > 200, "{given_up}");
    drip.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_send_that_is_given_up_loses_nothing() {
    let key = Key::random();
    let (ours, theirs) = duplex(HELLO_LEN + PROOF_LEN);
    let (coordinator, agent) = tokio::join!(
        authenticate(Role::Coordinator, ours, "it", &key, LONG),
        authenticate(Role::Agent, theirs, "it", &key, LONG)
    );
    let (mut receiver, mut sender) = (coordinator.unwrap().receiver, agent.unwrap().sender);
    let text = "y".repeat(1000);
    for i in 0..5 {
        let sent = timeout(Duration::from_millis(1), sender.send(&(i, &text))).await;
        assert!(sent.is_err(), "there is no room for it");
    }
    let last = (5, &text);
    let (sent, ()) = tokio::join!(sender.send(&last), async {
        for i in 0..6 {
            let message: Option<(u32, String)> = receiver.recv().await.unwrap();
            assert_eq!(message, Some((i, text.clone())));
        }
    });
    sent.unwrap();
}

#[tokio::test]
async fn thousands_join_at_once() {
    let key = Key::random();
    let mut tasks = JoinSet::new();
    for i in 0..4096_u32 {
        let key = key.clone();
        tasks.spawn(async move {
            let (mut coordinator, mut agent) = pair(&key).await;
            agent.sender.send(&i).await.unwrap();
            assert_eq!(coordinator.receiver.recv().await.unwrap(), Some(i));
        });
    }
    assert_eq!(tasks.join_all().await.len(), 4096);
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

#[tokio::test]
async fn a_thousand_agents_dial_at_once() {
    const NUM_AGENTS: usize = 1024;
    if let Err(limit) = crate::limits::allow_open_files(2 * NUM_AGENTS as u64 + 500) {
        return eprintln!("skipped: the hard limit of open files is {limit}");
    }
    let key = Key::random();
    let listener = listen(loopback()).unwrap();
    let address = listener.local_addr().unwrap();
    let (arrive, mut arrivals) = mpsc::channel(16);
    let server = tokio::spawn(serve(listener, key.clone(), None, arrive));
    let start = std::time::Instant::now();
    let mut agents = JoinSet::new();
    for i in 0..NUM_AGENTS {
        let key = key.clone();
        agents.spawn(async move {
            let (host, port) = (address.ip().to_string(), address.port());
            loop {
                // On a busy machine some have to dial again, as agents do.
                let Ok(mut agent) = dial(&host, port, &key, None, LONG).await else {
                    // It may have failed without a wait, and the others need this thread.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    continue;
                };
                if agent.sender.send(&i).await.is_err() {
                    continue;
                }
                let told: Result<Option<usize>, _> = agent.receiver.recv().await;
                if let Ok(told) = told {
                    return assert_eq!(told, Some(i + 1));
                }
            }
        });
    }
    let (mut joined, mut late) = (BTreeMap::new(), 0);
    while joined.len() < NUM_AGENTS {
        let arrival = timeout(LONG, arrivals.recv()).await.expect("agents come");
        let mut connection = match arrival.unwrap() {
            Ok(connection) => connection,
            Err(refusal) => {
                assert!(matches!(refusal.why, Why::TooSlow(_)), "{refusal}");
                late += 1;
                continue;
            }
        };
        let Ok(Some(i)) = connection.receiver.recv::<usize>().await else {
            late += 1;
            continue;
        };
        if connection.sender.send(&(i + 1)).await.is_ok() {
            joined.insert(i, connection);
        }
    }
    agents.join_all().await;
    eprintln!("{NUM_AGENTS} agents: {:?}, {late} late", start.elapsed());
    assert!(joined.keys().copied().eq(0..NUM_AGENTS));
    drop(arrivals);
    server.await.unwrap();
}

#[tokio::test]
async fn only_so_many_may_be_unproven() {
    let key = Key::random();
    let listener = listen(loopback()).unwrap();
    let address = listener.local_addr().unwrap();
    let (arrive, mut arrivals) = mpsc::channel(16);
    let server = tokio::spawn(serve_at_most(1, listener, key.clone(), None, arrive));
    let silent = TcpStream::connect(address).await.unwrap();
    // Only once this one is in hand is the next one made.
    silent.readable().await.unwrap();
    let agent = TcpStream::connect(address).await.unwrap();
    let agent =
        tokio::spawn(async move { authenticate(Role::Agent, agent, "it", &key, LONG).await });
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    // The first is sent away already where the machine stood still for so long.
    let first = arrivals.try_recv().ok();
    assert!(
        first.as_ref().is_none_or(Result::is_err),
        "the second was not to be looked at"
    );
    drop(silent);
    if first.is_none() {
        assert!(arrivals.recv().await.unwrap().is_err());
    }
    assert!(arrivals.recv().await.unwrap().is_ok());
    agent.await.unwrap().unwrap();
    drop(arrivals);
    server.await.unwrap();
}

#[tokio::test]
async fn an_address_that_cannot_be_used_is_named() {
    let listener = listen(loopback()).unwrap();
    let taken = listener.local_addr().unwrap();
    let error = listen(taken).unwrap_err();
    assert_eq!(error.code, exit::PREFLIGHT);
    let start = format!("cannot listen for agents at {taken}: ");
    assert!(error.message.starts_with(&start), "{error}");
    assert!(error.message.contains("\n  hint: "), "{error}");

    // Nobody listens there, nor can.
    let held = crate::port::Port::reserve().unwrap();
    let refusal = dial("127.0.0.1", held.number, &Key::random(), None, LONG).await;
    let refusal = refusal.err().unwrap();
    assert!(matches!(refusal.why, Why::Unreachable(_)), "{refusal}");
    let start = format!("127.0.0.1:{} cannot be reached: ", held.number);
    assert!(refusal.to_string().starts_with(&start), "{refusal}");
}

#[test]
fn a_probe_is_answered_for_one_node_and_nonce() {
    let (key, nonce) = (Key::random(), [3; 16]);
    let answer = prove(&key, nonce, 5);
    assert!(is_proof(&key, nonce, 5, &answer));
    assert!(!is_proof(&key, nonce, 6, &answer));
    assert!(!is_proof(&key, [4; 16], 5, &answer));
    assert!(!is_proof(&Key::random(), nonce, 5, &answer));
    assert!(!is_proof(&key, nonce, 5, &answer[..31]));
    assert!(!is_proof(&key, nonce, 5, &[]));
}

proptest! {
    #[test]
    fn nothing_arbitrary_gets_through(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        fuzz_one(&bytes);
    }

    /// A good beginning lets more of the arbitrary bytes be looked at.
    #[test]
    fn nothing_arbitrary_behind_a_hello_gets_through(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        fuzz_one(&[&[0][..], &hello_of_version(VERSION), &bytes].concat());
    }

    /// From somebody who has the key, so that the messages themselves are parsed.
    #[test]
    fn no_message_ends_the_program(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let beat = FromAgent::Beat(Beat { metrics: vec![("loss".into(), 0.5)], ..Beat::default() });
        let exit = ToAgent::Exit { code: 1, message: Some("x".into()) };
        for message in [serde_json::to_vec(&beat).unwrap(), serde_json::to_vec(&exit).unwrap()] {
            let mut said = message;
            for (at, byte) in &edits {
                let at = at.index(said.len());
                said[at] = *byte;
            }
            said.insert(0, 3);
            fuzz_one(&said);
        }
    }

    #[test]
    fn nothing_changed_on_the_way_gets_through(
        number in 1..8_u8,
        edits in proptest::collection::vec(any::<[u8; 3]>(), 0..8),
    ) {
        fuzz_one(&[&[2, number][..], &edits.concat()].concat());
    }

    #[test]
    fn memory_follows_what_arrives(
        len in any::<u32>(),
        bytes in proptest::collection::vec(any::<u8>(), 0..3000),
    ) {
        let said = [&len.to_be_bytes()[..], &bytes].concat();
        let opener = Opener::new(&[5; 32], Role::Coordinator);
        let mut receiver = Receiver::new("it", opener, Box::new(io::Cursor::new(said)));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        prop_assert!(runtime.block_on(receiver.recv::<u32>()).is_err());
        prop_assert!(receiver.capacity() <= 1 << 17);
    }
}
