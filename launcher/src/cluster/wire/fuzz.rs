//! What a stranger, a thief on the line, and a mad peer can send.

use std::io::Cursor;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use super::connection::Receiver;
use super::frame::{Opener, Sealer};
use super::handshake::{NOT_BOUND, Role, shake};
use crate::cluster::key::{self, Key};
use crate::cluster::message::{FromAgent, ToAgent};

const SESSION: [u8; 32] = [7; 32];

/// Runs what `bytes` ask for, the first of which says what the others are.
///
/// # Panics
/// When the transport lets something through that nobody sent: a bug of it.
pub fn fuzz_one(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else {
        return;
    };
    match kind % 5 {
        0 => stranger(rest),
        1 => thief(rest),
        2 => tamper(rest),
        3 => mad_peer(rest),
        _ => {
            let _ = key::parse(rest);
        }
    }
}

/// Somebody without the key says `bytes`.
fn stranger(bytes: &[u8]) {
    let key = Key::random();
    for role in [Role::Coordinator, Role::Agent] {
        let mut stream = tokio::io::join(bytes, tokio::io::sink());
        let shaken = now(pin!(shake(&mut stream, &key, role, &NOT_BOUND)));
        assert!(shaken.is_err(), "a stranger was let in");
    }
}

/// Somebody without the key says `bytes` on a connection of others.
fn thief(bytes: &[u8]) {
    let mut receiver = receiver(bytes.to_vec(), Role::Agent);
    let received = now(pin!(receiver.recv::<serde_json::Value>()));
    assert!(received.is_err(), "a forged frame was let in");
}

/// Frames of somebody with the key are changed on the way: the first byte says how many there are, and
/// every three of the others do something to one of them.
fn tamper(bytes: &[u8]) {
    let Some((&number, edits)) = bytes.split_first() else {
        return;
    };
    let number = u64::from(number % 8);
    let mut sealer = Sealer::new(&SESSION, Role::Agent);
    let frame = |i: u64| {
        let mut frame = Vec::new();
        let sealed = sealer.seal(i.to_string().as_bytes(), &mut frame);
        assert!(sealed.is_ok(), "a short message was refused");
        frame
    };
    let honest: Vec<Vec<u8>> = (0..number).map(frame).collect();
    let mut sent = honest.clone();
    for edit in edits.as_chunks::<3>().0 {
        let [what, which, how] = edit.map(usize::from);
        if sent.is_empty() {
            break;
        }
        let which = which % sent.len();
        match what % 5 {
            0 => {
                let other = how % sent.len();
                sent.swap(which, other);
            }
            1 => sent.push(sent[which].clone()),
            2 => drop(sent.remove(which)),
            3 => sent[which].truncate(how),
            _ => {
                let at = how / 8 % sent[which].len().max(1);
                if let Some(byte) = sent[which].get_mut(at) {
                    *byte ^= 1 << (how % 8);
                }
            }
        }
        if sent.len() > 64 {
            break;
        }
    }
    let same = honest.iter().zip(&sent).take_while(|(a, b)| a == b).count();

    let mut receiver = receiver(sent.concat(), Role::Agent);
    let mut received = 0;
    while let Ok(message) = now(pin!(receiver.recv::<u64>())) {
        assert_eq!(message, Some(received), "a message came out of its place");
        received += 1;
    }
    assert!(
        received >= same as u64 && received <= number,
        "{same} frames are as they were, {received} were received"
    );
}

/// Somebody with the key says something strange.
fn mad_peer(body: &[u8]) {
    if body.is_empty() {
        return;
    }
    let mut frame = Vec::new();
    if Sealer::new(&SESSION, Role::Agent)
        .seal(body, &mut frame)
        .is_ok()
    {
        let mut from_agent = receiver(frame.clone(), Role::Agent);
        let _ = now(pin!(from_agent.recv::<FromAgent>()));
        let mut to_agent = receiver(frame, Role::Agent);
        let _ = now(pin!(to_agent.recv::<ToAgent>()));
        assert_eq!((from_agent.frames(), to_agent.frames()), (1, 1));
    }
}

fn receiver(bytes: Vec<u8>, from: Role) -> Receiver {
    let opener = Opener::new(&SESSION, from);
    Receiver::new("the fuzzer", opener, Box::new(Cursor::new(bytes)))
}

/// The result of a future that waits for nothing.
fn now<F: Future>(future: Pin<&mut F>) -> F::Output {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => unreachable!("memory is always ready"),
    }
}
