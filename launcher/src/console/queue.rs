//! Between those who read lines and the one who shows or ships them: a queue that never grows beyond its
//! limit, and counts what it could not take.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

use super::lines::{Batch, Missed};

/// Room for lines that wait to be shown.
pub const LIMIT: usize = 4 << 20;

/// Makes a queue of `limit` bytes.
pub fn queue(limit: usize) -> (Feed, Tap) {
    let shared = Arc::new(Shared {
        state: Mutex::default(),
        changed: Condvar::new(),
        arrived: Notify::new(),
        feeds: AtomicUsize::new(1),
        limit,
    });
    (Feed(Arc::clone(&shared)), Tap(shared))
}

/// Where lines go in. The queue is closed when all feeds are dropped, or by [`Feed::close`].
pub struct Feed(Arc<Shared>);

/// Where they come out.
pub struct Tap(Arc<Shared>);

/// What [`Tap::wait`] found.
#[derive(Debug, PartialEq)]
pub enum Taken {
    Batch(Batch),
    /// Nothing came in time.
    Nothing,
    /// Nothing will come any more.
    Closed,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    arrived: Notify,
    feeds: AtomicUsize,
    limit: usize,
}

#[derive(Default)]
struct State {
    batches: VecDeque<Batch>,
    bytes: usize,
    /// By rank and stream.
    missed: BTreeMap<(u32, bool), Missed>,
    /// How many batches were taken out.
    taken: u64,
    /// Nothing was taken out while somebody waited, and nothing since.
    stuck: bool,
    closed: bool,
}

impl Feed {
    /// Puts `batch` in if there is room, and else only counts its lines. Never waits.
    pub fn offer(&self, batch: Batch) {
        self.0.put(&mut self.0.lock(), batch);
    }

    /// As [`Self::offer`], but waits for room as long as something was taken out in the last `patience`.
    pub fn send(&self, batch: Batch, patience: Duration) {
        let mut state = self.0.lock();
        let mut since = (state.taken, Instant::now());
        while !state.closed && !state.stuck && self.0.is_full(&state, &batch) {
            let Some(left) = patience.checked_sub(since.1.elapsed()) else {
                state.stuck = true;
                break;
            };
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.taken != since.0 {
                since = (state.taken, Instant::now());
            }
        }
        self.0.put(&mut state, batch);
    }

    /// How many batches were taken out so far.
    pub fn taken(&self) -> u64 {
        self.0.lock().taken
    }

    /// Ends the queue although other feeds are still there; what is in it can be taken out.
    pub fn close(&self) {
        self.0.close();
    }
}

impl Clone for Feed {
    fn clone(&self) -> Feed {
        self.0.feeds.fetch_add(1, Ordering::Relaxed);
        Feed(Arc::clone(&self.0))
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        if self.0.feeds.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.close();
        }
    }
}

impl Tap {
    /// The next batch, or [`Taken::Nothing`] after `timeout`; `None` waits for ever.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Taken {
        let start = Instant::now();
        let mut state = self.0.lock();
        loop {
            if let Some(batch) = self.0.take(&mut state) {
                return Taken::Batch(batch);
            }
            if state.closed {
                return Taken::Closed;
            }
            let changed = &self.0.changed;
            state = match timeout {
                None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(timeout) => {
                    let Some(left) = timeout.checked_sub(start.elapsed()) else {
                        return Taken::Nothing;
                    };
                    let waited = changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// The next batch; `None` when nothing will come any more. May be dropped at any time.
    pub async fn next(&mut self) -> Option<Batch> {
        loop {
            let arrived = self.0.arrived.notified();
            {
                let mut state = self.0.lock();
                let batch = self.0.take(&mut state);
                if batch.is_some() || state.closed {
                    return batch;
                }
            }
            arrived.await;
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty queue takes a batch of any size.
    fn is_full(&self, state: &State, batch: &Batch) -> bool {
        !state.batches.is_empty() && state.bytes + batch.bytes() > self.limit
    }

    fn put(&self, state: &mut State, mut batch: Batch) {
        if state.closed || self.is_full(state, &batch) {
            state.miss(&batch);
            // The launcher's own words are few, and all of them count.
            let Some(own) = batch.own_words().filter(|_| !state.closed) else {
                return;
            };
            if state.bytes + own.bytes() > 2 * self.limit {
                return;
            }
            batch = own;
        } else {
            let missed = std::mem::take(&mut state.missed).into_values();
            batch.missed.splice(..0, missed);
        }
        state.bytes += batch.bytes();
        state.batches.push_back(batch);
        self.changed.notify_all();
        self.arrived.notify_one();
    }

    fn take(&self, state: &mut State) -> Option<Batch> {
        let batch = state.batches.pop_front().or_else(|| {
            let missed: Vec<_> = std::mem::take(&mut state.missed).into_values().collect();
            (!missed.is_empty()).then(|| Batch::missing(missed))
        })?;
        state.bytes = state.bytes.saturating_sub(batch.bytes());
        if state.batches.is_empty() {
            state.bytes = 0;
        }
        (state.taken, state.stuck) = (state.taken + 1, false);
        self.changed.notify_all();
        Some(batch)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
        self.arrived.notify_one();
    }
}

impl State {
    fn miss(&mut self, batch: &Batch) {
        let mut count = |host: &str, rank, stderr, lines| {
            let missed = self.missed.entry((rank, stderr));
            let missed = missed.or_insert_with(|| Missed {
                host: host.into(),
                rank,
                stderr,
                lines: 0,
            });
            missed.lines += lines;
        };
        for old in &batch.missed {
            count(&old.host, old.rank, old.stderr, old.lines);
        }
        for line in batch.lines() {
            if let Some(rank) = line.rank {
                count(&batch.host, rank, line.stderr, 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batch(rank: u32, text: &str) -> Batch {
        let mut batch = Batch::new("a");
        batch.push(Some(rank), false, text.as_bytes());
        batch
    }

    fn texts(batch: &Batch) -> Vec<String> {
        let text = |text| String::from_utf8_lossy(text).into_owned();
        batch.lines().map(|line| text(line.text)).collect()
    }

    #[test]
    fn what_finds_no_room_is_counted_and_said_in_its_place() {
        let (feed, mut tap) = queue(2 * batch(3, "first").bytes());
        feed.offer(batch(3, "first"));
        for _ in 0..12 {
            feed.offer(batch(3, &"x".repeat(500)));
        }
        feed.offer(Batch::own("a", "tsm-launch: stopping"));
        let mut take = || match tap.wait(Some(Duration::ZERO)) {
            Taken::Batch(batch) => batch,
            other => panic!("{other:?}"),
        };
        assert_eq!(texts(&take()), ["first"]);
        assert_eq!(texts(&take()), ["tsm-launch: stopping"]);
        feed.offer(batch(3, "last"));
        let last = take();
        assert_eq!(
            (texts(&last), last.missed[0].lines),
            (vec!["last".into()], 12)
        );
        assert_eq!(tap.wait(Some(Duration::ZERO)), Taken::Nothing);
        drop(feed);
        assert_eq!(tap.wait(None), Taken::Closed);
    }

    #[test]
    fn who_is_patient_waits_while_something_is_taken_out() {
        let (feed, mut tap) = queue(batch(0, "x").bytes());
        let reader = std::thread::spawn(move || {
            let mut count = 0;
            while let Taken::Batch(batch) = tap.wait(None) {
                assert!(batch.missed.is_empty());
                count += 1;
            }
            count
        });
        for _ in 0..1000 {
            feed.send(batch(0, "x"), Duration::from_secs(60));
        }
        drop(feed);
        assert_eq!(reader.join().unwrap(), 1000);
    }

    #[test]
    fn a_stuck_reader_is_waited_for_only_once() {
        let (feed, mut tap) = queue(batch(0, "x").bytes());
        for _ in 0..100_000 {
            feed.send(batch(0, "x"), Duration::from_millis(1));
        }
        assert!(feed.0.lock().stuck);
        assert!(matches!(tap.wait(None), Taken::Batch(_)));
        assert!(!feed.0.lock().stuck);
        let Taken::Batch(batch) = tap.wait(None) else {
            panic!("the count is missing")
        };
        assert_eq!(batch.missed[0].lines, 99_999);
    }

    #[test]
    fn an_async_reader_gets_all_and_then_the_end() {
        let (feed, mut tap) = queue(LIMIT);
        let writer = std::thread::spawn(move || {
            for _ in 0..1000 {
                feed.send(batch(0, "x"), Duration::from_secs(60));
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let count = runtime.block_on(async {
            let mut count = 0;
            while let Some(batch) = tap.next().await {
                count += batch.lines().count();
            }
            count
        });
        writer.join().unwrap();
        assert_eq!(count, 1000);
    }

    proptest! {
        #[test]
        fn shown_and_missed_lines_add_up(
            steps in proptest::collection::vec((any::<bool>(), 0u32..3, 0usize..300), 0..100),
            limit in 200usize..2000,
        ) {
            let (feed, mut tap) = queue(limit);
            let (mut sent, mut seen) = (BTreeMap::<u32, u64>::new(), BTreeMap::<u32, u64>::new());
            let mut take = |tap: &mut Tap, limit: usize| {
                let Taken::Batch(batch) = tap.wait(Some(Duration::ZERO)) else { return false };
                for missed in &batch.missed { *seen.entry(missed.rank).or_default() += missed.lines; }
                for line in batch.lines() { *seen.entry(line.rank.unwrap()).or_default() += 1; }
                assert!(tap.0.lock().bytes <= limit.max(600));
                true
            };
            for (put, rank, len) in steps {
                if put {
                    *sent.entry(rank).or_default() += 1;
                    feed.offer(batch(rank, &"x".repeat(len)));
                } else {
                    take(&mut tap, limit);
                }
            }
            while take(&mut tap, limit) {}
            prop_assert_eq!(sent, seen);
        }
    }
}
