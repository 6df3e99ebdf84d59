//! Who is measured with whom, and who is to blame.
//!
//! As DLRover does it: first all nodes in pairs. A pair that fails, computes wrong or is slow leaves two
//! suspects; each is then paired with a node that did well elsewhere. Who is bad again is the culprit, and who
//! does well is cleared.

use super::ring::{self, Measured};
use crate::cluster::message::Finding;
use crate::text::count;

/// A group this much slower than the better ones is slow.
const SLOW: f64 = 2.0;
/// Memory differs less between equal machines than networks do.
const SLOW_MEMORY: f64 = 1.5;
/// Enough to clear or convict all suspects where at least a sixth of the nodes is well.
const MAX_ROUNDS: usize = 6;

/// What became of one group.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Numbers of the nodes.
    pub members: Vec<usize>,
    /// The slowest member's measurement with any member's wrong sum, or why the group failed.
    pub result: Result<Measured, String>,
}

impl Outcome {
    /// Of what the members of a group answered, in the order of `members`.
    pub fn new(members: Vec<usize>, answers: Vec<Result<Measured, String>>) -> Outcome {
        let wrong = answers.iter().flatten().find_map(|m| m.wrong.clone());
        let worse = |a: Result<Measured, String>, b: Result<Measured, String>| match (a, b) {
            (Ok(a), Ok(b)) => Ok(if a.gbit_s <= b.gbit_s { a } else { b }),
            // A member that only misses its neighbour knows less than one that says why.
            (Err(a), Err(b)) => Err(if ring::is_consequence(&a) { b } else { a }),
            (Err(e), _) | (_, Err(e)) => Err(e),
        };
        let result = answers
            .into_iter()
            .reduce(worse)
            .unwrap_or(Err("no member answered".into()));
        Outcome {
            members,
            result: result.map(|m| Measured { wrong, ..m }),
        }
    }

    fn is_bad(&self, usual: f64) -> bool {
        match &self.result {
            Ok(measured) => self.failed() || measured.gbit_s * SLOW < usual,
            Err(_) => true,
        }
    }

    fn failed(&self) -> bool {
        self.failure().is_some()
    }

    /// Why the group failed, or what it computed wrong.
    pub fn failure(&self) -> Option<&str> {
        match &self.result {
            Ok(measured) => measured.wrong.as_deref(),
            Err(e) => Some(e),
        }
    }
}

/// What is known about a node in the end.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Good,
    /// Slow with every partner, also with those that are not.
    Slow {
        gbit_s: f64,
        usual: f64,
    },
    /// Failed, or computed wrong, with every partner.
    Faulty(String),
    /// Bad, and there was no good partner to tell whose fault it is.
    Unclear(String),
}

impl Verdict {
    pub fn is_conviction(&self) -> bool {
        matches!(self, Verdict::Slow { .. } | Verdict::Faulty(_))
    }
}

/// The groups to measure next, each at the same time as the others of its round; none: everything is known.
/// `done` are the rounds so far.
pub fn next_round(num_nodes: usize, done: &[Vec<Outcome>]) -> Vec<Vec<usize>> {
    if num_nodes < 2 || done.len() >= MAX_ROUNDS {
        return Vec::new();
    }
    // Of three nodes no two pairs work at the same time, and one group of three would tell nothing.
    if num_nodes == 3 && done.len() < 3 {
        return vec![[[0, 1], [1, 2], [2, 0]][done.len()].to_vec()];
    }
    if done.is_empty() {
        let mut groups: Vec<Vec<usize>> =
            (0..num_nodes / 2).map(|i| vec![2 * i, 2 * i + 1]).collect();
        if num_nodes % 2 == 1 {
            groups
                .last_mut()
                .expect("two nodes or more")
                .push(num_nodes - 1);
        }
        return groups;
    }
    let usual = usual(num_nodes, done);
    let cleared = cleared(num_nodes, done, usual);
    let met = |a: usize, b: usize| {
        done.iter()
            .flatten()
            .any(|o| o.members.len() == 2 && o.members.contains(&a) && o.members.contains(&b))
    };
    let mut open: Vec<usize> = (0..num_nodes)
        .filter(|&n| !cleared[n] && convicted(n, done, &cleared).is_none())
        .collect();
    let mut groups = Vec::new();
    if cleared.contains(&true) {
        let mut helpers = (0..num_nodes).filter(|&n| cleared[n]);
        for suspect in open {
            groups.extend(helpers.next().map(|helper| vec![suspect, helper]));
        }
        // A path that was bad once may have been busy.
        let helpers: Vec<usize> = helpers.collect();
        for outcome in done.iter().flatten().filter(|o| o.is_bad(usual)) {
            let free = |m: &usize| helpers.contains(m) && !groups.iter().flatten().any(|g| g == m);
            let once = done
                .iter()
                .flatten()
                .filter(|o| o.members == outcome.members)
                .count()
                == 1;
            if once && outcome.members.iter().all(free) {
                groups.push(outcome.members.clone());
            }
        }
        return groups;
    }
    // Nobody is well yet: other pairs.
    while !open.is_empty() {
        let first = open.remove(0);
        if let Some(at) = open.iter().position(|&other| !met(first, other)) {
            groups.push(vec![first, open.remove(at)]);
        }
    }
    groups
}

/// A verdict for each node, when [`next_round`] has no more.
pub fn judge(num_nodes: usize, done: &[Vec<Outcome>]) -> Vec<Verdict> {
    let usual = usual(num_nodes, done);
    let cleared = cleared(num_nodes, done, usual);
    let verdict = |node: usize| {
        if cleared[node] {
            return Verdict::Good;
        }
        let all = done.iter().flatten().rev();
        let mut own = all.filter(|o| o.members.contains(&node));
        match convicted(node, done, &cleared) {
            Some(Guilt::Fails) => {
                let text = own.find_map(Outcome::failure).unwrap_or_default();
                Verdict::Faulty(text.into())
            }
            Some(Guilt::Slow) => {
                let mut right = own.filter_map(|o| o.result.as_ref().ok().filter(|_| !o.failed()));
                let gbit_s = right.next().map_or(0.0, |measured| measured.gbit_s);
                Verdict::Slow { gbit_s, usual }
            }
            None => match own.next().map(|o| (o.failure(), &o.result)) {
                None => Verdict::Good,
                Some((None, Ok(measured))) => Verdict::Unclear(format!(
                    "{:.2} Gbit/s, {usual:.2} elsewhere",
                    measured.gbit_s
                )),
                Some((text, _)) => Verdict::Unclear(text.unwrap_or_default().into()),
            },
        }
    };
    (0..num_nodes).map(verdict).collect()
}

/// Did well at least once.
fn cleared(num_nodes: usize, done: &[Vec<Outcome>], usual: f64) -> Vec<bool> {
    let good = |node| {
        done.iter()
            .flatten()
            .any(|o| o.members.contains(&node) && !o.is_bad(usual))
    };
    (0..num_nodes).map(good).collect()
}

/// What a node was found to do.
enum Guilt {
    Slow,
    Fails,
}

/// Was the only one in a bad group that never did well. Twice at least: once, it may have been the path. A failure
/// beside another that fails says nothing of its speed, and a slow group nothing of its sums.
///
/// Who never got a sum right is also found among nodes that are merely slow, which says nothing about their sums.
fn convicted(node: usize, done: &[Vec<Outcome>], cleared: &[bool]) -> Option<Guilt> {
    if cleared[node] {
        return None;
    }
    let of = |n: usize| {
        done.iter()
            .flatten()
            .filter(move |o| o.members.contains(&n))
    };
    let others = |o: &'_ Outcome, are: &dyn Fn(usize) -> bool| {
        o.members.iter().all(|&m| m == node || are(m))
    };
    let is_right = |n: usize| of(n).any(|o| !o.failed());
    let alone = |o: &&Outcome| others(o, &|m| cleared[m]);
    let fails = of(node).any(|o| o.failed() && alone(&o))
        || !is_right(node) && of(node).any(|o| others(o, &is_right));
    if fails && of(node).count() >= 2 {
        return Some(Guilt::Fails);
    }
    let slow = || of(node).filter(|o| !o.failed());
    (slow().any(|o| alone(&o)) && slow().count() >= 2).then_some(Guilt::Slow)
}

/// The upper quartile of the first measurements: half of the groups may be bad without it being so.
fn usual(num_nodes: usize, done: &[Vec<Outcome>]) -> f64 {
    let first = if num_nodes == 3 { 3 } else { 1 };
    let measured = done.iter().take(first).flatten();
    upper_quartile(
        measured
            .filter_map(|o| o.result.as_ref().ok())
            .map(|m| m.gbit_s)
            .collect(),
    )
}

fn upper_quartile(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() * 3 / 4).copied().unwrap_or(0.0)
}

/// A verdict in words, unless the node is well, or nobody knows.
pub fn conviction(host: &str, verdict: &Verdict) -> Option<Finding> {
    match verdict {
        Verdict::Good | Verdict::Unclear(_) => None,
        Verdict::Slow { gbit_s, usual } => Some(Finding::error(
            "network",
            format!("{host} is slow with every partner: {gbit_s:.2} Gbit/s, others {usual:.2}"),
            "all ranks wait for it: leave it out, or look at its link (ethtool, ibstat), its cables and its load",
        )),
        Verdict::Faulty(e) => Some(Finding::error(
            "network",
            format!("{host} fails with every partner: {e}"),
            "leave it out, or look at its network, firewall and kernel log",
        )),
    }
}

/// Groups that did badly, the last time that they were measured, for no fault of a single node; where all did well,
/// how well. A group that fails is an error, one that is slow a warning.
pub fn findings(hosts: &[String], done: &[Vec<Outcome>]) -> Vec<Finding> {
    let usual = usual(hosts.len(), done);
    let mut found = Vec::new();
    let verdicts = judge(hosts.len(), done);
    let all: Vec<&Outcome> = done.iter().flatten().collect();
    for (i, outcome) in all.iter().enumerate() {
        let again = all[i + 1..].iter().any(|o| o.members == outcome.members);
        if again || !outcome.is_bad(usual) {
            continue;
        }
        let is =
            |wanted: fn(&Verdict) -> bool| outcome.members.iter().all(|&m| wanted(&verdicts[m]));
        let names: Vec<&str> = outcome.members.iter().map(|&m| hosts[m].as_str()).collect();
        let names = names.join(" and ");
        let what = match (&outcome.result, outcome.failure()) {
            (Ok(measured), None) => format!("{:.2} Gbit/s, others {usual:.2}", measured.gbit_s),
            (_, failure) => failure.unwrap_or_default().to_string(),
        };
        let finding = |text: String, hint: &str| match outcome.failure() {
            Some(_) => Finding::error("network", text, hint),
            None => Finding::warning("network", text, hint),
        };
        if is(|v| *v == Verdict::Good) {
            found.push(finding(
                format!("{names} did badly together, and each well with another node: {what}"),
                "look at the path between them (switch, routes, firewall), or measure again",
            ));
        } else if is(|v| matches!(v, Verdict::Unclear(_))) {
            found.push(finding(
                format!("{names} did badly together: {what}"),
                "no other node is well, so which of them it is cannot be told: look at both",
            ));
        }
    }
    let convicted = hosts
        .iter()
        .zip(&verdicts)
        .any(|(host, v)| conviction(host, v).is_some());
    let figures = || {
        let measured = all.iter().filter_map(|o| o.result.as_ref().ok());
        measured.map(|m| m.gbit_s)
    };
    if found.is_empty() && !convicted && !all.is_empty() {
        let text = format!(
            "{} nodes in {}: {} Gbit/s, every sum is right",
            hosts.len(),
            count(all.len(), "group"),
            range(figures())
        );
        found.push(Finding::ok("network", text));
    }
    found
}

/// `9.50 to 9.80`, or `9.80` where there is nothing between; `none` of none.
pub fn range(figures: impl Iterator<Item = f64>) -> String {
    let text = |figure: f64| format!("{figure:.2}");
    let (low, high) = figures.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), figure| {
        (low.min(figure), high.max(figure))
    });
    match (text(low), text(high)) {
        _ if low > high => "none".into(),
        (low, high) if low == high => low,
        (low, high) => format!("{low} to {high}"),
    }
}

/// Warns of nodes whose memory is slower than the others' (GB/s each).
pub fn judge_memory(nodes: &[(String, f64)]) -> Vec<Finding> {
    let usual = upper_quartile(nodes.iter().map(|(_, gbyte_s)| *gbyte_s).collect());
    let slow = nodes
        .iter()
        .filter(|(_, gbyte_s)| gbyte_s * SLOW_MEMORY < usual);
    let warning = |(host, gbyte_s): &(String, f64)| {
        let text =
            format!("the memory of {host} is slow: it copies {gbyte_s:.1} GB/s, others {usual:.1}");
        Finding::warning(
            "memory",
            text,
            "look for another program on it, for missing memory modules, or for low clocks",
        )
    };
    slow.map(warning).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::message::Severity;
    use proptest::prelude::*;
    use std::collections::HashSet;
    use std::time::Duration;

    fn measured(gbit_s: f64) -> Measured {
        Measured {
            seconds: 1.0 / gbit_s,
            gbit_s,
            round_trip: Duration::from_micros(50),
            wrong: None,
        }
    }

    /// Measures until nothing is left to measure.
    fn play(
        num_nodes: usize,
        result: impl Fn(&[usize]) -> Result<Measured, String>,
    ) -> Vec<Vec<Outcome>> {
        let mut done: Vec<Vec<Outcome>> = Vec::new();
        loop {
            let groups = next_round(num_nodes, &done);
            if groups.is_empty() {
                return done;
            }
            let mut seen = HashSet::new();
            assert!(
                groups.iter().flatten().all(|m| seen.insert(*m)),
                "twice in a round: {groups:?}"
            );
            let outcome = |members: Vec<usize>| Outcome {
                result: result(&members),
                members,
            };
            done.push(groups.into_iter().map(outcome).collect());
        }
    }

    fn slow(bad: &[usize]) -> impl Fn(&[usize]) -> Result<Measured, String> {
        let bad = bad.to_vec();
        move |members| {
            Ok(measured(if members.iter().any(|m| bad.contains(m)) {
                2.0
            } else {
                10.0
            }))
        }
    }

    fn dead(bad: &[usize]) -> impl Fn(&[usize]) -> Result<Measured, String> {
        let bad = bad.to_vec();
        move |members| {
            let found = members.iter().any(|m| bad.contains(m));
            if found {
                Err("no route".into())
            } else {
                Ok(measured(10.0))
            }
        }
    }

    #[test]
    fn every_node_is_in_a_pair_and_an_odd_number_makes_a_triple() {
        assert_eq!(next_round(6, &[]), [vec![0, 1], vec![2, 3], vec![4, 5]]);
        assert_eq!(next_round(5, &[]), [vec![0, 1], vec![2, 3, 4]]);
        assert_eq!(next_round(1, &[]), Vec::<Vec<usize>>::new());
        assert_eq!(
            play(8, slow(&[])).len(),
            1,
            "all is well: one round is enough"
        );
    }

    #[test]
    fn a_partner_of_a_bad_node_is_not_to_blame() {
        let done = play(6, slow(&[3]));
        assert_eq!(done[1].len(), 2, "{:?}", done[1]);
        let verdicts = judge(6, &done);
        assert_eq!(
            verdicts[3],
            Verdict::Slow {
                gbit_s: 2.0,
                usual: 10.0
            }
        );
        assert_eq!(verdicts.iter().filter(|v| **v == Verdict::Good).count(), 5);
    }

    fn wrong(gbit_s: f64) -> Result<Measured, String> {
        let wrong = Some("1 of 8 sums is wrong".into());
        Ok(Measured {
            wrong,
            ..measured(gbit_s)
        })
    }

    #[test]
    fn who_was_slow_once_and_then_met_the_one_that_sums_up_wrong_is_well() {
        let was_slow = std::cell::Cell::new(false);
        let done = play(4, |members| match members {
            members if members.contains(&1) => wrong(9.0),
            [2, 3] if !was_slow.replace(true) => Ok(measured(2.0)),
            _ => Ok(measured(9.0)),
        });
        let verdicts = judge(4, &done);
        assert_eq!(verdicts[1], Verdict::Faulty("1 of 8 sums is wrong".into()));
        for other in [0, 2, 3] {
            assert_eq!(verdicts[other], Verdict::Good, "{done:?}");
        }
    }

    #[test]
    fn who_sums_up_wrong_is_found_also_among_nodes_that_are_slow() {
        // The wrong sum came quickly, and everything after it slowly, as on a busy machine.
        let outcome = |a, b, result| Outcome {
            members: vec![a, b],
            result,
        };
        let done = vec![
            vec![outcome(0, 1, wrong(9.0)), outcome(2, 3, Ok(measured(2.0)))],
            vec![outcome(0, 2, Ok(measured(2.0))), outcome(1, 3, wrong(2.0))],
            vec![outcome(0, 3, Ok(measured(2.0))), outcome(1, 2, wrong(2.0))],
        ];
        let verdicts = judge(4, &done);
        assert_eq!(verdicts[1], Verdict::Faulty("1 of 8 sums is wrong".into()));
        for other in [0, 2, 3] {
            assert!(
                matches!(verdicts[other], Verdict::Unclear(_)),
                "{verdicts:?}"
            );
        }
    }

    #[test]
    fn one_of_three_is_found() {
        for bad in 0..3 {
            let verdicts = judge(3, &play(3, slow(&[bad])));
            assert_eq!(
                verdicts[bad],
                Verdict::Slow {
                    gbit_s: 2.0,
                    usual: 10.0
                }
            );
            assert_eq!(verdicts.iter().filter(|v| **v == Verdict::Good).count(), 2);
        }
    }

    #[test]
    fn of_two_nodes_none_can_be_blamed() {
        let done = play(2, dead(&[1]));
        assert_eq!(
            judge(2, &done),
            vec![Verdict::Unclear("no route".into()); 2]
        );
        let found = findings(&["a".into(), "b".into()], &done);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].text, "a and b did badly together: no route");
    }

    #[test]
    fn a_bad_path_blames_no_node() {
        let path = |members: &[usize]| {
            let bad = members.contains(&0) && members.contains(&1);
            Ok(measured(if bad { 1.0 } else { 10.0 }))
        };
        let done = play(4, path);
        assert_eq!(judge(4, &done), vec![Verdict::Good; 4]);
        let hosts = ["a", "b", "c", "d"].map(String::from);
        let found = findings(&hosts, &done);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].text.starts_with(
            "a and b did badly together, and each well with another node: 1.00 Gbit/s"
        ));
        assert_eq!(found[0].severity, Severity::Warning);
        let together = done.iter().flatten().filter(|o| o.members == [0, 1]);
        assert_eq!(together.count(), 2, "it got a second try: {done:?}");
        let cut = |members: &[usize]| match members.contains(&0) && members.contains(&1) {
            true => Err("no route".into()),
            false => Ok(measured(10.0)),
        };
        let found = findings(&hosts, &play(4, cut));
        assert_eq!(found[0].severity, Severity::Error, "{found:?}");
    }

    #[test]
    fn a_path_that_was_busy_once_is_no_bad_path() {
        let tries = std::cell::Cell::new(0);
        let path = |members: &[usize]| {
            let first = members == [0, 1] && tries.replace(tries.get() + 1) == 0;
            Ok(measured(if first { 1.0 } else { 10.0 }))
        };
        let done = play(4, path);
        let found = findings(&["a", "b", "c", "d"].map(String::from), &done);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(
            found[0].text,
            "4 nodes in 5 groups: 1.00 to 10.00 Gbit/s, every sum is right"
        );
    }

    #[test]
    fn a_wrong_sum_counts_however_quick() {
        let wrong = |members: &[usize]| {
            let wrong = members
                .contains(&2)
                .then(|| "1 of 8 sums are wrong".to_string());
            Ok(Measured {
                wrong,
                ..measured(10.0)
            })
        };
        let done = play(4, wrong);
        assert_eq!(
            judge(4, &done)[2],
            Verdict::Faulty("1 of 8 sums are wrong".into())
        );
        assert_eq!(judge(4, &done)[3], Verdict::Good);
    }

    #[test]
    fn the_worst_answer_of_a_group_counts() {
        let left = || Err("a neighbour left: early eof".to_string());
        let cause = || Err("cannot connect to 10.0.0.1:5".to_string());
        assert_eq!(
            Outcome::new(vec![0, 1], vec![left(), cause()]).result,
            cause()
        );
        assert_eq!(
            Outcome::new(vec![0, 1], vec![Ok(measured(3.0)), left()]).result,
            left()
        );
        let wrong = Measured {
            wrong: Some("wrong".into()),
            ..measured(9.0)
        };
        let both = Outcome::new(vec![0, 1], vec![Ok(measured(3.0)), Ok(wrong)])
            .result
            .unwrap();
        assert_eq!((both.gbit_s, both.wrong.as_deref()), (3.0, Some("wrong")));
    }

    #[test]
    fn slow_memory_is_named() {
        let nodes =
            [("a", 100.0), ("b", 95.0), ("c", 60.0), ("d", 105.0)].map(|(h, v)| (h.to_string(), v));
        let found = judge_memory(&nodes);
        assert_eq!(found.len(), 1);
        assert!(
            found[0]
                .text
                .starts_with("the memory of c is slow: it copies 60.0 GB/s, others 105.0"),
            "{found:?}"
        );
    }

    proptest! {
        /// Up to a third of the nodes may be bad: all of them are found and nobody else is blamed.
        #[test]
        fn the_culprits_and_only_they(num_nodes in 4usize..40, picks in proptest::collection::vec(0usize..40, 0..13), fails: bool) {
            let bad: HashSet<usize> = picks.iter().map(|p| p % num_nodes).take(num_nodes / 3).collect();
            let list: Vec<usize> = bad.iter().copied().collect();
            let done = if fails { play(num_nodes, dead(&list)) } else { play(num_nodes, slow(&list)) };
            // Where every group has a bad node, none shows what is usual.
            prop_assume!(done[0].iter().any(|o| o.members.iter().all(|m| !bad.contains(m))) || fails);
            prop_assume!(fails || done[0].iter().filter(|o| o.members.iter().any(|m| bad.contains(m))).count() * 4 <= done[0].len() * 3);
            for (node, verdict) in judge(num_nodes, &done).iter().enumerate() {
                prop_assert_eq!(*verdict != Verdict::Good, bad.contains(&node), "{} {:?} {:?}", node, verdict, list);
                prop_assert!(!matches!(verdict, Verdict::Unclear(_)), "{} {:?} {:?}", node, verdict, list);
            }
        }
    }
}
