//! Programs that hold the agents of other nodes: ssh, srun.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tsm_job::config::duration;
use tsm_job::exit;

use crate::cluster::key::Key;
use crate::cluster::link::{Door, Hub};
use crate::cluster::wire::{self, Role};
use crate::end::End;
use crate::own::Executable;
use crate::session::Voice;
use crate::shim;

/// How long a starter may take to end once its agents have left, or are lost.
const END: Duration = Duration::from_secs(3);
/// Connections that are made at the same time.
const AT_ONCE: usize = 64;
/// Before the second try; each later one waits twice as long as the one before.
const PAUSE: Duration = Duration::from_secs(1);
/// How long to wait for a starter's last words.
const WORDS_END: Duration = Duration::from_secs(1);
/// Lines of a starter's stderr that are kept for the error.
const WORDS: usize = 8;
/// How long a remote shell may take until its agent speaks.
const LOGIN: Duration = Duration::from_secs(60);
/// What a remote shell may print before.
const GREETING: usize = 64 << 10;
/// The line by which an agent tells, on stdout and on stderr, where its own words begin.
pub const HERE: &[u8] = b"\ntsm-launch agent\n";

/// Of a starter that was killed, in what is said of the loss of its agent.
pub const HELD: &str = ", which held it, ";

/// One program to start.
pub struct Starter {
    /// Whom it starts, for errors.
    pub host: String,
    pub argv: Vec<OsString>,
    pub env_remove: &'static [&'static str],
    /// Its stdin and stdout are the connection to one agent; else agents dial, and only the key goes to stdin.
    pub is_wire: bool,
    /// What its exit code says when no agent has come.
    pub code_meaning: fn(&Starter, i32) -> Option<String>,
    /// How often it is started again, counted since its last agent came.
    pub retries: u32,
}

/// What a starter does.
#[derive(Debug)]
pub enum News {
    /// The last line on its stderr, from before its agent was there.
    Said {
        host: String,
        line: String,
    },
    Ended(Ended),
}

/// A starter that has ended.
#[derive(Debug)]
pub struct Ended {
    pub host: String,
    /// As a shell reports it.
    pub code: i32,
    /// Where somebody else killed it: that it held an agent, and the signal.
    pub killed: Option<String>,
    /// Why no agent may have come, in its own words.
    pub message: String,
}

/// What keepers say of their starters.
enum Told {
    /// There are new words.
    Words(String, Arc<Words>),
    Ended(Ended),
}

impl Ended {
    /// The exit code of a job that cannot start because of this: an agent's own, as the agents of
    /// tsm-launch have them, or [`exit::PREFLIGHT`] for what went wrong on the way to it.
    pub fn exit_code(&self) -> i32 {
        match self.code {
            code @ exit::USAGE..=exit::CONFIG => code,
            _ => exit::PREFLIGHT,
        }
    }
}

/// All starters of a job. They end with this process.
pub struct Children {
    told: UnboundedReceiver<Told>,
    events: UnboundedSender<Told>,
    running: Arc<Mutex<usize>>,
    /// Held while a connection is being made; closed at the end.
    places: Arc<Semaphore>,
    /// Some are started again when they end.
    pub come_back: bool,
}

impl Children {
    pub fn new() -> Children {
        let (events, told) = unbounded_channel();
        Children {
            told,
            events,
            running: Arc::default(),
            places: Arc::new(Semaphore::new(AT_ONCE)),
            come_back: false,
        }
    }

    /// Starts one, as soon as few enough others are on their way. Call on the main thread, inside its tokio
    /// runtime: the starter ends when this thread does.
    pub fn start(
        &mut self,
        shim: &Executable,
        starter: Starter,
        hub: &Hub,
        key: &Key,
        voice: &Voice,
    ) {
        self.come_back |= starter.retries > 0;
        let keeper = Keeper {
            shim: shim.clone(),
            starter,
            door: hub.door(),
            key: key.clone(),
            voice: voice.clone(),
            events: self.events.clone(),
            running: self.running.clone(),
            places: self.places.clone(),
        };
        tokio::spawn(keeper.keep());
    }

    /// The next that speaks or ends; never, where there is none.
    pub async fn next(&mut self) -> News {
        loop {
            match self.told.recv().await {
                Some(Told::Words(host, words)) => {
                    if let Some(line) = words.newest() {
                        return News::Said { host, line };
                    }
                }
                Some(Told::Ended(ended)) => return News::Ended(ended),
                // This struct holds a sender itself.
                None => std::future::pending().await,
            }
        }
    }

    /// Starts no more, and waits a little for those that still run. The rest is ended with this process.
    pub async fn end(&mut self) {
        self.places.close();
        let all = async {
            while *lock(&self.running) > 0 {
                if self.told.recv().await.is_none() {
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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts one starter, and again where that is wanted.
struct Keeper {
    shim: Executable,
    starter: Starter,
    door: Door,
    key: Key,
    voice: Voice,
    events: UnboundedSender<Told>,
    running: Arc<Mutex<usize>>,
    places: Arc<Semaphore>,
}

impl Keeper {
    async fn keep(self) {
        let mut failed = 0;
        loop {
            let Ok(place) = self.places.clone().acquire_owned().await else {
                return;
            };
            *lock(&self.running) += 1;
            let (ended, has_come) = self.run(place).await;
            *lock(&self.running) -= 1;
            let code = ended.code;
            // An agent that was sent away, or cannot run the job, would be the same again.
            let is_final = (exit::USAGE..=exit::CONFIG).contains(&code) && code != exit::PEER;
            let _ = self.events.send(Told::Ended(ended));
            failed = if has_come { 0 } else { failed + 1 };
            if is_final || failed >= self.starter.retries {
                return;
            }
            tokio::time::sleep(PAUSE * 2u32.saturating_pow(failed)).await;
        }
    }

    /// From its start to its end, and whether its agent has come.
    async fn run(&self, place: OwnedSemaphorePermit) -> (Ended, bool) {
        let argv = &self.starter.argv;
        let program = argv.first().cloned().unwrap_or_default();
        let mut command = Command::from(self.shim.command());
        command.args(shim::plain()).args(argv);
        for name in self.starter.env_remove {
            command.env_remove(name);
        }
        let out = if self.starter.is_wire {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        command
            .stdin(Stdio::piped())
            .stdout(out)
            .stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(e) => {
                let text = format!("cannot start {}: {e}", program.display());
                let ended = Ended {
                    host: self.starter.host.clone(),
                    code: exit::PREFLIGHT,
                    killed: None,
                    message: text,
                };
                return (ended, false);
            }
        };
        let (Some(stdin), Some(stderr)) = (child.stdin.take(), child.stderr.take()) else {
            unreachable!("both streams were asked for")
        };
        let words = Arc::new(Words::default());
        let reader = {
            let (words, host, voice) =
                (words.clone(), self.starter.host.clone(), self.voice.clone());
            let (is_shown, events) = (!self.starter.is_wire, self.events.clone());
            tokio::spawn(async move { words.read(stderr, is_shown, host, voice, events).await })
        };
        let connect = self.connect(stdin, child.stdout.take(), place);
        let (spoken, ended) = tokio::select! {
            status = child.wait() => (None, Some(status)),
            spoken = connect => (Some(spoken), None),
        };
        let late = matches!(spoken, Some(Spoken::Late));
        let has_come = matches!(spoken, Some(Spoken::Here(_) | Spoken::Dials));
        let mut by_us = false;
        let status = match ended {
            Some(status) => status,
            None => tokio::select! {
                status = child.wait() => status,
                () = is_in_vain(spoken) => {
                    // A starter that is stopped, or waits for a host that is gone, would keep another from its place.
                    by_us = child.start_kill().is_ok();
                    child.wait().await
                }
            },
        };
        // A process that it left behind may hold its stderr open.
        let _ = tokio::time::timeout(WORDS_END, reader).await;
        let end = status.map_or(End::Code(1), |status| {
            use std::os::unix::process::ExitStatusExt;
            let signal = status.signal().map(End::Signal);
            signal.unwrap_or(End::Code(status.code().unwrap_or(1)))
        });
        let code = end.exit_code();
        let name = Path::new(&program).file_name().unwrap_or(&program);
        let name = name.to_string_lossy();
        let how = format!("{name} ended with {end}");
        let mut message = match (late, (self.starter.code_meaning)(&self.starter, code)) {
            (true, _) => format!("{name} brought no agent within {}", duration::format(LOGIN)),
            (false, Some(meaning)) => format!("{how}: {meaning}"),
            (false, None) => how,
        };
        for line in lock(&words.last).iter() {
            message = format!("{message}\n  {line}");
        }
        let killed = matches!(end, End::Signal(_)) && !by_us;
        let ended = Ended {
            host: self.starter.host.clone(),
            code,
            killed: killed.then(|| format!("{name}{HELD}ended with {end}")),
            message,
        };
        (ended, has_come)
    }

    /// Hands the key over, and the connection to the hub where the starter is one. Where the stream ends, the end of
    /// the starter says why.
    async fn connect(
        &self,
        mut stdin: ChildStdin,
        stdout: Option<ChildStdout>,
        place: OwnedSemaphorePermit,
    ) -> Spoken {
        let line = self.key.to_line();
        let Some(stdout) = stdout else {
            // srun gives up its tasks' stdin with its own; nothing more is to come.
            let _ = stdin.write_all(line.as_bytes()).await;
            return Spoken::Dials;
        };
        let mut stdout = BufReader::new(stdout);
        let greeting = async {
            stdin.write_all(line.as_bytes()).await?;
            skip_greeting(&mut stdout).await
        };
        match tokio::time::timeout(LOGIN, greeting).await {
            Err(_) => return Spoken::Late,
            Ok(Ok(true)) => {}
            // A shell that talks without end is no better than one that is silent.
            Ok(Ok(false)) | Ok(Err(_)) => {
                tokio::time::sleep(LOGIN).await;
                return Spoken::Late;
            }
        }
        let stream = tokio::io::join(stdout, stdin);
        let deadline = wire::PROOF_DEADLINE * 5;
        let arrival = wire::authenticate(
            Role::Coordinator,
            stream,
            &self.starter.host,
            &self.key,
            deadline,
        )
        .await;
        let done = self.door.enter(arrival).await;
        drop(place);
        Spoken::Here(done)
    }
}

/// What came of a starter's agent.
enum Spoken {
    /// It was not there in time.
    Late,
    /// It is at the other end of a connection, which is over when this is.
    Here(oneshot::Receiver<()>),
    /// It dials, if it comes.
    Dials,
}

/// Waits until a starter is of no use any more, and had time to end by itself.
async fn is_in_vain(spoken: Option<Spoken>) {
    match spoken {
        Some(Spoken::Late) => {}
        Some(Spoken::Here(done)) => {
            // It is dropped, never sent.
            let _ = done.await;
            tokio::time::sleep(END).await;
        }
        Some(Spoken::Dials) | None => std::future::pending().await,
    }
}

/// The last lines of a starter's stderr that the user has not seen.
#[derive(Default)]
struct Words {
    last: Mutex<VecDeque<String>>,
    /// That there are new ones was said, and nobody has looked yet.
    is_told: AtomicBool,
}

impl Words {
    /// What a remote shell says before its agent is there explains a failure, and is noise otherwise; the rest
    /// is shown as it comes.
    async fn read(
        self: Arc<Words>,
        stderr: ChildStderr,
        mut is_shown: bool,
        host: String,
        voice: Voice,
        events: UnboundedSender<Told>,
    ) {
        let mut lines = BufReader::new(stderr).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let mut last = lock(&self.last);
            if line.as_bytes() == HERE.trim_ascii() {
                is_shown = true;
                last.clear();
            } else if is_shown {
                voice.say(&format!("{host}: {line}"));
            } else {
                if last.len() == WORDS {
                    last.pop_front();
                }
                last.push_back(line);
                drop(last);
                if !self.is_told.swap(true, Ordering::Relaxed) {
                    let _ = events.send(Told::Words(host.clone(), self.clone()));
                }
            }
        }
    }

    fn newest(&self) -> Option<String> {
        self.is_told.store(false, Ordering::Relaxed);
        lock(&self.last).back().cloned()
    }
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
