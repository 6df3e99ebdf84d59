//! Deaths and messages of the workers, in the order in which they happened.
//!
//! One epoll instance holds every pidfd and every agent socket. The kernel appends a
//! descriptor to epoll's ready list at the moment it becomes ready, and reads the list from its
//! head, so even when the launcher was kept off the CPU while several ranks died, one look
//! gives them in the order of their deaths. No clock of ours could.
//!
//! A descriptor that is ready already keeps its place in the list: one with a message that nobody has read would be
//! taken to have ended when that came. Each socket is therefore there twice, once for messages and once for its end.
//! And one that is added late comes last, whenever it got ready: a worker becomes the program only when it is watched.

use anyhow::Context;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::time::Timespec;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tsm_job::message::WorkerMessage;

use crate::end::End;
use crate::process::Worker;

/// A worker that writes a longer line than this does not speak our language.
const MAX_LINE: usize = 1 << 20;
/// Bytes of one worker that are read before the others have their turn: more than a socket holds, so that all is read
/// of one that has died, and a bound for one that writes without end.
const TURN: usize = 1 << 20;

/// Something a worker did.
#[derive(Debug)]
pub enum Happening {
    Ended(End),
    Said(WorkerMessage),
    /// Nobody holds its agent socket any more. Whether it was ending when that was seen: a program may also close
    /// descriptors that it does not know, or the last to hold it was a child.
    Left {
        is_exiting: bool,
    },
}

/// All workers of this node.
pub struct Watch {
    epoll: AsyncFd<OwnedFd>,
    agents: Vec<Agent>,
    /// Workers whose end was told.
    ended: Vec<bool>,
}

/// What a descriptor in epoll is there for: the last bits of its token, before them the local rank.
const ENDED: u64 = 0;
const SAID: u64 = 1;
const LEFT: u64 = 2;
const KIND_BITS: u32 = 2;

struct Agent {
    stream: Option<UnixStream>,
    /// The same socket, in epoll for its end alone.
    end: Option<OwnedFd>,
    pending: Vec<u8>,
    /// There is more to read, of which epoll tells no second time.
    has_more: bool,
}

impl Agent {
    fn new(stream: UnixStream, end: OwnedFd) -> Agent {
        Agent {
            stream: Some(stream),
            end: Some(end),
            pending: Vec::new(),
            has_more: false,
        }
    }
}

impl Watch {
    /// Call inside the tokio runtime, before any worker is started.
    ///
    /// # Errors
    /// When the kernel refuses an epoll instance.
    #[expect(
        unsafe_code,
        reason = "tokio cannot know that the descriptor stays open"
    )]
    pub fn new() -> anyhow::Result<Watch> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).context("cannot watch workers")?;
        // SAFETY: an OwnedFd always returns the same descriptor, and AsyncFd owns it until both are dropped.
        let epoll = unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE) };
        Ok(Watch {
            epoll: epoll.context("cannot watch workers")?,
            agents: Vec::new(),
            ended: Vec::new(),
        })
    }

    /// Adds the agent socket of the next local rank, before its worker is started.
    ///
    /// # Errors
    /// When the kernel's limit of watches is reached.
    pub fn add_agent(&mut self, agent: UnixStream) -> anyhow::Result<()> {
        const CANNOT: &str = "cannot watch a worker";
        agent.set_nonblocking(true).context(CANNOT)?;
        let end = OwnedFd::from(agent.try_clone().context(CANNOT)?);
        let epoll = self.epoll.get_ref();
        let token = |kind| EventData::new_u64((self.agents.len() as u64) << KIND_BITS | kind);
        epoll::add(epoll, &agent, token(SAID), EventFlags::IN | EventFlags::ET).context(CANNOT)?;
        epoll::add(epoll, &end, token(LEFT), EventFlags::RDHUP | EventFlags::ET).context(CANNOT)?;
        self.agents.push(Agent::new(agent, end));
        self.ended.push(false);
        Ok(())
    }

    /// Adds the worker whose agent socket was added last, and lets it go on to its program.
    ///
    /// # Errors
    /// As [`Self::add_agent`].
    pub fn add_worker(&mut self, worker: &Worker) -> anyhow::Result<()> {
        let token = EventData::new_u64((self.agents.len() as u64 - 1) << KIND_BITS | ENDED);
        // A pidfd stays readable after the death. But it must not fire once only: the end of a process that dies under
        // a debugger can be waited for only when the debugger has let go of it, which is an edge of its own.
        epoll::add(
            self.epoll.get_ref(),
            worker,
            token,
            EventFlags::IN | EventFlags::ET,
        )
        .context("cannot watch a worker")?;
        // One that has died does not hear it, and is reported like any other.
        if let Some(mut stream) = self.agents.last().and_then(|agent| agent.stream.as_ref()) {
            let _ = stream.write_all(b"!");
        }
        Ok(())
    }

    /// Waits until something happened; then all of it, in order, by local rank.
    ///
    /// # Errors
    /// When epoll fails, which it does not.
    pub async fn next(&mut self, workers: &[Worker]) -> anyhow::Result<Vec<(usize, Happening)>> {
        loop {
            let mut more = self.unread();
            if more.is_empty() {
                let mut ready = self.epoll.readable().await?;
                more = poll(self.epoll.get_ref().as_fd())?;
                if more.is_empty() {
                    ready.clear_ready();
                    continue;
                }
            } else {
                // Whoever else waits on this thread comes first.
                tokio::task::yield_now().await;
                // What has happened since comes behind: the rest was said before.
                more.extend(poll(self.epoll.get_ref().as_fd())?);
            }
            let mut happenings = Vec::new();
            for event in more {
                let (index, kind) = ((event >> KIND_BITS) as usize, event % (1 << KIND_BITS));
                // What a worker said, it said before it died, whatever is read first.
                let agent = &mut self.agents[index];
                agent.drain(|message| happenings.push((index, Happening::Said(message))));
                if kind == LEFT && agent.end.take().is_some() {
                    let is_exiting = workers.get(index).is_some_and(Worker::is_exiting);
                    happenings.push((index, Happening::Left { is_exiting }));
                }
                if kind == ENDED
                    && !self.ended[index]
                    && let Some(end) = workers[index].end()
                {
                    self.ended[index] = true;
                    happenings.push((index, Happening::Ended(end)));
                }
            }
            return Ok(happenings);
        }
    }

    /// Tokens of the agent sockets that were not read to the end.
    fn unread(&self) -> Vec<u64> {
        let agents = self.agents.iter().zip(0u64..);
        let unread = agents.filter(|(agent, _)| agent.has_more);
        unread.map(|(_, index)| index << KIND_BITS | SAID).collect()
    }
}

/// Up to 256 ready descriptors, without waiting.
fn poll(epoll: impl AsFd) -> anyhow::Result<Vec<u64>> {
    let mut events = Vec::with_capacity(256);
    let none = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::io::retry_on_intr(|| epoll::wait(&epoll, spare_capacity(&mut events), Some(&none)))
        .context("cannot watch workers: epoll_wait failed")?;
    Ok(events.iter().map(|event| event.data.u64()).collect())
}

impl Agent {
    /// Hands on every complete line that can be read as a message. Others are left out: a program may
    /// have put the descriptor to a use of its own.
    fn drain(&mut self, mut each: impl FnMut(WorkerMessage)) {
        self.has_more = false;
        let Some(stream) = &mut self.stream else {
            return;
        };
        let mut buffer = [0u8; 16 << 10];
        let mut left = TURN;
        loop {
            self.has_more = left == 0;
            if self.has_more {
                return;
            }
            match stream.read(&mut buffer) {
                Ok(n) if n > 0 && self.pending.len() + n <= MAX_LINE => {
                    left = left.saturating_sub(n);
                    self.pending.extend_from_slice(&buffer[..n]);
                    let Some(end) = self.pending.iter().rposition(|&b| b == b'\n') else {
                        continue;
                    };
                    self.pending[..end]
                        .split(|&b| b == b'\n')
                        .filter_map(|line| serde_json::from_slice(line).ok())
                        .for_each(&mut each);
                    self.pending.drain(..=end);
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                Ok(0) => {
                    self.stream = None;
                    return;
                }
                _ => {
                    // So that it is told, and does not wait for a reader.
                    (self.stream, self.end) = (None, None);
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tsm_job::message::FailureRecord;

    fn agent() -> (Agent, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let end = ours.try_clone().unwrap().into();
        (Agent::new(ours, end), theirs)
    }

    fn read(agent: &mut Agent) -> Vec<WorkerMessage> {
        let mut messages = Vec::new();
        agent.drain(|m| messages.push(m));
        messages
    }

    #[test]
    fn messages_arrive_whole_whatever_the_pieces() {
        let (mut agent, mut worker) = agent();
        let failure = WorkerMessage::Failure(FailureRecord {
            rank: 1,
            step: Some(7),
            code: 1,
            cause: "panic".into(),
            message: "boom".into(),
            backtrace: None,
        });
        let line = serde_json::to_string(&failure).unwrap();
        worker
            .write_all(b"{\"kind\":\"step\",\"step\":6,\"epoch\":0}\nnot json\n")
            .unwrap();
        worker.write_all(&line.as_bytes()[..10]).unwrap();
        assert_eq!(
            read(&mut agent),
            [WorkerMessage::Step {
                step: 6,
                epoch: 0,
                work_ms: None
            }]
        );
        worker.write_all(&line.as_bytes()[10..]).unwrap();
        assert!(read(&mut agent).is_empty());
        worker.write_all(b"\n").unwrap();
        drop(worker);
        assert_eq!(read(&mut agent), [failure]);
        assert!(agent.stream.is_none());
    }

    #[test]
    fn an_endless_line_is_given_up() {
        let (mut agent, mut worker) = agent();
        let chunk = [b'x'; 64 << 10];
        for _ in 0..32 {
            if agent.stream.is_none() {
                break;
            }
            worker.write_all(&chunk).unwrap();
            read(&mut agent);
        }
        assert!(agent.stream.is_none());
        assert!(worker.write_all(&chunk).is_err(), "it is told");
    }

    /// A message that nobody has read yet does not make an end earlier, nor the other way round.
    #[tokio::test]
    async fn the_ends_are_in_order_whatever_was_said_before() {
        let mut watch = Watch::new().unwrap();
        let mut workers = Vec::new();
        for _ in 0..8 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            watch.add_agent(ours).unwrap();
            workers.push(Some(theirs));
        }
        let step = b"{\"kind\":\"step\",\"step\":6,\"epoch\":0}\n";
        for worker in workers.iter_mut().flatten() {
            worker.write_all(step).unwrap();
        }
        let order = [5, 2, 7, 0, 1, 6, 4, 3];
        for rank in order {
            let mut worker = workers[rank].take().unwrap();
            worker.write_all(step).unwrap();
        }
        let happenings = watch.next(&[]).await.unwrap();
        let left = happenings
            .iter()
            .filter_map(|(rank, happening)| match happening {
                Happening::Left { .. } => Some(*rank),
                _ => None,
            });
        assert_eq!(left.collect::<Vec<_>>(), order);
        for rank in 0..8 {
            let of_rank: Vec<_> = happenings.iter().filter(|(r, _)| *r == rank).collect();
            let [
                (_, Happening::Said(_)),
                (_, Happening::Said(_)),
                (_, Happening::Left { .. }),
            ] = of_rank[..]
            else {
                panic!("{of_rank:?}");
            };
        }
    }

    #[test]
    fn one_that_writes_without_end_leaves_the_others_their_turn() {
        let (mut agent, mut worker) = agent();
        let line = b"{\"kind\":\"section\",\"name\":\"x\"}\n".repeat(2000);
        let writer = std::thread::spawn(move || while worker.write_all(&line).is_ok() {});
        let mut num_lines = 0;
        while !agent.has_more {
            num_lines += read(&mut agent).len();
        }
        assert!(num_lines > 1000);
        // Neither epoll nor anybody else would tell again.
        assert!(agent.stream.is_some() && !read(&mut agent).is_empty());
        drop(agent);
        writer.join().unwrap();
    }

    /// What the order of events rests on: descriptors are read in the order in which they became ready.
    #[test]
    fn epoll_reports_in_the_order_of_readiness() {
        let epoll = epoll::create(CreateFlags::CLOEXEC).unwrap();
        let pairs: Vec<_> = (0..64).map(|_| UnixStream::pair().unwrap()).collect();
        for (i, (ours, _)) in pairs.iter().enumerate() {
            epoll::add(
                &epoll,
                ours,
                EventData::new_u64(i as u64),
                EventFlags::IN | EventFlags::ONESHOT,
            )
            .unwrap();
        }
        let order: Vec<u64> = (0..64).map(|i| (i * 37 + 11) % 64).collect();
        for &i in &order {
            (&pairs[i as usize].1).write_all(b"x").unwrap();
        }
        assert_eq!(poll(&epoll).unwrap(), order);
    }
}
