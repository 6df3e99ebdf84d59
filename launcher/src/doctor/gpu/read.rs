//! The GPUs as NVIDIA's management library tells of them.

use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{
    EccCounter, MemoryError, PerformanceState, TemperatureSensor, TemperatureThreshold,
};
use nvml_wrapper::enums::device::{SampleValue, UsedGpuMemory};
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id::{
    NVML_FI_DEV_REMAPPED_FAILURE, NVML_FI_DEV_REMAPPED_PENDING,
};
use nvml_wrapper::{Device, Nvml};

use super::{Card, Pcie, Reading};
use crate::doctor::kmsg;
use crate::gpus::{self, Gpu};
use crate::text::count;

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
            count(in_kernel, "GPU")
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
            kmsg::Log::whole()
                .and_then(|log| log.read())
                .map(|logged| logged.xids)
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
    card.pcie = pcie(&device);
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

/// `None` also where the GPU is not at its full performance now: its link may then be slower on purpose.
fn pcie(device: &Device) -> Option<Pcie> {
    let state = device.performance_state().ok()?;
    if state != PerformanceState::Zero {
        return None;
    }
    let generation = (
        device.current_pcie_link_gen().ok()?,
        device.max_pcie_link_gen().ok()?,
    );
    let lanes = (
        device.current_pcie_link_width().ok()?,
        device.max_pcie_link_width().ok()?,
    );
    Some(Pcie { generation, lanes })
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
