//! The answer as text, of every version.

use super::status::{Behind, Communicator, Member, Status};

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
