//! Lines that many ranks write at the same time are shown once. Pure: `now` is an argument.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use super::lines::Line;

/// More than this is not held back.
const MAX_GROUPS: usize = 8192;
const MAX_BYTES: usize = 1 << 20;

/// Equal lines of different ranks on the same stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// In the order in which they came; each at most once. None: the launcher's own words.
    pub ranks: Vec<u32>,
    pub stderr: bool,
    pub text: Vec<u8>,
    /// When the first of them came.
    since: Duration,
}

/// Holds lines back for a moment, so that equal ones meet.
///
/// Groups come out in the order in which they were begun, and a line joins only a group behind all
/// groups with lines of its rank: so the lines of a rank stay in order.
pub struct Fold {
    window: Duration,
    /// A group of so many ranks waits for no more.
    full: usize,
    groups: VecDeque<Group>,
    /// Number of `groups[0]`, counted from the beginning.
    first: u64,
    bytes: usize,
    /// The newest group with a line of each rank.
    newest: HashMap<u32, u64>,
    /// Numbers of the groups held, ascending, by a hash of their line.
    by_line: HashMap<u64, VecDeque<u64>>,
}

impl Fold {
    /// Of lines of `ranks` ranks, none is held longer than `window`.
    pub fn new(window: Duration, ranks: usize) -> Fold {
        Fold {
            window,
            full: ranks,
            groups: VecDeque::new(),
            first: 0,
            bytes: 0,
            newest: HashMap::new(),
            by_line: HashMap::new(),
        }
    }

    /// Takes in a line of a rank at `now`, which never goes back.
    pub fn push(&mut self, now: Duration, rank: u32, line: &Line) {
        let key = key(line.stderr, line.text);
        let behind = self.newest.get(&rank).map_or(0, |newest| newest + 1);
        let held = self.by_line.entry(key).or_default();
        let start = held.partition_point(|&number| number < behind);
        let (first, groups) = (self.first, &self.groups);
        let same = held.range(start..).copied().find(|number| {
            let group = &groups[(number - first) as usize];
            group.stderr == line.stderr && group.text == line.text
        });
        let number = same.unwrap_or(self.first + self.groups.len() as u64);
        if same.is_none() {
            held.push_back(number);
            self.bytes += line.text.len();
            self.groups.push_back(Group {
                ranks: Vec::new(),
                stderr: line.stderr,
                text: line.text.to_vec(),
                since: now,
            });
        }
        self.groups[(number - self.first) as usize].ranks.push(rank);
        self.newest.insert(rank, number);
    }

    /// Takes in the launcher's own words, which come behind all that is held now.
    pub fn own(&mut self, now: Duration, text: &str) {
        self.bytes += text.len();
        self.groups.push_back(Group {
            ranks: Vec::new(),
            stderr: true,
            text: text.into(),
            since: now,
        });
    }

    /// The next group whose time has come; ask until there is none.
    pub fn due(&mut self, now: Duration) -> Option<Group> {
        let front = self.groups.front()?;
        let due = now >= front.since + self.window
            || front.ranks.is_empty()
            || front.ranks.len() >= self.full
            || self.groups.len() > MAX_GROUPS
            || self.bytes > MAX_BYTES;
        if due { self.pop() } else { None }
    }

    /// The next group, whether its time has come or not.
    pub fn pop(&mut self) -> Option<Group> {
        let group = self.groups.pop_front()?;
        let key = key(group.stderr, &group.text);
        if let (false, Entry::Occupied(mut held)) =
            (group.ranks.is_empty(), self.by_line.entry(key))
        {
            // Groups leave in the order of their numbers.
            held.get_mut().pop_front();
            if held.get().is_empty() {
                held.remove();
            }
        }
        self.first += 1;
        self.bytes -= group.text.len();
        Some(group)
    }

    /// When [`Self::due`] has something at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        self.groups.front().map(|group| group.since + self.window)
    }
}

fn key(stderr: bool, text: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (stderr, text).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const MS: Duration = Duration::from_millis(1);

    fn line(text: &str) -> Line<'_> {
        Line {
            rank: None,
            stderr: false,
            text: text.as_bytes(),
        }
    }

    fn folded(lines: &[(u32, &str)], ranks: usize) -> Vec<(Vec<u32>, String)> {
        let mut fold = Fold::new(100 * MS, ranks);
        for (rank, text) in lines {
            fold.push(Duration::ZERO, *rank, &line(text));
        }
        std::iter::from_fn(|| fold.pop())
            .map(|g| (g.ranks, String::from_utf8(g.text).unwrap()))
            .collect()
    }

    #[test]
    fn equal_lines_meet_and_each_rank_keeps_its_order() {
        let lines = [(0, "a"), (0, "b"), (1, "a"), (2, "a"), (1, "b"), (2, "c")];
        let expected = [(vec![0, 1, 2], "a"), (vec![0, 1], "b"), (vec![2], "c")];
        assert_eq!(folded(&lines, 9), expected.map(|(r, t)| (r, t.to_string())));
        // Rank 1 said b before a: its a must not go up to the first group.
        let crossed = [(0, "a"), (0, "b"), (1, "b"), (1, "a")];
        let expected = [(vec![0], "a"), (vec![0, 1], "b"), (vec![1], "a")];
        assert_eq!(
            folded(&crossed, 9),
            expected.map(|(r, t)| (r, t.to_string()))
        );
        // The same line twice is two lines.
        let twice = [(0, "a"), (0, "a"), (1, "a"), (1, "a")];
        assert_eq!(
            folded(&twice, 9),
            [(vec![0, 1], "a".into()), (vec![0, 1], "a".into())]
        );
    }

    #[test]
    fn a_line_waits_for_the_others_but_not_longer_than_the_window() {
        let mut fold = Fold::new(100 * MS, 2);
        fold.push(7 * MS, 0, &line("a"));
        assert_eq!(fold.due(106 * MS), None);
        assert_eq!(fold.deadline(), Some(107 * MS));
        assert!(fold.due(107 * MS).is_some());
        // With all ranks there is nothing to wait for.
        fold.push(110 * MS, 1, &line("a"));
        fold.push(111 * MS, 0, &line("a"));
        assert_eq!(fold.due(111 * MS).unwrap().ranks, [1, 0]);
        assert_eq!((fold.due(999 * MS), fold.deadline()), (None, None));
        assert!(fold.by_line.is_empty() && fold.bytes == 0);
    }

    #[test]
    fn own_words_wait_for_what_came_before_and_join_nothing() {
        let mut fold = Fold::new(100 * MS, 2);
        fold.push(Duration::ZERO, 0, &line("a"));
        fold.own(MS, "a");
        fold.push(2 * MS, 0, &line("a"));
        assert_eq!(fold.due(2 * MS), None);
        fold.push(3 * MS, 1, &line("a"));
        assert_eq!(fold.due(3 * MS).unwrap().ranks, [0, 1]);
        assert!(fold.due(3 * MS).unwrap().ranks.is_empty());
        fold.push(4 * MS, 1, &line("a"));
        assert_eq!(fold.due(4 * MS).unwrap().ranks, [0, 1]);
        assert!(fold.by_line.is_empty() && fold.bytes == 0);
    }

    #[test]
    fn a_flood_is_not_held_back() {
        let mut fold = Fold::new(100 * MS, 3);
        for i in 0..2 * MAX_GROUPS {
            fold.push(Duration::ZERO, 0, &line(&i.to_string()));
        }
        let out = std::iter::from_fn(|| fold.due(Duration::ZERO)).count();
        assert_eq!(out, MAX_GROUPS);
        fold.push(Duration::ZERO, 1, &line(&"x".repeat(MAX_BYTES)));
        while fold.due(Duration::ZERO).is_some() {}
        assert!(fold.bytes <= MAX_BYTES);
    }

    #[test]
    fn stdout_and_stderr_are_not_folded() {
        let mut fold = Fold::new(100 * MS, 2);
        let stderr = true;
        fold.push(Duration::ZERO, 0, &line("a"));
        fold.push(
            Duration::ZERO,
            1,
            &Line {
                stderr,
                ..line("a")
            },
        );
        assert_eq!(fold.pop().unwrap().ranks, [0]);
        assert_eq!(fold.pop().unwrap().ranks, [1]);
    }

    proptest! {
        /// Against the model: what each rank said, in order.
        #[test]
        fn no_line_is_lost_doubled_reordered_or_late(
            steps in proptest::collection::vec((0u32..5, 0usize..4, 0u32..60), 0..200),
            ranks in 2usize..6,
        ) {
            let texts = ["", "a", "b", "epoch 1"];
            let window = 100 * MS;
            let mut fold = Fold::new(window, ranks);
            let mut said: BTreeMap<u32, Vec<(&str, Duration)>> = BTreeMap::new();
            let mut shown: BTreeMap<u32, Vec<(String, Duration)>> = BTreeMap::new();
            let mut show = |group: Group, now| {
                let mut seen = group.ranks.clone();
                seen.sort_unstable();
                seen.dedup();
                assert_eq!(seen.len(), group.ranks.len());
                for rank in group.ranks {
                    shown.entry(rank).or_default().push((String::from_utf8(group.text.clone()).unwrap(), now));
                }
            };
            let mut now = Duration::ZERO;
            for (rank, text, wait) in steps {
                let next = now + wait * MS;
                // As the thread that shows them does: it wakes at every deadline.
                while let Some(deadline) = fold.deadline().filter(|d| *d <= next) {
                    while let Some(group) = fold.due(deadline) { show(group, deadline); }
                }
                now = next;
                said.entry(rank).or_default().push((texts[text], now));
                fold.push(now, rank, &line(texts[text]));
                while let Some(group) = fold.due(now) { show(group, now); }
            }
            while let Some(group) = fold.pop() { show(group, now); }
            prop_assert_eq!(said.keys().collect::<Vec<_>>(), shown.keys().collect::<Vec<_>>());
            for (rank, said) in said {
                let shown = &shown[&rank];
                prop_assert_eq!(said.len(), shown.len());
                for ((text, at), (out, shown_at)) in said.iter().zip(shown) {
                    prop_assert_eq!(text, out);
                    prop_assert!(*shown_at >= *at && *shown_at - *at <= window);
                }
            }
        }
    }
}
