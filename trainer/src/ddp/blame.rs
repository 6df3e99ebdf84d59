//! Who is missing when a collective fails.
//!
//! A dead rank breaks only the connections to its neighbours; the others wait until their
//! time-out. So every rank has a watcher thread. The first rank that fails raises an alarm in the
//! store; every watcher answers whether its rank waits in a collective or is busy elsewhere, and
//! within [`WINDOW`] each of them knows who did not answer.
//!
//! The same threads spread the request to save and leave ([`crate::preempt`]) to ranks that were not
//! signalled themselves.

use crate::preempt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tsm_torch_ext::dist::Store;

/// How long ranks have to answer an alarm.
pub(super) const WINDOW: Duration = Duration::from_secs(3);
/// Ranks that hear of the alarm late stop earlier, while the first, which may hold the store, is
/// still there.
const HEARD_LATE: Duration = Duration::from_millis(600);
/// How often a watcher looks for an alarm, and then for answers.
const LOOK: Duration = Duration::from_millis(250);
const LOOK_FOR_ANSWERS: Duration = Duration::from_millis(50);
const ALARM: &str = "tsm/alarm";
/// Some rank was asked to save and leave.
const ASKED: &str = "tsm/asked";
/// There is an [`ALARM`] or an [`ASKED`], so that looking for both costs one question.
const NEWS: &str = "tsm/news";

/// What a rank said to an alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Silent,
    /// It waits in a collective, or has failed in one itself.
    Waiting,
    /// It lives, but is not in a collective.
    Elsewhere,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// By rank.
    Answers(Vec<Answer>),
    /// Rank 0 holds the store.
    StoreGone,
}

/// Names the ranks to blame: the silent ones, else those that are elsewhere.
pub(super) fn sentence(verdict: &Verdict, failure: &str) -> String {
    let answers = match verdict {
        Verdict::StoreGone => {
            return format!(
                "rank 0 is gone or stuck: {failure} (rank 0 holds the store, which does not answer)"
            );
        }
        Verdict::Answers(answers) => answers,
    };
    let that = |wanted: Answer| -> Vec<String> {
        answers
            .iter()
            .enumerate()
            .filter(|(_, a)| **a == wanted)
            .map(|(rank, _)| rank.to_string())
            .collect()
    };
    let (named, why) = match (that(Answer::Silent), that(Answer::Elsewhere)) {
        (silent, _) if !silent.is_empty() => (silent, "no answer within 3s"),
        (_, elsewhere) if !elsewhere.is_empty() => (elsewhere, "alive, but not in a collective"),
        _ => return format!("every rank still answers: {failure}"),
    };
    match &named[..] {
        [one] => format!("rank {one} is gone or stuck: {failure} ({why})"),
        more => format!(
            "ranks {} are gone or stuck: {failure} ({why})",
            more.join(", ")
        ),
    }
}

#[derive(Default)]
struct Shared {
    stop: bool,
    /// This rank's own collective failed.
    alarm: bool,
    in_collective: bool,
    verdict: Option<Verdict>,
}

/// The thread that answers alarms. Ends when dropped.
pub(super) struct Watcher {
    shared: Arc<(Mutex<Shared>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    pub fn start(store: Arc<Store>, rank: u32, world_size: u32) -> std::io::Result<Watcher> {
        let shared: Arc<(Mutex<Shared>, Condvar)> = Arc::default();
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("tsm-watcher".into())
            .spawn(move || watch(&store, rank, world_size, &theirs))?;
        Ok(Watcher {
            shared,
            thread: Some(thread),
        })
    }

    /// Says whether this rank is in a collective.
    pub fn set_in_collective(&self, yes: bool) {
        lock(&self.shared.0).in_collective = yes;
    }

    /// Raises the alarm, or joins the one that is on, and waits for the verdict.
    pub fn blame(&self) -> Verdict {
        let (state, changed) = &*self.shared;
        let mut s = lock(state);
        s.alarm = true;
        changed.notify_all();
        let limit = WINDOW + Duration::from_secs(1);
        let (s, _) = changed
            .wait_timeout_while(s, limit, |s| s.verdict.is_none())
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        s.verdict.clone().unwrap_or(Verdict::StoreGone)
    }

    /// No more answers: the run ended well.
    pub fn stop(&self) {
        lock(&self.shared.0).stop = true;
        self.shared.1.notify_all();
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(store: &Store, rank: u32, world_size: u32, shared: &(Mutex<Shared>, Condvar)) {
    let (state, changed) = shared;
    let end = |verdict: Verdict| {
        lock(state).verdict = Some(verdict);
        changed.notify_all();
    };
    // Whether every rank's watcher knows of the request or can.
    let mut asked = false;
    let (first, waiting) = loop {
        let s = lock(state);
        let (s, _) = changed
            .wait_timeout_while(s, LOOK, |s| !s.stop && !s.alarm)
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if s.stop {
            return;
        }
        let (own, waiting) = (s.alarm, s.alarm || s.in_collective);
        drop(s);
        match look(store, &mut asked) {
            Err(_) => return end(Verdict::StoreGone),
            Ok(raised) if raised || own => break (!raised, waiting),
            Ok(_) => {}
        }
    };
    let window = if first { WINDOW } else { WINDOW - HEARD_LATE };
    let mut answers = vec![Answer::Silent; world_size as usize];
    let collected = collect(store, rank, waiting, window, &mut answers);
    // Rank 0 that has answered leaves with its own verdict, and the store with it.
    end(match collected {
        Err(_) if answers[0] == Answer::Silent => Verdict::StoreGone,
        _ => Verdict::Answers(answers),
    });
}

/// Passes the request to save and leave on, in both directions. Returns whether an alarm is on.
fn look(store: &Store, asked: &mut bool) -> tsm_torch_ext::Result<bool> {
    if preempt::asked() && !*asked {
        store.set(ASKED, b"1")?;
        store.set(NEWS, b"1")?;
        *asked = true;
    }
    if *asked {
        return store.check(&[ALARM]);
    }
    if !store.check(&[NEWS])? {
        return Ok(false);
    }
    if store.check(&[ASKED])? {
        preempt::ask();
        *asked = true;
    }
    store.check(&[ALARM])
}

/// Answers for this rank, then gathers the others' answers.
fn collect(
    store: &Store,
    rank: u32,
    waiting: bool,
    window: Duration,
    answers: &mut [Answer],
) -> tsm_torch_ext::Result<()> {
    let key = |rank: usize| format!("tsm/blame/{rank}");
    let deadline = Instant::now() + window;
    store.set(ALARM, b"1")?;
    store.set(NEWS, b"1")?;
    let own: &[u8] = if waiting { b"waiting" } else { b"elsewhere" };
    store.set(&key(rank as usize), own)?;
    loop {
        for (other, answer) in answers.iter_mut().enumerate() {
            let key = key(other);
            if *answer == Answer::Silent && store.check(&[&key])? {
                *answer = match store.get(&key)?.as_slice() {
                    b"waiting" => Answer::Waiting,
                    _ => Answer::Elsewhere,
                };
            }
        }
        if !answers.contains(&Answer::Silent) || Instant::now() >= deadline {
            return Ok(());
        }
        std::thread::sleep(LOOK_FOR_ANSWERS);
    }
}

fn lock(state: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    state
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use Answer::*;

    fn says(answers: &[Answer]) -> String {
        sentence(&Verdict::Answers(answers.to_vec()), "it failed")
    }

    #[test]
    fn the_silent_are_blamed_before_the_busy() {
        assert_eq!(
            says(&[Waiting, Silent, Elsewhere, Waiting]),
            "rank 1 is gone or stuck: it failed (no answer within 3s)"
        );
        assert_eq!(
            says(&[Waiting, Silent, Waiting, Silent]),
            "ranks 1, 3 are gone or stuck: it failed (no answer within 3s)"
        );
        assert_eq!(
            says(&[Waiting, Waiting, Elsewhere]),
            "rank 2 is gone or stuck: it failed (alive, but not in a collective)"
        );
        assert_eq!(
            says(&[Waiting, Waiting]),
            "every rank still answers: it failed"
        );
        assert!(sentence(&Verdict::StoreGone, "it failed").starts_with("rank 0 is gone"));
    }
}
