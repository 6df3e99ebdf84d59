//! The GPUs and their driver: whether they do for a job.

mod read;

use std::time::Duration;

use super::kmsg::{self, Xid};
use crate::cluster::message::Finding;
use crate::text::{count, size};
pub use read::read;

/// A context, a display server or the like take this much of a GPU.
const LITTLE_MEMORY: u64 = 1 << 30;
/// The clocks fall when a GPU comes this close to its limit.
const NEAR_SLOWDOWN: u32 = 3;

/// What the driver says.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    pub driver: Option<String>,
    /// Newest CUDA that the driver supports, as `12.8`.
    pub cuda: Option<String>,
    /// Why the driver cannot be asked, where the kernel module is loaded.
    pub broken: Option<String>,
    /// GPUs of this machine that do not work, each with the reason.
    pub lost: Vec<String>,
    /// Those of the job.
    pub cards: Vec<Card>,
    /// `None`: the kernel's log may not be read.
    pub xids: Option<Vec<Xid>>,
    /// When the log was read, since the start of the machine.
    pub now: Duration,
}

/// The state of one GPU; what it does not support is `None` or empty.
#[derive(Clone, Debug, Default)]
pub struct Card {
    pub id: String,
    pub name: String,
    /// Why it does not answer.
    pub broken: Option<String>,
    /// Memory errors since the driver was loaded that could not be corrected.
    pub uncorrected: Option<u64>,
    /// Broken memory waits to be taken out of use by a reset.
    pub repair_pending: bool,
    /// Broken memory could not be taken out of use.
    pub repair_failed: bool,
    pub slowed_by: Vec<&'static str>,
    pub temperature: Option<u32>,
    pub slows_at: Option<u32>,
    pub mem_free: u64,
    pub mem_total: u64,
    /// Other programs that compute on it: pid, name, memory.
    pub users: Vec<(u32, String, u64)>,
    pub persistent: Option<bool>,
    /// While it runs at full performance: idle, it saves power.
    pub pcie: Option<Pcie>,
}

/// The connection of a GPU, each as it is and at best in this slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pcie {
    pub generation: (u32, u32),
    pub lanes: (u32, u32),
}

impl Pcie {
    fn is_reduced(self) -> bool {
        self.generation.0 < self.generation.1 || self.lanes.0 < self.lanes.1
    }
}

pub fn judge(reading: &Reading) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some(e) = &reading.broken {
        let text =
            format!("the NVIDIA kernel module is loaded, but its library cannot be used: {e}");
        let hint = "compare `cat /proc/driver/nvidia/version` with libnvidia-ml.so.1; after an update of the driver restart the machine";
        found.push(Finding::error("gpu", text, hint));
    }
    for text in &reading.lost {
        let hint = "look at the kernel log (dmesg | grep NVRM); a restart of the machine may bring it back";
        found.push(Finding::warning(
            "gpu",
            format!("a GPU of this machine does not work: {text}"),
            hint,
        ));
    }
    for card in &reading.cards {
        found.extend(judge_card(card));
    }
    found.extend(kmsg::judge(
        reading.xids.as_deref().unwrap_or_default(),
        reading.now,
    ));
    match &reading.driver {
        Some(driver) => found.push(Finding::ok("gpu", summary(reading, driver))),
        None if reading.broken.is_some() => {}
        None => found.push(Finding::ok(
            "gpu",
            "no NVIDIA driver is loaded: workers can only run on the CPU",
        )),
    }
    if !reading.cards.is_empty() && reading.xids.is_none() {
        found.push(Finding::ok(
            "gpu",
            "the kernel's log of GPU faults may not be read by this user",
        ));
    }
    found
}

fn summary(reading: &Reading, driver: &str) -> String {
    let cuda = reading
        .cuda
        .as_ref()
        .map_or(String::new(), |v| format!(" (up to CUDA {v})"));
    let driver = format!("driver {driver}{cuda}");
    let Some(first) = reading.cards.first() else {
        return driver;
    };
    let mut names: Vec<&str> = reading.cards.iter().map(|c| c.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let (number, names) = (reading.cards.len(), names.join(", "));
    let hottest = reading.cards.iter().filter_map(|c| c.temperature).max();
    let hottest = hottest.map_or(String::new(), |t| format!(", {t} °C at most"));
    let off = reading.cards.iter().any(|c| c.persistent == Some(false));
    let off = if off {
        "; persistence mode is off, so starts take longer (nvidia-smi -pm 1)"
    } else {
        ""
    };
    let memory = size(first.mem_total);
    format!("{number} x {names} with {memory}{hottest}, {driver}{off}")
}

fn judge_card(card: &Card) -> Vec<Finding> {
    let id = format!("GPU {}", card.id);
    let mut found = Vec::new();
    let mut warn = |text: String, hint: &str| {
        found.push(Finding::warning("gpu", format!("{id}: {text}"), hint))
    };
    if let Some(e) = &card.broken {
        let text = format!("{id} ({}) cannot be used: {e}", card.name);
        let hint = "leave it out (--gpus, CUDA_VISIBLE_DEVICES), reset it (nvidia-smi -r) or restart the machine";
        return vec![Finding::error("gpu", text, hint)];
    }
    if card.repair_pending {
        let hint = "reset it when nothing runs on it: nvidia-smi -r";
        warn(
            "broken memory waits for a reset to be taken out of use".into(),
            hint,
        );
    }
    if let Some(n @ 1..) = card.uncorrected {
        let errors = count(n, "memory error");
        let hint = "a job on it may have failed for this; reset it (nvidia-smi -r), and replace it if they return";
        warn(
            format!("{errors} that could not be corrected since the driver was loaded"),
            hint,
        );
    }
    if !card.slowed_by.is_empty() {
        let at = card
            .temperature
            .map_or(String::new(), |t| format!(" at {t} °C"));
        let hint = "all ranks wait for the slowest; look at its cooling and power, see nvidia-smi -q -d PERFORMANCE";
        warn(
            format!(
                "its clocks are held down by {}{at}",
                card.slowed_by.join(" and ")
            ),
            hint,
        );
    } else if let (Some(now), Some(limit)) = (card.temperature, card.slows_at)
        && now + NEAR_SLOWDOWN >= limit
    {
        warn(
            format!("{now} °C; its clocks fall at {limit} °C"),
            "look at its cooling, see nvidia-smi -q -d TEMPERATURE",
        );
    }
    if let Some(pcie) = card.pcie.filter(|pcie| pcie.is_reduced()) {
        let (generation, lanes) = (pcie.generation, pcie.lanes);
        warn(
            format!(
                "its PCIe link runs at generation {} with {} lanes; the slot has {} with {}",
                generation.0, lanes.0, generation.1, lanes.1
            ),
            "batches and sums over several nodes go that way; reseat it, or look at its riser and the BIOS, see lspci -vv",
        );
    }
    let used = card.mem_total.saturating_sub(card.mem_free);
    if !card.users.is_empty() {
        let user = |(pid, name, bytes): &(u32, String, u64)| {
            let memory = if *bytes > 0 {
                format!(" with {}", size(*bytes))
            } else {
                String::new()
            };
            format!("{pid} ({name}){memory}")
        };
        let users: Vec<String> = card.users.iter().map(user).collect();
        let (free, total) = (size(card.mem_free), size(card.mem_total));
        let processes = if users.len() == 1 {
            "process"
        } else {
            "processes"
        };
        let text = format!(
            "in use by {processes} {}; {free} of {total} are free",
            users.join(", ")
        );
        warn(text, "end what is left of another job, or take other GPUs");
    } else if used > card.mem_total / 20 + LITTLE_MEMORY {
        let (used, total) = (size(used), size(card.mem_total));
        let hint = "a process of another container or a dying one may hold it: nvidia-smi, fuser -v /dev/nvidia*";
        warn(
            format!("{used} of {total} are in use by no process that is visible here"),
            hint,
        );
    }
    if card.repair_failed {
        let text = format!("{id}: broken memory could not be taken out of use");
        found.push(Finding::error(
            "gpu",
            text,
            "leave it out (--gpus, CUDA_VISIBLE_DEVICES) and have it replaced",
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::message::Severity::{self, Error, Ok as Good, Warning};

    fn good() -> Card {
        Card {
            id: "3".into(),
            name: "H200".into(),
            uncorrected: Some(0),
            temperature: Some(40),
            slows_at: Some(90),
            mem_free: 140 << 30,
            mem_total: 141 << 30,
            persistent: Some(true),
            pcie: Some(Pcie {
                generation: (5, 5),
                lanes: (16, 16),
            }),
            ..Card::default()
        }
    }

    fn severities(change: impl Fn(&mut Card)) -> Vec<Severity> {
        let mut card = good();
        change(&mut card);
        judge_card(&card).iter().map(|f| f.severity).collect()
    }

    #[test]
    fn the_state_of_a_card() {
        assert_eq!(severities(|_| {}), []);
        assert_eq!(severities(|c| c.uncorrected = Some(2)), [Warning]);
        assert_eq!(severities(|c| c.repair_pending = true), [Warning]);
        assert_eq!(severities(|c| c.repair_failed = true), [Error]);
        assert_eq!(severities(|c| c.slowed_by = vec!["heat"]), [Warning]);
        assert_eq!(severities(|c| c.temperature = Some(86)), []);
        assert_eq!(severities(|c| c.temperature = Some(87)), [Warning]);
        let link = |generation, lanes| Some(Pcie { generation, lanes });
        assert_eq!(severities(|c| c.pcie = link((5, 5), (8, 16))), [Warning]);
        assert_eq!(severities(|c| c.pcie = link((1, 5), (16, 16))), [Warning]);
        assert_eq!(severities(|c| c.pcie = None), [], "it is not told, or idle");
        assert_eq!(severities(|c| c.mem_free = 100 << 30), [Warning]);
        assert_eq!(severities(|c| c.broken = Some("lost".into())), [Error]);
        assert_eq!(severities(|c| *c = Card::default()), [], "a slice of a GPU");
    }

    #[test]
    fn who_uses_a_card_is_named() {
        let mut card = good();
        card.mem_free = 50 << 30;
        card.users = vec![
            (4711, "python".into(), 91 << 30),
            (12, "not visible from here".into(), 0),
        ];
        let found = judge_card(&card);
        assert_eq!(found.len(), 1);
        assert_eq!(
            found[0].text,
            "GPU 3: in use by processes 4711 (python) with 91.0 GiB, 12 (not visible from here); 50.0 GiB of 141 GiB are free"
        );
    }

    #[test]
    fn a_machine_with_good_gpus_and_one_without_have_a_line_each() {
        let none = judge(&Reading::default());
        assert_eq!((none.len(), none[0].severity), (1, Good));
        let reading = Reading {
            driver: Some("570.1".into()),
            cuda: Some("12.8".into()),
            cards: vec![good(), good()],
            xids: Some(Vec::new()),
            ..Reading::default()
        };
        let found = judge(&reading);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].severity, Good);
        assert_eq!(
            found[0].text,
            "2 x H200 with 141 GiB, 40 °C at most, driver 570.1 (up to CUDA 12.8)"
        );
        let broken = Reading {
            broken: Some("mismatch".into()),
            ..Reading::default()
        };
        let found = judge(&broken);
        assert_eq!((found.len(), found[0].severity), (1, Error));
    }
}
