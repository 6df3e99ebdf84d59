//! Clocks of the nodes against each other.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::cluster::message::Finding;

/// Files on a shared file system and log lines of two nodes are then out of order.
const MAX_OFFSET_MS: i64 = 1000;

/// A node's clock, read by a message.
#[derive(Clone, Debug)]
pub struct ClockSample {
    pub host: String,
    /// In milliseconds since 1970: by the node's clock when it wrote the message ...
    pub sent_ms: u64,
    /// ... and by the coordinator's when it arrived.
    pub received_ms: u64,
    /// To the node and back.
    pub rtt: Duration,
}

/// Milliseconds since 1970 by this node's clock.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_millis() as u64
}

/// A warning for each node whose clock is more than a second from the median of all nodes.
pub fn clock_findings(samples: &[ClockSample]) -> Vec<Finding> {
    let offset =
        |s: &ClockSample| s.sent_ms as i64 - s.received_ms as i64 + s.rtt.as_millis() as i64 / 2;
    let mut offsets: Vec<i64> = samples.iter().map(offset).collect();
    offsets.sort_unstable();
    let Some(&median) = offsets.get(offsets.len().saturating_sub(1) / 2) else {
        return Vec::new();
    };
    let warning = |s: &ClockSample| {
        let ahead = offset(s) - median;
        // What the way of the message may hide.
        let unsure = s.rtt.as_millis() as i64 / 2;
        (ahead.abs() > MAX_OFFSET_MS + unsure).then(|| {
            let (seconds, side) = (
                ahead.abs() as f64 / 1e3,
                if ahead > 0 { "ahead of" } else { "behind" },
            );
            let text = format!(
                "the clock of {} is {seconds:.1} s {side} those of the other nodes",
                s.host
            );
            Finding::warning(
                "clock",
                text,
                "start chrony or systemd-timesyncd there; times in logs do not compare",
            )
        })
    };
    samples.iter().filter_map(warning).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(host: &str, ahead_ms: i64, rtt_ms: u64) -> ClockSample {
        let received_ms = 1_700_000_000_000u64;
        ClockSample {
            host: host.into(),
            sent_ms: received_ms
                .checked_add_signed(ahead_ms - rtt_ms as i64 / 2)
                .unwrap(),
            received_ms,
            rtt: Duration::from_millis(rtt_ms),
        }
    }

    #[test]
    fn the_node_whose_clock_differs_is_named() {
        let all = [
            sample("a", 0, 2),
            sample("b", 10, 2),
            sample("c", -90_000, 4),
            sample("d", 1_500, 2),
        ];
        let texts: Vec<String> = clock_findings(&all).into_iter().map(|f| f.text).collect();
        assert_eq!(
            texts,
            [
                "the clock of c is 90.0 s behind those of the other nodes",
                "the clock of d is 1.5 s ahead of those of the other nodes"
            ]
        );
    }

    #[test]
    fn a_coordinator_with_a_wrong_clock_blames_nobody_and_a_slow_message_neither() {
        assert_eq!(
            clock_findings(&[sample("a", 60_000, 0), sample("b", 60_001, 0)]),
            []
        );
        assert_eq!(
            clock_findings(&[
                sample("a", 0, 0),
                sample("b", 1_900, 2_000),
                sample("c", 0, 0)
            ]),
            []
        );
        assert_eq!(clock_findings(&[]), []);
    }
}
