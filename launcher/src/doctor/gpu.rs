//! The GPUs and their driver, by NVIDIA's management library.

use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{
    EccCounter, MemoryError, TemperatureSensor, TemperatureThreshold,
};
use nvml_wrapper::enums::device::{SampleValue, UsedGpuMemory};
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id::{
    NVML_FI_DEV_REMAPPED_FAILURE, NVML_FI_DEV_REMAPPED_PENDING,
};
use nvml_wrapper::{Device, Nvml};
use std::time::Duration;

use super::kmsg::{self, Xid};
use super::{count, size};
use crate::cluster::message::Finding;
use crate::gpus::{self, Gpu};

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
}

pub fn read(wanted: &[Gpu]) -> Reading {
    let in_kernel = gpus::from_proc(gpus::PROC).len();
    let nvml = match gpus::nvml() {
        Ok(nvml) => nvml,
        Err(e) => {
            return Reading {
                broken: (in_kernel > 0).then(|| e.to_string()),
                ..Reading::default()
            };
        }
    };
    let number = nvml.device_count().unwrap_or(0);
    let mut lost: Vec<String> = (0..number)
        .filter_map(|i| {
            nvml.device_by_index(i)
                .err()
                .map(|e| format!("GPU {i}: {e}"))
        })
        .collect();
    if (number as usize) < in_kernel {
        let text = format!(
            "the kernel module lists {}, the driver's library {number}",
            count(in_kernel as u64, "GPU")
        );
        lost.push(text);
    }
    let cuda = nvml.sys_cuda_driver_version().ok();
    Reading {
        driver: nvml.sys_driver_version().ok(),
        cuda: cuda.map(|v| format!("{}.{}", v / 1000, v % 1000 / 10)),
        broken: None,
        lost,
        cards: wanted.iter().map(|gpu| card(&nvml, gpu)).collect(),
        xids: if number > 0 {
            kmsg::xids(Duration::ZERO)
        } else {
            None
        },
        now: kmsg::now(),
    }
}

fn card(nvml: &Nvml, gpu: &Gpu) -> Card {
    let mut card = Card {
        id: gpu.id.clone(),
        name: gpu.name.clone(),
        ..Card::default()
    };
    let device = match nvml.device_by_uuid(gpu.uuid.as_str()) {
        Ok(device) => device,
        Err(e) => {
            // A slice of a GPU has no state of its own.
            card.broken = (!gpu.uuid.starts_with("MIG-")).then(|| e.to_string());
            return card;
        }
    };
    match device.memory_info() {
        Ok(memory) => (card.mem_free, card.mem_total) = (memory.free, memory.total),
        Err(e @ (NvmlError::GpuLost | NvmlError::ResetRequired | NvmlError::Unknown)) => {
            card.broken = Some(e.to_string());
            return card;
        }
        Err(_) => {}
    }
    card.uncorrected = device
        .total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile)
        .ok();
    card.repair_pending = flag(&device, NVML_FI_DEV_REMAPPED_PENDING)
        || device.are_pages_pending_retired().unwrap_or(false);
    card.repair_failed = flag(&device, NVML_FI_DEV_REMAPPED_FAILURE);
    card.slowed_by = device
        .current_throttle_reasons()
        .map(slowed_by)
        .unwrap_or_default();
    card.temperature = device.temperature(TemperatureSensor::Gpu).ok();
    card.slows_at = device
        .temperature_threshold(TemperatureThreshold::Slowdown)
        .ok();
    card.persistent = device.is_in_persistent_mode().ok();
    let own = std::process::id();
    let users = device.running_compute_processes().unwrap_or_default();
    card.users = users
        .into_iter()
        .filter(|user| user.pid != own)
        .map(|user| {
            let used = match user.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => bytes,
                UsedGpuMemory::Unavailable => 0,
            };
            let name = fs_err::read_to_string(format!("/proc/{}/comm", user.pid));
            (
                user.pid,
                name.map_or("not visible from here".into(), |n| n.trim().into()),
                used,
            )
        })
        .collect();
    card
}

fn flag(device: &Device, field: u32) -> bool {
    let Ok(values) = device.field_values_for(&[FieldId(field)]) else {
        return false;
    };
    let is_set = |value| match value {
        SampleValue::U32(v) => v != 0,
        SampleValue::U64(v) => v != 0,
        SampleValue::I64(v) => v != 0,
        SampleValue::F64(v) => v != 0.0,
    };
    values
        .into_iter()
        .flatten()
        .any(|sample| sample.value.is_ok_and(is_set))
}

/// Of the reasons for lower clocks those that should not be.
fn slowed_by(reasons: ThrottleReasons) -> Vec<&'static str> {
    let known = [
        (ThrottleReasons::HW_THERMAL_SLOWDOWN, "heat (hardware)"),
        (ThrottleReasons::SW_THERMAL_SLOWDOWN, "heat"),
        (
            ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN,
            "the power supply's brake",
        ),
        (ThrottleReasons::HW_SLOWDOWN, "the hardware's slowdown"),
    ];
    let mut found: Vec<_> = known
        .iter()
        .filter(|(bit, _)| reasons.contains(*bit))
        .map(|(_, text)| *text)
        .collect();
    // It is set together with its cause.
    if found.len() > 1 {
        found.retain(|text| *text != "the hardware's slowdown");
    }
    found
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
    fn a_cause_replaces_the_general_slowdown() {
        let both = ThrottleReasons::HW_SLOWDOWN | ThrottleReasons::HW_THERMAL_SLOWDOWN;
        assert_eq!(slowed_by(both), ["heat (hardware)"]);
        assert_eq!(
            slowed_by(ThrottleReasons::HW_SLOWDOWN),
            ["the hardware's slowdown"]
        );
        assert!(slowed_by(ThrottleReasons::GPU_IDLE | ThrottleReasons::SW_POWER_CAP).is_empty());
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
