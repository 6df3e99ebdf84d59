//! Asks the NCCL of a running job what it knows of itself (RAS, NCCL 2.24 and newer).
//!
//! Every process of a job listens on `NCCL_RAS_ADDR` and answers for the whole job: which processes do not answer,
//! and how many operations each rank has launched in each communicator. Lines of text go both ways; the answer
//! to `STATUS` ends with the connection. Its text varies from release to release, so what is not understood
//! is left out of [`Status`], and the text itself is kept.

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// An answer is cut after so many bytes; one of 1,000 ranks as JSON is a third of it.
pub const MAX_BYTES: usize = 2 << 20;

/// Of an answer that is passed on.
const MAX_TEXT: usize = 64 << 10;
const MAX_MEMBERS: usize = 256;

/// How long one process may take to greet. Several listen on one port of a node, the kernel picks one, and that
/// may be the one that hangs: then another try is worth more than patience.
const GREETING: Duration = Duration::from_secs(1);
/// What NCCL adds to the timeout it is given, and the way there and back.
const EXTRA: Duration = Duration::from_secs(6);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// With the counts of every rank; NCCL before 2.28.7 answers in text all the same.
    Json,
}

/// Asks the process that listens on `address`, such as `localhost:28028`, and returns its answer. Waits, so call
/// it on a thread of its own; `patience` is for everything.
///
/// # Errors
/// When nobody answers there in time, or not as NCCL does.
pub fn ask(address: &str, format: Format, patience: Duration) -> anyhow::Result<String> {
    let deadline = Instant::now() + patience;
    let mut session = loop {
        match greet(address, deadline) {
            Ok(session) => break session,
            Err(e) if e.again && Instant::now() + GREETING < deadline => {}
            Err(e) => {
                return Err(e.error).with_context(|| format!("cannot ask NCCL at {address}"));
            }
        }
    };
    session
        .status(format, patience)
        .with_context(|| format!("no answer of NCCL at {address}"))
}

/// Why there is no connection, and whether another process on the same port may do better.
struct NotGreeted {
    again: bool,
    error: anyhow::Error,
}

fn greet(address: &str, deadline: Instant) -> Result<Session, NotGreeted> {
    let never = |error: anyhow::Error| NotGreeted {
        again: false,
        error,
    };
    let addresses: Vec<SocketAddr> = (address.to_socket_addrs())
        .context("not an address of the form host:port; see NCCL_RAS_ADDR")
        .map_err(never)?
        .collect();
    let patience = GREETING.min(left(deadline).map_err(never)?);
    let mut refused = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => {
                let mut session = Session {
                    stream,
                    pending: Vec::new(),
                    deadline: Instant::now() + patience,
                };
                let hello = session.command("CLIENT PROTOCOL 2");
                session.deadline = deadline;
                return match hello {
                    Ok(line) if line.starts_with("SERVER PROTOCOL") => Ok(session),
                    Ok(line) => Err(never(anyhow::anyhow!(
                        "{line:?} is not how NCCL greets: something else listens there"
                    ))),
                    Err(error) => Err(NotGreeted { again: true, error }),
                };
            }
            Err(e) => refused = Some(e),
        }
    }
    let refused = refused.map_or_else(|| anyhow::anyhow!("it has no address"), Into::into);
    Err(never(refused.context(
        "is it NCCL 2.24 or newer, and NCCL_RAS_ENABLE not 0?",
    )))
}

fn left(deadline: Instant) -> anyhow::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    ensure!(!left.is_zero(), "it takes too long");
    Ok(left)
}

/// An answer, read, and small enough to be passed on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub status: Status,
    /// In NCCL's words, at most 64 KiB; or why there is none.
    pub text: String,
}

impl Answer {
    pub fn new(text: &str) -> Answer {
        let mut status = parse(text);
        for communicator in &mut status.communicators {
            communicator.missing.truncate(MAX_MEMBERS);
            communicator.behind.truncate(MAX_MEMBERS);
        }
        status.silent.truncate(MAX_MEMBERS);
        status.communicators.truncate(MAX_MEMBERS);
        let text = &text.as_bytes()[..text.len().min(MAX_TEXT)];
        Answer {
            status,
            text: String::from_utf8_lossy(text).into_owned(),
        }
    }
}

/// As [`ask`] for [`Format::Json`]; an error becomes the text.
pub fn answer(address: &str, patience: Duration) -> Answer {
    match ask(address, Format::Json, patience) {
        Ok(text) => Answer::new(&text),
        Err(e) => Answer {
            text: format!("{e:#}"),
            ..Answer::default()
        },
    }
}

struct Session {
    stream: TcpStream,
    /// Read, but not yet used.
    pending: Vec<u8>,
    deadline: Instant,
}

impl Session {
    fn status(&mut self, format: Format, patience: Duration) -> anyhow::Result<String> {
        let seconds = patience.saturating_sub(EXTRA).as_secs().clamp(1, 5);
        // Neither is known to every version; the answer then says so, and is given all the same.
        self.command(&format!("TIMEOUT {seconds}"))?;
        if format == Format::Json {
            self.command("SET FORMAT json")?;
        }
        self.send("VERBOSE STATUS")?;
        while self.pending.len() < MAX_BYTES {
            match self.read() {
                Ok(0) => break,
                Ok(_) => {}
                // Half an answer is better than none.
                Err(_) if !self.pending.is_empty() => {
                    self.pending
                        .extend_from_slice(b"\n[the answer breaks off here]\n");
                    break;
                }
                Err(e) => return Err(e),
            }
        }
        if self.pending.len() >= MAX_BYTES {
            self.pending.truncate(MAX_BYTES);
            self.pending
                .extend_from_slice(b"\n[the answer is cut here]\n");
        }
        ensure!(!self.pending.is_empty(), "it closed the connection");
        Ok(String::from_utf8_lossy(&self.pending).into_owned())
    }

    fn send(&mut self, command: &str) -> anyhow::Result<()> {
        self.stream.set_write_timeout(Some(left(self.deadline)?))?;
        self.stream.write_all(format!("{command}\n").as_bytes())?;
        Ok(())
    }

    /// Sends a command and returns the line that answers it.
    fn command(&mut self, command: &str) -> anyhow::Result<String> {
        self.send(command)?;
        loop {
            if let Some(end) = self.pending.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim().to_string());
            }
            if self.pending.len() > 4096 || self.read()? == 0 {
                bail!("no line answers {command:?}");
            }
        }
    }

    fn read(&mut self) -> anyhow::Result<usize> {
        let mut buffer = [0u8; 16 << 10];
        self.stream.set_read_timeout(Some(left(self.deadline)?))?;
        match self.stream.read(&mut buffer) {
            Ok(n) => {
                self.pending.extend_from_slice(&buffer[..n]);
                Ok(n)
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => bail!("it takes too long"),
            Err(e) => Err(e.into()),
        }
    }
}

/// What an answer says is wrong. Empty: nothing that was understood.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of NCCL.
    pub nccl: Option<String>,
    /// How many communicators there are, these and those without faults; only JSON tells.
    pub num_communicators: Option<usize>,
    /// Processes that do not answer.
    pub silent: Vec<Member>,
    pub communicators: Vec<Communicator>,
}

/// A communicator about which there is something to say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Communicator {
    /// Its hash, as in NCCL's own log, in hexadecimal digits.
    pub hash: String,
    /// Number of ranks, where it is said.
    pub size: Option<u32>,
    /// No data from these.
    pub missing: Vec<Member>,
    /// These have launched fewer operations than others. While the job moves that is usual; in one that hangs the
    /// others wait for them.
    pub behind: Vec<Behind>,
}

/// A rank of a communicator, or a process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// In its communicator, which need not be the rank in the job.
    pub rank: Option<u32>,
    pub pid: Option<i32>,
    pub node: Option<String>,
    pub gpu: Option<String>,
    /// NCCL has given it up.
    pub dead: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Behind {
    pub member: Member,
    /// `AllReduce`; `None` before NCCL 2.26.
    pub operation: Option<String>,
    /// Operations launched.
    pub count: u64,
    /// By the foremost.
    pub most: u64,
}

/// Reads an answer, of either format.
pub fn parse(answer: &str) -> Status {
    match serde_json::from_str::<json::Answer>(answer.trim()) {
        Ok(answer) => answer.into_status(),
        Err(_) => text::parse(answer),
    }
}

impl Status {
    /// Ranks of the communicators of `world_size` ranks, in which ranks usually have the job's numbers, that
    /// do not answer; without any, those that are behind.
    pub fn suspects(&self, world_size: u32) -> Vec<u32> {
        let whole = || {
            let is_whole = move |c: &&Communicator| c.size == Some(world_size);
            self.communicators.iter().filter(is_whole)
        };
        let missing = whole()
            .flat_map(|c| c.missing.iter())
            .filter_map(|m| m.rank);
        let behind = whole()
            .flat_map(|c| c.behind.iter())
            .filter_map(|b| b.member.rank);
        let mut ranks: Vec<u32> = missing.collect();
        if ranks.is_empty() {
            ranks = behind.collect();
        }
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rank = self.rank.map(|r| format!("rank {r}"));
        let pid = self.pid.map(|p| format!("process {p}"));
        let node = self.node.as_ref().map(|n| format!("on {n}"));
        let gpu = self.gpu.as_ref().map(|g| format!("GPU {g}"));
        let place: Vec<String> = [pid, node, gpu].into_iter().flatten().collect();
        match (rank, place.is_empty()) {
            (Some(rank), true) => write!(f, "{rank}"),
            (Some(rank), false) => write!(f, "{rank} ({})", place.join(" ")),
            (None, _) => write!(f, "{}", place.join(" ")),
        }?;
        write!(f, "{}", if self.dead { ", given up as dead" } else { "" })
    }
}

impl fmt::Display for Status {
    /// A line for each fault, at most 8 members in each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST: usize = 8;
        let more = |n: usize| match n.saturating_sub(MOST) {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        let list = |members: &[Member]| {
            let shown: Vec<String> = members.iter().take(MOST).map(Member::to_string).collect();
            shown.join(", ") + &more(members.len())
        };
        if !self.silent.is_empty() {
            writeln!(f, "no answer from {}", list(&self.silent))?;
        }
        for communicator in &self.communicators {
            let name = match communicator.size {
                Some(size) => format!("communicator {} of {size} ranks", communicator.hash),
                None => format!("communicator {}", communicator.hash),
            };
            if !communicator.missing.is_empty() {
                writeln!(f, "{name}: no data from {}", list(&communicator.missing))?;
            }
            for behind in communicator.behind.iter().take(MOST) {
                let operation = behind.operation.as_deref().unwrap_or("operation");
                let (member, count, most) = (&behind.member, behind.count, behind.most);
                writeln!(
                    f,
                    "{name}: {member} has launched {operation} {count}, others {most}"
                )?;
            }
            if communicator.behind.len() > MOST {
                let rest = more(communicator.behind.len());
                writeln!(f, "{name}: {} that are behind", &rest[2..])?;
            }
        }
        Ok(())
    }
}

/// The ranks whose count is not the highest.
fn behind(operation: Option<&str>, counts: &[(Member, u64)]) -> Vec<Behind> {
    let most = counts.iter().map(|(_, count)| *count).max().unwrap_or(0);
    let late = counts.iter().filter(|(_, count)| *count < most);
    late.map(|(member, count)| Behind {
        member: member.clone(),
        operation: operation.map(str::to_string),
        count: *count,
        most,
    })
    .collect()
}

mod json {
    use super::{BTreeMap, Communicator, Deserialize, Member, Status, behind};

    #[derive(Deserialize)]
    pub struct Answer {
        nccl_version: Option<String>,
        communicators: Vec<Comm>,
    }

    #[derive(Deserialize)]
    struct Comm {
        hash: String,
        size: Option<u32>,
        #[serde(default)]
        ranks: Vec<Rank>,
        #[serde(default)]
        missing_ranks: Vec<Rank>,
    }

    #[derive(Deserialize)]
    struct Rank {
        rank: u32,
        host: Option<String>,
        pid: Option<i32>,
        cuda_dev: Option<i32>,
        #[serde(default)]
        status: State,
        #[serde(default)]
        collective_counts: BTreeMap<String, u64>,
    }

    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct State {
        unresponsive: bool,
        considered_dead: bool,
    }

    impl Rank {
        fn member(&self) -> Member {
            Member {
                rank: Some(self.rank),
                pid: self.pid,
                node: self.host.clone(),
                gpu: self.cuda_dev.map(|d| d.to_string()),
                dead: self.status.considered_dead,
            }
        }
    }

    impl Answer {
        pub fn into_status(self) -> Status {
            let mut silent: Vec<Member> = Vec::new();
            let mut communicators = Vec::new();
            for comm in &self.communicators {
                // A process that answers but is no member has not yet joined, or has left.
                let absent = |r: &&Rank| r.status.unresponsive || r.status.considered_dead;
                let missing: Vec<Member> =
                    (comm.missing_ranks.iter().filter(absent).map(Rank::member)).collect();
                for member in &missing {
                    if !silent
                        .iter()
                        .any(|s| (s.pid, &s.node) == (member.pid, &member.node))
                    {
                        silent.push(Member {
                            rank: None,
                            ..member.clone()
                        });
                    }
                }
                let mut counts: BTreeMap<&str, Vec<(Member, u64)>> = BTreeMap::new();
                for rank in &comm.ranks {
                    for (operation, count) in &rank.collective_counts {
                        counts
                            .entry(operation)
                            .or_default()
                            .push((rank.member(), *count));
                    }
                }
                let behind: Vec<_> = (counts.iter())
                    .flat_map(|(operation, counts)| behind(Some(operation), counts))
                    .collect();
                if !missing.is_empty() || !behind.is_empty() {
                    communicators.push(Communicator {
                        hash: comm.hash.trim_start_matches("0x").to_string(),
                        size: comm.size,
                        missing,
                        behind,
                    });
                }
            }
            Status {
                nccl: self.nccl_version,
                num_communicators: Some(self.communicators.len()),
                silent,
                communicators,
            }
        }
    }
}

mod text {
    use super::{Behind, Communicator, Member, Status};

    /// What the lines below a heading are about.
    #[derive(Clone, Copy, PartialEq)]
    enum Block {
        Other,
        /// `INCOMPLETE` or `DEAD`, of the job.
        Processes {
            dead: bool,
        },
        /// Of a communicator.
        Missing,
        Mismatch,
    }

    struct Reader {
        status: Status,
        block: Block,
        /// Size of the communicators of each group of the summary.
        sizes: Vec<(String, u32)>,
        /// `AllReduce`, and whether the counts of operations are being listed.
        operation: Option<String>,
        counts: bool,
        /// Of the ranks that follow.
        count: Option<u64>,
        most: u64,
    }

    pub fn parse(answer: &str) -> Status {
        let mut reader = Reader {
            status: Status::default(),
            block: Block::Other,
            sizes: Vec::new(),
            operation: None,
            counts: false,
            count: None,
            most: 0,
        };
        for line in answer.lines() {
            reader.line(line);
        }
        let mut status = reader.status;
        for communicator in &mut status.communicators {
            // Which count is the highest is known only at the end; those that have it are not behind.
            communicator.behind.retain(|b| b.count < b.most);
        }
        (status.communicators).retain(|c| !c.missing.is_empty() || !c.behind.is_empty());
        status
    }

    impl Reader {
        fn line(&mut self, line: &str) {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            if let Some(rest) = line.strip_prefix("NCCL version ") {
                self.status.nccl = rest.split_ascii_whitespace().next().map(str::to_string);
            } else if let Some(size) = self.summary(&words) {
                self.sizes.push(size);
            } else if !line.starts_with([' ', '\t']) && !words.is_empty() {
                self.heading(&words);
            } else {
                self.detail(line.trim(), &words);
            }
        }

        /// A row of the table of groups: its number, five numbers or ranges, its status and its errors.
        fn summary(&self, words: &[&str]) -> Option<(String, u32)> {
            let [group, comms, nodes, _, size, _, _, _] = words else {
                return None;
            };
            comms.parse::<u32>().ok().and(nodes.parse::<u32>().ok())?;
            Some((group.parse::<u32>().ok()?.to_string(), size.parse().ok()?))
        }

        fn heading(&mut self, words: &[&str]) {
            (self.operation, self.count, self.counts, self.most) = (None, None, false, 0);
            self.block = match words {
                ["INCOMPLETE"] => Block::Processes { dead: false },
                ["DEAD"] => Block::Processes { dead: true },
                [id, hash, kind @ ("INCOMPLETE" | "MISMATCH")] if id.starts_with('#') => {
                    let group = id[1..].split('-').next().unwrap_or_default();
                    let size = self.sizes.iter().find(|(g, _)| g == group).map(|g| g.1);
                    let hash = hash.trim_matches(['(', ')']).to_string();
                    let known = self.status.communicators.iter();
                    if known.clone().all(|c| c.hash != hash) {
                        self.status.communicators.push(Communicator {
                            hash: hash.clone(),
                            size,
                            ..Communicator::default()
                        });
                    }
                    // What follows is about the last.
                    let communicators = &mut self.status.communicators;
                    if let Some(at) = communicators.iter().position(|c| c.hash == hash) {
                        let last = communicators.len() - 1;
                        communicators.swap(at, last);
                    }
                    if *kind == "MISMATCH" {
                        Block::Mismatch
                    } else {
                        Block::Missing
                    }
                }
                _ => Block::Other,
            };
        }

        fn detail(&mut self, line: &str, words: &[&str]) {
            match (self.block, words) {
                (Block::Processes { dead }, ["Process", ..]) => {
                    let member = Member {
                        dead,
                        ..member(words)
                    };
                    self.status.silent.push(member);
                }
                (Block::Missing, ["Rank", _, "--", ..]) => {
                    self.missing([member(words)]);
                }
                // NCCL before 2.26: `The missing ranks: 3, 21`.
                (Block::Missing, ["The", "missing", "rank:" | "ranks:", ranks @ ..]) => {
                    let ranks = ranks
                        .iter()
                        .filter_map(|r| r.trim_matches(',').parse().ok());
                    let members = ranks.map(|rank| Member {
                        rank: Some(rank),
                        ..Member::default()
                    });
                    self.missing(members);
                }
                (Block::Mismatch, ["Communicator", "ranks", "have", "different", what @ ..]) => {
                    self.counts = what.ends_with(&["operation", "counts"]);
                    self.operation = match what {
                        ["collective", "operation", "counts"] => None,
                        [operation, "operation", "counts"] => Some(operation.to_string()),
                        _ => None,
                    };
                    (self.count, self.most) = (None, 0);
                }
                (Block::Mismatch, [_, "ranks", "have", ..]) => {
                    self.count = launched(line);
                    self.reached(self.count);
                }
                (Block::Mismatch, ["Rank", _, "has", ..]) => {
                    let count = launched(line);
                    self.reached(count);
                    self.behind(count, words);
                }
                (Block::Mismatch, ["Rank", _, "--", ..]) => self.behind(self.count, words),
                _ => {}
            }
        }

        fn missing(&mut self, members: impl IntoIterator<Item = Member>) {
            if let Some(communicator) = self.status.communicators.last_mut() {
                communicator.missing.extend(members);
            }
        }

        fn reached(&mut self, count: Option<u64>) {
            self.most = self.most.max(count.unwrap_or(0));
            let Some(communicator) = self.status.communicators.last_mut() else {
                return;
            };
            for behind in &mut communicator.behind {
                if behind.operation == self.operation {
                    behind.most = self.most;
                }
            }
        }

        fn behind(&mut self, count: Option<u64>, words: &[&str]) {
            if let (true, Some(count), Some(communicator)) =
                (self.counts, count, self.status.communicators.last_mut())
            {
                communicator.behind.push(Behind {
                    member: member(words),
                    operation: self.operation.clone(),
                    count,
                    most: self.most,
                });
            }
        }
    }

    /// `... launched up to operation 6650` or `... not launched any operations`.
    fn launched(line: &str) -> Option<u64> {
        if line.contains("not launched any operations") {
            return Some(0);
        }
        let (_, rest) = line.split_once("launched up to operation ")?;
        rest.split_ascii_whitespace().next()?.parse().ok()
    }

    /// `Rank 2 -- GPU 2 managed by process 483074 on node 172.16.64.210`, or
    /// `Process 3487984 on node 172.16.64.213 managing GPU 5`.
    fn member(words: &[&str]) -> Member {
        let after = |names: &[&str]| {
            let at = words.iter().position(|w| names.contains(w))?;
            words.get(at + 1).map(|w| w.to_string())
        };
        Member {
            rank: after(&["Rank"]).and_then(|r| r.parse().ok()),
            pid: after(&["Process", "process"]).and_then(|p| p.parse().ok()),
            node: after(&["node"]),
            gpu: after(&["GPU", "GPUs"]),
            dead: false,
        }
    }
}

#[cfg(test)]
mod tests;
