//! Programs that hold the agents of other nodes: ssh, srun.

use anyhow::Context;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStderr, Command};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tsm_job::exit::{self, Coded};

use crate::cluster::key::Key;
use crate::cluster::link::Hub;
use crate::cluster::wire::{self, Refusal, Why};
use crate::session::Voice;
use crate::shim;

/// How long a starter may take to end once its agents have left.
const END: Duration = Duration::from_secs(3);
/// Lines of a starter's stderr that are kept for the error.
const WORDS: usize = 8;
/// How long a remote shell may take until its agent speaks.
const LOGIN: Duration = Duration::from_secs(60);
/// What a remote shell may print before.
const GREETING: usize = 64 << 10;
/// The line by which an agent on stdout tells where its own words begin.
pub const HERE: &[u8] = b"\ntsm-launch agent\n";

/// One program to start.
pub struct Starter {
    /// Whom it starts, for errors.
    pub host: String,
    pub argv: Vec<OsString>,
    pub env_remove: &'static [&'static str],
    /// Its stdin and stdout are the connection to one agent; else agents dial, and only the key goes to stdin.
    pub is_wire: bool,
    pub code_meaning: fn(i32) -> Option<&'static str>,
}

/// A starter that has ended.
#[derive(Debug)]
pub struct Ended {
    pub host: String,
    /// As a shell reports it.
    pub code: i32,
    /// Why no agent may have come, in its own words.
    pub message: String,
}

/// All starters of a job. They end with this process.
pub struct Children {
    ended: UnboundedReceiver<Ended>,
    events: UnboundedSender<Ended>,
    running: Arc<Mutex<usize>>,
}

impl Children {
    pub fn new() -> Children {
        let (events, ended) = unbounded_channel();
        Children {
            ended,
            events,
            running: Arc::default(),
        }
    }

    /// Starts one. Call on the main thread, inside the tokio runtime: the starter ends when this thread does.
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`] when the program is not there.
    pub fn start(
        &mut self,
        shim_path: &Path,
        starter: Starter,
        hub: &Hub,
        key: &Key,
        voice: &Voice,
    ) -> anyhow::Result<()> {
        let program = starter.argv.first().cloned().unwrap_or_default();
        let mut command = Command::new(shim_path);
        command
            .arg(shim::WORKER)
            .arg(std::process::id().to_string())
            .arg("")
            .args(&starter.argv);
        for name in starter.env_remove {
            command.env_remove(name);
        }
        let out = if starter.is_wire {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        command
            .stdin(Stdio::piped())
            .stdout(out)
            .stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| {
            Coded::new(
                exit::PREFLIGHT,
                format!("cannot start {}", program.display()),
            )
        })?;
        let (Some(mut stdin), Some(stderr)) = (child.stdin.take(), child.stderr.take()) else {
            unreachable!("both streams were asked for")
        };
        let line = key.to_line();
        if let Some(stdout) = child.stdout.take() {
            let (key, host) = (key.clone(), starter.host.clone());
            hub.arrive(async move {
                let refusal = |why: Why| Refusal {
                    peer: host.clone(),
                    why,
                };
                stdin
                    .write_all(line.as_bytes())
                    .await
                    .map_err(|e| refusal(Why::Io(e)))?;
                let mut stdout = BufReader::new(stdout);
                let found = tokio::time::timeout(LOGIN, skip_greeting(&mut stdout)).await;
                if !matches!(found, Ok(Ok(true))) {
                    return Err(refusal(Why::Closed));
                }
                wire::accept(
                    tokio::io::join(stdout, stdin),
                    &host,
                    &key,
                    wire::PROOF_DEADLINE * 5,
                )
                .await
            });
        } else {
            tokio::spawn(async move {
                let _ = stdin.write_all(line.as_bytes()).await;
                // srun gives up its tasks' stdin with its own; nothing more is to come.
            });
        }
        *lock(&self.running) += 1;
        let (events, running, voice) = (self.events.clone(), self.running.clone(), voice.clone());
        tokio::spawn(async move {
            let words = repeat_words(stderr, &starter.host, &voice).await;
            let status = child.wait().await;
            let code = status.map_or(1, |s| {
                s.code().unwrap_or_else(|| {
                    128 + std::os::unix::process::ExitStatusExt::signal(&s).unwrap_or(0)
                })
            });
            *lock(&running) -= 1;
            let name = Path::new(&program)
                .file_name()
                .unwrap_or(&program)
                .to_string_lossy()
                .into_owned();
            let meaning = (starter.code_meaning)(code)
                .map(|m| format!(": {m}"))
                .unwrap_or_default();
            let mut message = format!("{name} ended with exit code {code}{meaning}");
            if !words.is_empty() {
                message = format!("{message}\n  {}", words.join("\n  "));
            }
            let host = starter.host;
            let _ = events.send(Ended {
                host,
                code,
                message,
            });
        });
        Ok(())
    }

    /// The next that ends; never, where there is none.
    pub async fn next(&mut self) -> Ended {
        match self.ended.recv().await {
            Some(ended) => ended,
            // This struct holds a sender itself.
            None => std::future::pending().await,
        }
    }

    /// Waits a little for those that still run. The rest is ended with this process.
    pub async fn end(&mut self) {
        let all = async {
            while *lock(&self.running) > 0 {
                if self.ended.recv().await.is_none() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(END, all).await;
    }
}

impl Default for Children {
    fn default() -> Children {
        Children::new()
    }
}

fn lock(running: &Mutex<usize>) -> std::sync::MutexGuard<'_, usize> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads to just behind [`HERE`]; false when the stream ends before, or goes on for too long.
async fn skip_greeting(stream: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<bool> {
    let mut last: VecDeque<u8> = VecDeque::new();
    for _ in 0..GREETING {
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            return Ok(false);
        }
        if last.len() == HERE.len() {
            last.pop_front();
        }
        last.push_back(byte[0]);
        if last.iter().eq(HERE.iter()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Shows what a starter says, under the name of its host; the last lines come back at its end.
async fn repeat_words(stderr: ChildStderr, host: &str, voice: &Voice) -> Vec<String> {
    let mut lines = BufReader::new(stderr).lines();
    let mut last = VecDeque::new();
    while let Ok(Some(line)) = lines.next_line().await {
        voice.say(&format!("{host}: {line}"));
        if last.len() == WORDS {
            last.pop_front();
        }
        last.push_back(line);
    }
    last.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn rest(text: &[u8]) -> Option<Vec<u8>> {
        let mut stream = text;
        let found = skip_greeting(&mut stream).await.unwrap();
        found.then(|| stream.to_vec())
    }

    #[tokio::test]
    async fn what_a_shell_prints_before_the_agent_is_skipped() {
        assert_eq!(rest(b"\ntsm-launch agent\nwire").await.unwrap(), b"wire");
        assert_eq!(
            rest(b"Welcome!\ntsm-launch\n\ntsm-launch agent\n\x00\x01")
                .await
                .unwrap(),
            b"\x00\x01"
        );
        assert_eq!(rest(b"bash: tsm-launch: command not found\n").await, None);
        assert_eq!(rest(&vec![b'x'; GREETING + 1]).await, None);
    }
}
