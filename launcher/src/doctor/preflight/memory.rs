//! How fast a node's memory is.

use std::sync::{Barrier, OnceLock};
use std::thread;
use std::time::Instant;

const PASSES: u64 = 4;
/// More do not make it faster.
const MAX_THREADS: usize = 64;

/// Copies `bytes` of memory on each of `num_threads` threads at once; GB/s, counting what is read and what is written.
///
/// # Errors
/// When a copy differs, or a thread cannot be started.
pub fn memory(num_threads: usize, bytes: usize) -> Result<f64, String> {
    let num_threads = num_threads.clamp(1, MAX_THREADS);
    // For as many threads as there are in the end: it is there when all are started.
    let barrier = OnceLock::<Barrier>::new();
    let copy = |seed: u64| {
        let from: Vec<u64> = (0..bytes as u64 / 8)
            .map(|i| (i ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        let mut to = vec![0; from.len()];
        // Page faults are not what is measured.
        to.copy_from_slice(&from);
        let barrier = barrier.wait();
        barrier.wait();
        for _ in 0..PASSES {
            std::hint::black_box(&mut to).copy_from_slice(std::hint::black_box(&from));
        }
        barrier.wait();
        compare(&from, &to)
    };
    let (seconds, wrong) = thread::scope(|scope| {
        let mut failed = None;
        let mut threads = Vec::new();
        for seed in 0..num_threads as u64 {
            let thread = thread::Builder::new().name("memory".into());
            match thread.spawn_scoped(scope, move || copy(seed)) {
                Ok(thread) => threads.push(thread),
                Err(e) => failed = Some(format!("cannot start a thread: {e}")),
            }
        }
        let barrier = barrier.get_or_init(|| Barrier::new(threads.len() + 1));
        barrier.wait();
        let start = Instant::now();
        barrier.wait();
        let seconds = start.elapsed().as_secs_f64();
        let results = threads
            .into_iter()
            .map(|t| t.join().unwrap_or(Err("a thread panicked".into())));
        let results = results.collect::<Result<Vec<()>, String>>();
        (seconds, failed.map_or(results, Err))
    });
    wrong?;
    Ok((2 * PASSES * bytes as u64 * num_threads as u64) as f64 / seconds / 1e9)
}

fn compare(from: &[u64], to: &[u64]) -> Result<(), String> {
    let differ = || from.iter().zip(to).filter(|(a, b)| a != b).count();
    match from == to {
        true => Ok(()),
        false => Err(format!(
            "{} of {} words differ after they were copied in memory",
            differ(),
            from.len()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_that_flips_is_noticed() {
        assert_eq!(compare(&[1, 2, 3], &[1, 2, 3]), Ok(()));
        let error = compare(&[1, 2, 3], &[1, 2, 3 ^ 64]).unwrap_err();
        assert_eq!(
            error,
            "1 of 3 words differ after they were copied in memory"
        );
        assert!(memory(2, 1 << 20).unwrap() > 0.0);
    }
}
