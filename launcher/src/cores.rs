//! The cores this process may use, and an even share of them for every rank.

use rustix::thread::{CpuSet, sched_getaffinity};

/// Allowed cores, ordered so that hardware threads of one core, and cores of one
/// package, are neighbours: a contiguous share then never splits a physical core needlessly.
pub fn allowed() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(None) else {
        return Vec::new();
    };
    let mut cores: Vec<usize> = (0..CpuSet::MAX_CPU)
        .filter(|&cpu| set.is_set(cpu))
        .collect();
    cores.sort_by_cached_key(|&cpu| {
        (
            topology(cpu, "physical_package_id"),
            topology(cpu, "core_id"),
            cpu,
        )
    });
    cores
}

/// How many cores the machine has, whoever may use them.
pub fn online() -> Option<usize> {
    let text = fs_err::read_to_string("/sys/devices/system/cpu/online").ok()?;
    Some(from_list(text.trim())?.count() as usize)
}

fn topology(cpu: usize, name: &str) -> i64 {
    fs_err::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/{name}"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// Share `index` of `parts` nearly equal, contiguous shares; empty when there
/// are more parts than cores, which means: no binding.
pub fn share(cores: &[usize], index: usize, parts: usize) -> &[usize] {
    if parts > cores.len() {
        return &[];
    }
    &cores[index * cores.len() / parts..(index + 1) * cores.len() / parts]
}

/// `0-3,8` for `[0, 1, 2, 3, 8]`, the kernel's list format.
pub fn to_list(cores: &[usize]) -> String {
    let mut sorted = cores.to_vec();
    sorted.sort_unstable();
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for core in sorted {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == core => *last = core,
            _ => parts.push((core, core)),
        }
    }
    let text = |(a, b): &(usize, usize)| {
        if a == b {
            a.to_string()
        } else {
            format!("{a}-{b}")
        }
    };
    parts.iter().map(text).collect::<Vec<_>>().join(",")
}

/// Reads what [`to_list`] writes.
pub fn from_list(text: &str) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    for part in text.split(',') {
        let (a, b) = part.split_once('-').unwrap_or((part, part));
        let (a, b): (usize, usize) = (a.parse().ok()?, b.parse().ok()?);
        if b >= CpuSet::MAX_CPU {
            return None;
        }
        (a..=b).for_each(|cpu| set.set(cpu));
    }
    Some(set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shares_are_disjoint_complete_and_even(num_cores in 1usize..200, parts in 1usize..64) {
            let cores: Vec<usize> = (0..num_cores).collect();
            let shares: Vec<&[usize]> = (0..parts).map(|i| share(&cores, i, parts)).collect();
            if parts > num_cores {
                prop_assert!(shares.iter().all(|s| s.is_empty()));
            } else {
                prop_assert_eq!(shares.concat(), cores.clone());
                let (min, max) = (shares.iter().map(|s| s.len()).min(), shares.iter().map(|s| s.len()).max());
                prop_assert!(max.unwrap() - min.unwrap() <= 1);
            }
        }
    }

    #[test]
    fn lists_round_trip() {
        assert_eq!(to_list(&[8, 0, 1, 2, 5]), "0-2,5,8");
        let set = from_list("0-2,5,8").unwrap();
        assert_eq!(
            (0..16).filter(|&c| set.is_set(c)).collect::<Vec<_>>(),
            [0, 1, 2, 5, 8]
        );
        assert!(from_list("").is_none() && from_list("0-99999999").is_none());
    }
}
