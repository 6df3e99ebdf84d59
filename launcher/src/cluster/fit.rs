//! Messages that grow with the number of ranks, or with what they say, made to fit into a frame. Pure.
//!
//! Lists are sent in several messages; texts lose their middle, with a mark, and more of it the more ranks there are.
//! Asked only about messages that are too long, which are rare.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use tsm_job::exit::{self, Coded};
use tsm_job::text::cut;

use super::coordinator::Job;
use super::message::{Beat, FromAgent, NodeReport};
use super::wire::MAX_TO_AGENT;
use crate::blame::first_on_node;
use crate::console::lines::Batch;
use crate::hang::process::Process;
use crate::hang::ras;
use crate::hang::report::Inspection;
use crate::report::own_words;
use crate::supervisor::Rank;

/// How much is left of each rank; the next one is tried while the whole is too long.
#[derive(Clone, Copy, Debug)]
struct Level {
    /// Bytes of any one text.
    text: usize,
    /// Last lines of stderr.
    lines: usize,
    /// Threads and child processes of one that was looked into.
    threads: usize,
    children: usize,
}

const fn level(text: usize, lines: usize, threads: usize, children: usize) -> Level {
    Level {
        text,
        lines,
        threads,
        children,
    }
}

const LEVELS: [Level; 5] = [
    level(64 << 10, 50, 512, 16),
    level(16 << 10, 50, 64, 8),
    level(4 << 10, 20, 16, 4),
    level(2 << 10, 8, 8, 2),
    level(1 << 10, 4, 4, 1),
];

/// Longest frame for what is known of one rank's process: stacks, threads, children.
pub const MAX_LOOK: usize = 64 << 10;

/// The same in messages of at most `max` bytes each, in order. `max` is at least [`super::wire::MAX_FROM_AGENT`], or
/// near it.
pub fn fit(message: FromAgent, max: usize) -> Vec<FromAgent> {
    if len(&message) <= max {
        return vec![message];
    }
    match message {
        FromAgent::Clean { generation, report } => clean(generation, *report, max),
        FromAgent::Inspected {
            generation,
            looks,
            ras,
            ..
        } => inspected(generation, looks, ras, max),
        FromAgent::Beat(beat) => beats(beat, max),
        FromAgent::Output { batch } => outputs(batch, max),
        FromAgent::Started {
            generation,
            pids,
            cores,
            at,
            mut environment,
            containment,
        } => {
            // The manifest then has the first ones only.
            for text in [16 << 10, 1 << 10, 64] {
                if len(&environment) > max / 2 {
                    environment = with_texts(&environment, text);
                }
            }
            while len(&environment) > max / 2 {
                environment.truncate(environment.len() / 2);
            }
            vec![FromAgent::Started {
                generation,
                pids,
                cores,
                at,
                environment,
                containment,
            }]
        }
        FromAgent::Join(mut join) => {
            join.addresses.truncate(256);
            vec![shorter(FromAgent::Join(join), max)]
        }
        other => vec![shorter(other, max)],
    }
}

/// Refuses a job that no message to a node can hold. Linux allows 2 MiB of words and environment, which fit; with
/// `ulimit -s unlimited` it allows more.
///
/// # Errors
/// [`exit::USAGE`].
pub fn job(job: &Job) -> Result<(), Coded> {
    let refuse = |problem: String, hint: &str| {
        let text = format!("cannot send this job to other nodes: {problem}\n  hint: {hint}");
        Err(Coded::new(exit::USAGE, text))
    };
    for path in [&job.run_dir, &job.directory] {
        if path.to_str().is_none() {
            let hint = "give --run-dir a folder whose name is UTF-8, and start from one";
            return refuse(format!("the name of {} is not UTF-8", path.display()), hint);
        }
    }
    // As in [`super::message::Start`], with what is around it.
    let word = |word: &OsString| match word.to_str() {
        Some(text) => len(&text) + 16,
        None => len(&word.as_bytes()) + 16,
    };
    let base = job.base_env.iter().flatten();
    let base: usize = base.map(|(name, value)| word(name) + word(value)).sum();
    let parts = [
        ("the environment", base + len(&job.env)),
        ("the command line", job.command.iter().map(word).sum()),
        ("the config", len(&job.config)),
    ];
    let whole: usize = parts.iter().map(|(_, len)| len).sum();
    // Paths, and what the coordinator adds.
    let max = MAX_TO_AGENT - (64 << 10);
    let (name, largest) = parts
        .into_iter()
        .max_by_key(|(_, len)| *len)
        .unwrap_or_default();
    if whole > max {
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        let problem = format!(
            "it takes {:.1} MiB, {:.1} of them {name}; {:.1} are the most",
            mib(whole),
            mib(largest),
            mib(max)
        );
        return refuse(
            problem,
            "put what is large into a file that all nodes can read",
        );
    }
    Ok(())
}

/// What is known of one process, at most [`MAX_LOOK`] long.
pub fn look(mut look: Inspection) -> Inspection {
    for level in LEVELS {
        if len(&look) <= MAX_LOOK {
            break;
        }
        prune(&mut look.process, level);
        look = with_texts(&look, level.text / 2);
    }
    look
}

fn clean(generation: u32, mut report: NodeReport, max: usize) -> Vec<FromAgent> {
    for list in [&mut report.warnings, &mut report.xids] {
        let more = list.len().saturating_sub(64);
        list.truncate(64);
        list.iter_mut().for_each(|text| *text = cut(text, 1 << 10));
        if more > 0 {
            list.push(format!("and {more} more"));
        }
    }
    report.missing = report.missing.map(|text| cut(&text, 1 << 10));
    let mut entries = std::mem::take(&mut report.ranks);
    let ranks: Vec<Rank> = entries.iter().map(|(rank, _)| rank.clone()).collect();
    // The words that matter are those of the one that is to blame.
    let blamed = first_on_node(&ranks, |rank| own_words(&entries[rank].1));
    for level in LEVELS {
        for (number, entry) in entries.iter_mut().enumerate() {
            if Some(number) != blamed || len(entry) > max / 2 {
                last_lines(&mut entry.1.stderr, level.lines);
                *entry = with_texts(entry, level.text);
            }
        }
        if len(&entries) + len(&report) + ROOM <= max {
            break;
        }
    }
    let of_each = max - ROOM - len(&report);
    in_parts(entries, of_each, |ranks, last| match last {
        false => FromAgent::Ranks { generation, ranks },
        true => FromAgent::Clean {
            generation,
            report: Box::new(NodeReport {
                ranks,
                ..report.clone()
            }),
        },
    })
}

fn inspected(
    generation: u32,
    looks: Vec<Inspection>,
    ras: Option<ras::Answer>,
    max: usize,
) -> Vec<FromAgent> {
    let mut ras = ras;
    for keep in [64, 16, 4] {
        let Some(answer) = ras.as_mut().filter(|answer| len(answer) > max / 4) else {
            break;
        };
        let status = &mut answer.status;
        status.silent.truncate(keep);
        status.communicators.truncate(keep);
        for communicator in &mut status.communicators {
            communicator.missing.truncate(keep);
            communicator.behind.truncate(keep);
        }
        *answer = with_texts(answer, max / 16);
    }
    let looks = looks.into_iter().map(look).collect();
    in_parts(looks, max - ROOM - len(&ras), |looks, last| {
        FromAgent::Inspected {
            generation,
            looks,
            ras: ras.clone().filter(|_| last),
            more: !last,
        }
    })
}

/// One beat that is answered several times.
fn beats(mut beat: Beat, max: usize) -> Vec<FromAgent> {
    for progress in &mut beat.ranks {
        let old = progress.work_ms.len().saturating_sub(32);
        progress.work_ms.drain(..old);
        progress.section = progress.section.as_deref().map(|name| cut(name, 128));
    }
    beat.metrics.truncate(1000);
    for (name, _) in &mut beat.metrics {
        *name = cut(name, 128);
    }
    let metrics = std::mem::take(&mut beat.metrics);
    let ranks = std::mem::take(&mut beat.ranks);
    in_parts(ranks, max - ROOM - len(&metrics), |ranks, last| {
        FromAgent::Beat(Beat {
            ranks,
            metrics: if last { metrics.clone() } else { Vec::new() },
            ..beat.clone()
        })
    })
}

fn outputs(batch: Batch, max: usize) -> Vec<FromAgent> {
    let whole = FromAgent::Output { batch };
    if len(&whole) <= max {
        return vec![whole];
    }
    let FromAgent::Output { batch } = whole else {
        return Vec::new();
    };
    match batch.halves() {
        (one, Some(other)) => [outputs(one, max), outputs(other, max)].concat(),
        (batch, None) => vec![shorter(FromAgent::Output { batch }, max)],
    }
}

/// A message without lists: its texts are cut until it fits.
fn shorter(message: FromAgent, max: usize) -> FromAgent {
    let lengths = [64 << 10, 4 << 10, 256];
    let mut short = message;
    for text in lengths {
        if len(&short) <= max {
            break;
        }
        short = with_texts(&short, text);
    }
    short
}

/// Beside the lists of a message.
const ROOM: usize = 512;

/// Puts as many of `items` in a message as `max` bytes hold; one that is longer goes alone. There is always a last one.
fn in_parts<T: Serialize>(
    items: Vec<T>,
    max: usize,
    message: impl Fn(Vec<T>, bool) -> FromAgent,
) -> Vec<FromAgent> {
    let mut parts = Vec::new();
    let (mut part, mut bytes) = (Vec::new(), 0);
    for item in items {
        let more = len(&item) + 1;
        if bytes + more > max && !part.is_empty() {
            parts.push(message(std::mem::take(&mut part), false));
            bytes = 0;
        }
        bytes += more;
        part.push(item);
    }
    parts.push(message(part, true));
    parts
}

fn prune(process: &mut Process, level: Level) {
    let threads = process.threads.len().saturating_sub(level.threads);
    let children = process.children.len().saturating_sub(level.children);
    process.threads.truncate(level.threads);
    process.children.truncate(level.children);
    if threads + children > 0 {
        process.notes.truncate(16);
        let text = format!("{threads} threads and {children} child processes left out");
        process.notes.push(text);
    }
    process.children.iter_mut().for_each(|c| prune(c, level));
}

fn last_lines(lines: &mut Vec<String>, keep: usize) {
    let more = lines.len().saturating_sub(keep);
    if more > 0 {
        lines.drain(..=more);
        lines.insert(0, format!("[{} lines left out]", more + 1));
    }
}

/// Bytes in a frame; what cannot be encoded takes none.
fn len(value: &impl Serialize) -> usize {
    serde_json::to_vec(value).map_or(0, |bytes| bytes.len())
}

/// The same with every text, wherever it stands, cut to `max` bytes of its frame.
fn with_texts<T: Serialize + DeserializeOwned + Clone>(value: &T, max: usize) -> T {
    let short = serde_json::to_value(value).and_then(|mut json| {
        cut_texts(&mut json, max);
        serde_json::from_value(json)
    });
    short.unwrap_or_else(|_| value.clone())
}

fn cut_texts(json: &mut Value, max: usize) {
    match json {
        Value::String(text) => {
            let (whole, mut keep) = (std::mem::take(text), max);
            *text = cut(&whole, keep);
            // A control character takes six bytes.
            while len(text) > max + 2 {
                keep -= keep / 3;
                *text = cut(&whole, keep);
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| cut_texts(value, max)),
        Value::Object(fields) => fields
            .iter_mut()
            .for_each(|(_, value)| cut_texts(value, max)),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
