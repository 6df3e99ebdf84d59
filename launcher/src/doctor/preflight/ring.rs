//! A sum over the members of a group by a ring of TCP connections, as data parallel training needs it.
//!
//! Member i sends to member i + 1 and hears from member i - 1. The numbers are integers that wrap around: their
//! sum is the same in any order, and no wrong bit gets lost in rounding. Every member compares it with what it must be.

use anyhow::{Context, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::{GPU_WAIT, Scale};
use crate::addresses::listen_on_all;
use crate::limits;
use crate::median::median;

/// Laps of a byte whose quickest is the round trip.
const LAPS: u32 = 16;
pub(super) const LEFT: &str = "a neighbour left";
pub(super) const LATE: &str = "not done within";
/// The neighbours are found within this time, or half of what there is.
const MEET: Duration = Duration::from_secs(10);
/// A stranger who connects and says nothing is sent away.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a member does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// Where each member's [`Ring`] listens.
    pub members: Vec<SocketAddr>,
    /// Place of this node among them.
    pub me: usize,
    /// Summed up in each round; equal on all members.
    pub bytes: usize,
    /// No new round is begun after this time; the first member's counts.
    pub budget: Duration,
    /// All must be done by then.
    pub wait: Duration,
    /// What measures it in the place of a ring, see [`super::GpuTask`].
    #[serde(default)]
    pub trainer: Option<PathBuf>,
}

impl Task {
    pub fn new(members: Vec<SocketAddr>, me: usize, scale: &Scale) -> Task {
        Task {
            members,
            me,
            bytes: scale.bytes,
            budget: scale.budget,
            wait: match scale.trainer {
                Some(_) => GPU_WAIT,
                None => scale.wait,
            },
            trainer: scale.trainer.clone(),
        }
    }
}

/// What a member saw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Of the median round.
    pub seconds: f64,
    /// What this member sent (and received) in it; of one TCP connection.
    pub gbit_s: f64,
    /// Zero where it was not measured.
    pub round_trip: Duration,
    /// How the sum differs from what it must be.
    pub wrong: Option<String>,
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} Gbit/s", self.gbit_s)?;
        if self.round_trip.is_zero() {
            return Ok(());
        }
        let micros = self.round_trip.as_secs_f64() * 1e6;
        write!(f, ", round trip {micros:.0} µs")
    }
}

/// A place in a ring that is not closed yet.
pub struct Ring {
    listener: StdListener,
    pub port: u16,
}

impl Ring {
    /// Listens on all addresses of this node.
    ///
    /// # Errors
    /// When no port is free.
    pub fn open() -> std::io::Result<Ring> {
        let listener = listen_on_all()?;
        let port = listener.local_addr()?.port();
        Ok(Ring { listener, port })
    }

    /// Joins the ring on a thread of its own, which ends by itself after `task.wait`, or when the receiver is
    /// dropped. `prove` answers a nonce; only neighbours that answer alike are let in.
    pub fn start(
        self,
        task: Task,
        prove: impl Fn([u8; 16]) -> [u8; 32] + Send + 'static,
    ) -> oneshot::Receiver<Result<Measured, String>> {
        let (mut done, result) = oneshot::channel();
        let started = limits::thread("ring", "measures the network", move || {
            let run = || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                runtime.block_on(async {
                    tokio::select! {
                        result = timeout(task.wait, run(self.listener, &task, &prove)) => match result {
                            Ok(result) => result,
                            Err(_) => bail!("{LATE} {:?}", task.wait),
                        },
                        () = done.closed() => bail!("nobody waits for it"),
                    }
                })
            };
            let result = run().map_err(|e: anyhow::Error| format!("{e:#}"));
            done.send(result)
        });
        started.map_or_else(|e| failed(e.message), |_| result)
    }
}

/// A measurement that cannot begin.
pub(super) fn failed<T>(why: String) -> oneshot::Receiver<Result<T, String>> {
    let (done, result) = oneshot::channel();
    let _ = done.send(Err(why));
    result
}

/// Whether this error of a member tells no more than that another one has failed.
pub fn is_consequence(error: &str) -> bool {
    error.starts_with(LEFT) || error.starts_with(LATE)
}

async fn run(
    listener: StdListener,
    task: &Task,
    prove: &impl Fn([u8; 16]) -> [u8; 32],
) -> anyhow::Result<Measured> {
    let num = task.members.len();
    ensure!(
        num >= 2 && task.me < num,
        "member {} of {num} is no ring",
        task.me
    );
    let next = task.members[(task.me + 1) % num];
    let listener = TcpListener::from_std(listener)?;
    let meet = MEET.min(task.wait / 2);
    let (to, from) = tokio::try_join!(
        async {
            let dialled = timeout(meet, dial(next, prove)).await;
            let late = || Err(anyhow!("no answer within {meet:?}"));
            let dialled = dialled.unwrap_or_else(|_| late());
            dialled.with_context(|| format!("cannot connect to {next}"))
        },
        async {
            // A little longer: who cannot connect knows more.
            let accepted = timeout(meet * 5 / 4, accept(&listener, prove)).await;
            accepted.unwrap_or_else(|_| bail!("{LEFT}: it did not connect"))
        },
    )?;
    let mut ring = Links {
        num,
        me: task.me,
        to,
        from,
    };
    let round_trip = ring.round_trip().await.context(LEFT)?;
    let numbers = (task.bytes / 4).next_multiple_of(num).max(num);
    let (mut data, mut wrong, mut seconds) = (vec![0; 4 * numbers], None, Vec::new());
    let start = Instant::now();
    for round in 0u32.. {
        // The first round warms up, the second always counts.
        let wanted = round < 2 || start.elapsed() < task.budget;
        if !ring.agree(wanted).await.context(LEFT)? {
            break;
        }
        for (i, number) in data.chunks_exact_mut(4).enumerate() {
            number.copy_from_slice(&value(task.me, i, round).to_le_bytes());
        }
        // All have their data: only the network is measured.
        ring.agree(true).await.context(LEFT)?;
        let begun = Instant::now();
        ring.sum(&mut data).await.context(LEFT)?;
        if round > 0 {
            seconds.push(begun.elapsed().as_secs_f64());
        }
        wrong = wrong.or_else(|| compare(&data, num, round));
    }
    let median = median(&mut seconds).context("no round was measured")?;
    let sent = 4 * numbers / num * 2 * (num - 1);
    Ok(Measured {
        seconds: median,
        gbit_s: sent as f64 * 8e-9 / median,
        round_trip,
        wrong,
    })
}

/// Number `i` of a member; all its bits vary.
fn value(member: usize, i: usize, round: u32) -> u32 {
    let mixed = (i as u32)
        .wrapping_add((member as u32) << 27)
        .wrapping_add(round << 20)
        .wrapping_mul(0x9e37_79b1);
    mixed ^ mixed >> 15
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn compare(data: &[u8], num: usize, round: u32) -> Option<String> {
    let expected = |i| {
        (0..num).fold(0u32, |sum, member| {
            sum.wrapping_add(value(member, i, round))
        })
    };
    let sums = data.chunks_exact(4).map(number);
    let mut bad = sums.enumerate().filter(|(i, sum)| *sum != expected(*i));
    let (i, sum) = bad.next()?;
    let (all_bad, right, all) = (1 + bad.count(), expected(i), data.len() / 4);
    Some(format!(
        "{all_bad} of {all} sums are wrong; number {i} is {sum:#010x}, not {right:#010x}"
    ))
}

/// The connections to both neighbours.
struct Links {
    num: usize,
    me: usize,
    to: TcpStream,
    from: TcpStream,
}

impl Links {
    /// Sends a byte around and returns it; the first member's counts. When it returns, all members have got this far.
    async fn lap(&mut self, byte: u8) -> std::io::Result<u8> {
        if self.me == 0 {
            self.to.write_u8(byte).await?;
            self.from.read_u8().await
        } else {
            let byte = self.from.read_u8().await?;
            self.to.write_u8(byte).await.map(|()| byte)
        }
    }

    async fn agree(&mut self, go_on: bool) -> std::io::Result<bool> {
        // Of the first lap a member only knows that those before it are there.
        self.lap(0).await?;
        Ok(self.lap(go_on.into()).await? != 0)
    }

    /// To a neighbour and back.
    async fn round_trip(&mut self) -> std::io::Result<Duration> {
        let mut quickest = Duration::MAX;
        for _ in 0..LAPS {
            let start = Instant::now();
            self.lap(0).await?;
            quickest = quickest.min(start.elapsed());
        }
        Ok(quickest * 2 / self.num as u32)
    }

    /// Adds up the numbers of all members: each part travels around once and grows, then once more, complete.
    async fn sum(&mut self, data: &mut [u8]) -> std::io::Result<()> {
        let (num, me) = (self.num, self.me);
        let part = data.len() / num;
        let range = |i: usize| -> Range<usize> { i % num * part..(i % num + 1) * part };
        let mut incoming = vec![0; part];
        for step in 0..num - 1 {
            let (out, into) = (range(me + num - step), range(me + num - step - 1));
            tokio::try_join!(
                self.to.write_all(&data[out]),
                self.from.read_exact(&mut incoming)
            )?;
            for (sum, more) in data[into].chunks_exact_mut(4).zip(incoming.chunks_exact(4)) {
                let total = number(sum).wrapping_add(number(more));
                sum.copy_from_slice(&total.to_le_bytes());
            }
        }
        for step in 0..num - 1 {
            let (out, into) = (range(me + num + 1 - step), range(me + num - step));
            tokio::try_join!(
                self.to.write_all(&data[out]),
                self.from.read_exact(&mut incoming)
            )?;
            data[into].copy_from_slice(&incoming);
        }
        Ok(())
    }
}

/// Who dialled and who accepted make different nonces, so that neither answers with what the other would say.
fn nonce(dialled: bool) -> anyhow::Result<[u8; 16]> {
    let mut nonce = [0; 16];
    let filled = rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())?;
    ensure!(filled == nonce.len(), "no random numbers");
    nonce[0] = nonce[0] & !1 | u8::from(dialled);
    Ok(nonce)
}

async fn dial(
    next: SocketAddr,
    prove: &impl Fn([u8; 16]) -> [u8; 32],
) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(next).await?;
    stream.set_nodelay(true)?;
    let own = nonce(true)?;
    stream.write_all(&own).await?;
    let (mut theirs, mut proof) = ([0; 16], [0; 32]);
    stream.read_exact(&mut theirs).await?;
    stream.read_exact(&mut proof).await?;
    ensure!(
        proof == prove(own) && theirs[0] & 1 == 0,
        "it does not belong to this job"
    );
    stream.write_all(&prove(theirs)).await?;
    Ok(stream)
}

async fn accept(
    listener: &TcpListener,
    prove: &impl Fn([u8; 16]) -> [u8; 32],
) -> anyhow::Result<TcpStream> {
    loop {
        let (mut stream, _) = listener
            .accept()
            .await
            .context("cannot accept a neighbour")?;
        let greet = async {
            stream.set_nodelay(true)?;
            let mut theirs = [0; 16];
            stream.read_exact(&mut theirs).await?;
            ensure!(theirs[0] & 1 == 1, "not a member");
            let own = nonce(false)?;
            stream.write_all(&own).await?;
            stream.write_all(&prove(theirs)).await?;
            let mut proof = [0; 32];
            stream.read_exact(&mut proof).await?;
            ensure!(proof == prove(own), "it does not belong to this job");
            anyhow::Ok(())
        };
        // A stranger is no reason to fail.
        if let Ok(Ok(())) = timeout(PATIENCE, greet).await {
            return Ok(stream);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::scene::{self, Net};
    use std::net::IpAddr;
    use std::sync::mpsc::{Receiver, Sender, channel};

    #[test]
    fn one_wrong_bit_is_found() {
        let sums = |i| (0..3).fold(0u32, |sum, member| sum.wrapping_add(value(member, i, 5)));
        let mut data: Vec<u8> = (0..100).flat_map(|i| sums(i).to_le_bytes()).collect();
        assert_eq!(compare(&data, 3, 5), None);
        assert!(
            compare(&data, 3, 6).is_some(),
            "another round has other numbers"
        );
        data[4 * 42] ^= 1;
        let text = compare(&data, 3, 5).unwrap();
        assert!(
            text.starts_with("1 of 100 sums are wrong; number 42 is "),
            "{text}"
        );
    }

    #[test]
    fn a_measurement_that_nobody_waits_for_ends() {
        let rings = [Ring::open().unwrap(), Ring::open().unwrap()];
        let at = |ring: &Ring| SocketAddr::from(([127, 0, 0, 1], ring.port));
        let members: Vec<SocketAddr> = rings.iter().map(at).collect();
        let scale = "1048576,60s,120s".parse().unwrap();
        let [first, second] = rings;
        let prove = |nonce: [u8; 16]| [nonce[3]; 32];
        drop(first.start(Task::new(members.clone(), 0, &scale), prove));
        let other = second.start(Task::new(members, 1, &scale), prove);
        let error = other.blocking_recv().unwrap().unwrap_err();
        assert!(!error.contains(LATE), "{error}");
    }

    /// Two nodes and one cable: the address chosen is the one that is measured.
    #[test]
    fn two_nodes_over_a_cable() {
        let members = ["10.0.1.1", "10.0.1.2"].map(|a| a.parse().unwrap());
        let wire = |a: &Net, b: &Net| {
            a.cable("a1", b, "b1");
            for (net, own, name) in [(a, 1, "a1"), (b, 2, "b1")] {
                net.ip(&format!("addr add 10.0.1.{own}/24 dev {name}"));
                net.ip(&format!("link set {name} up"));
            }
        };
        // Each node tells the other its port, as the coordinator would.
        let ((tell_a, hear_a), (tell_b, hear_b)) = (channel(), channel());
        let node = |me: usize, tell: Sender<u16>, hear: Receiver<u16>| {
            move || {
                let ring = Ring::open().unwrap();
                tell.send(ring.port).unwrap();
                let mut ports = [ring.port, hear.recv().unwrap()];
                ports.rotate_right(me);
                let at = |(ip, port): (IpAddr, u16)| SocketAddr::new(ip, port);
                let members = members.into_iter().zip(ports).map(at).collect();
                let scale = "1048576,10ms,30s".parse().unwrap();
                let task = Task::new(members, me, &scale);
                ring.start(task, |nonce| [nonce[3]; 32])
                    .blocking_recv()
                    .unwrap()
            }
        };
        let Some((a, b)) = scene::two_nodes(wire, node(0, tell_a, hear_b), node(1, tell_b, hear_a))
        else {
            return;
        };
        for measured in [a.unwrap(), b.unwrap()] {
            assert_eq!(measured.wrong, None);
            assert!(measured.gbit_s > 0.0);
        }
    }
}
