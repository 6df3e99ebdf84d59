//! What the network reaches of what its links promise. Where all nodes are slow, none of them is the others' yardstick.

use std::collections::BTreeMap;

use super::schedule::Outcome;
use crate::cluster::message::Finding;

/// A group that reaches less than this part of what its slowest end promises is told of. The usual fault is a link that
/// came up at a tenth of its speed; one stream of TCP through a healthy one seldom comes below half.
const POOR: f64 = 0.25;

/// Where one node of a group is connected.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct End {
    pub host: String,
    pub interface: String,
    /// What the kernel says of the interface.
    pub stated_gbit_s: Option<f64>,
    /// What the node itself can do: no faster through the loopback interface.
    pub loopback_gbit_s: Option<f64>,
}

/// Speeds in Mbit/s of this machine's network cards. Of bonds, bridges and other virtual interfaces the kernel says
/// nothing that a single stream could reach, or a number that somebody made up.
pub fn speeds() -> BTreeMap<String, u32> {
    let all = fs_err::read_dir("/sys/class/net").into_iter().flatten();
    let known = all.flatten().filter_map(|entry| {
        let path = entry.path();
        let is_card = path.join("device").exists();
        let text = is_card.then(|| fs_err::read_to_string(path.join("speed")).ok())??;
        Some((entry.file_name().into_string().ok()?, stated(&text)?))
    });
    known.collect()
}

/// `-1` where it is not known, and 0 or 2^32 - 1 by some drivers.
fn stated(text: &str) -> Option<u32> {
    let speed = text.trim().parse().ok()?;
    (speed > 0 && speed < u32::MAX).then_some(speed)
}

/// Warns of groups that did poorly the last time that they were measured, by what they measured over TCP.
pub fn findings<'a>(ends: &[End], done: impl Iterator<Item = &'a Outcome>) -> Vec<Finding> {
    let all: Vec<&Outcome> = done.collect();
    let last = all.iter().enumerate().filter(|(i, outcome)| {
        let again = &all[i + 1..];
        !again.iter().any(|later| later.members == outcome.members)
    });
    last.filter_map(|(_, outcome)| finding(ends, outcome))
        .collect()
}

fn finding(ends: &[End], outcome: &Outcome) -> Option<Finding> {
    let reached = outcome.result.as_ref().ok()?.gbit_s;
    let members = || outcome.members.iter().map(|&member| &ends[member]);
    let stated = members().filter_map(|end| Some((end, end.stated_gbit_s?)));
    let (slowest, promised) = stated.min_by(|(_, a), (_, b)| a.total_cmp(b))?;
    let able = members().filter_map(|end| end.loopback_gbit_s);
    let expected = able.fold(promised, f64::min);
    if reached >= expected * POOR {
        return None;
    }
    let names: Vec<&str> = members().map(|end| end.host.as_str()).collect();
    let End {
        host, interface, ..
    } = slowest;
    Some(Finding::warning(
        "network",
        format!(
            "{} reach {reached:.2} Gbit/s together, and {interface} on {host} is a link of {promised} Gbit/s",
            names.join(" and ")
        ),
        format!(
            "look at errors and speed of the links (ethtool {interface}, ethtool -S {interface}), at the switches between, \
             and for other traffic"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::super::Measured;
    use super::*;
    use std::time::Duration;

    fn end(host: &str, stated_gbit_s: Option<f64>, loopback: f64) -> End {
        End {
            host: host.into(),
            interface: "eth0".into(),
            stated_gbit_s,
            loopback_gbit_s: Some(loopback),
        }
    }

    fn pair(gbit_s: f64) -> Outcome {
        let measured = Measured {
            seconds: 1.0,
            gbit_s,
            round_trip: Duration::ZERO,
            wrong: None,
        };
        Outcome::new(vec![0, 1], vec![Ok(measured.clone()), Ok(measured)])
    }

    #[test]
    fn two_slow_nodes_are_told_by_what_their_links_promise() {
        let (fast, slow) = (end("a", Some(25.0), 60.0), end("b", Some(10.0), 60.0));
        let of = |ends: &[End], gbit_s| findings(ends, [pair(gbit_s)].iter());
        let both = [fast.clone(), slow];
        let text = of(&both, 0.94)[0].to_string();
        let said = "a and b reach 0.94 Gbit/s together, and eth0 on b is a link of 10 Gbit/s";
        assert!(
            text.starts_with(said) && text.contains("ethtool eth0"),
            "{text}"
        );
        assert_eq!(of(&both, 2.5), []);
        // A machine that is too slow for its link, as most are for the fastest ones, is no broken link.
        let wide = [end("a", Some(400.0), 30.0), end("b", Some(400.0), 24.0)];
        assert_eq!(of(&wide, 6.0), []);
        assert_eq!(of(&wide, 5.0).len(), 1);
        // Nothing is known of one, or of both.
        assert_eq!(of(&[fast, end("c", None, 60.0)], 0.94).len(), 1);
        assert_eq!(of(&[end("c", None, 60.0), end("d", None, 60.0)], 0.01), []);
    }

    #[test]
    fn the_last_measurement_counts_and_one_that_failed_does_not() {
        let ends = [end("a", Some(10.0), 60.0), end("b", Some(10.0), 60.0)];
        let of = |done: &[Outcome]| findings(&ends, done.iter()).len();
        assert_eq!(of(&[pair(0.5), pair(9.0)]), 0);
        assert_eq!(of(&[pair(9.0), pair(0.5)]), 1);
        let failed = Outcome::new(vec![0, 1], vec![Err("refused".into())]);
        assert_eq!(of(&[failed]), 0);
    }

    #[test]
    fn what_the_kernel_does_not_know_is_no_speed() {
        for text in ["-1\n", "0\n", "4294967295\n", "", "fast"] {
            assert_eq!(stated(text), None, "{text:?}");
        }
        assert_eq!(stated("25000\n"), Some(25_000));
        // Loopback is no card.
        assert!(!speeds().contains_key("lo"));
    }
}
