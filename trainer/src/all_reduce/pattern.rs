//! Numbers whose sum over the ranks is exact in float32, in whatever order it is formed.

use anyhow::Result;
use tch::{Device, Tensor};

/// Integers up to here are exact in float32.
const EXACT: u64 = 1 << 24;
/// A prime, so that neighbouring blocks of the usual sizes hold different numbers.
const PERIOD: u64 = 65_521;
/// Between the numbers of two ranks; no small multiple of it comes near a multiple of the period.
const STRIDE: u64 = 7_919;

/// Number `i` of a rank in a round is `(i + rank * stride + round) mod period`, so that what is left of another
/// rank, round or place shows.
pub struct Pattern {
    period: u64,
    rank: u64,
    numel: i64,
    /// Number `i` of rank 0 in round 0, and the sum over the ranks there, for a period more than is needed.
    own: Tensor,
    sum: Tensor,
}

impl Pattern {
    pub fn new(rank: u32, world_size: u32, numel: i64, device: Device) -> Result<Pattern> {
        let (ranks, period) = (u64::from(world_size), period(world_size));
        let own: Vec<f32> = (0..period).map(|i| i as f32).collect();
        let sum: Vec<f32> = (0..period)
            .map(|i| (0..ranks).map(|r| (i + r * STRIDE) % period).sum::<u64>() as f32)
            .collect();
        let tile = |table: &[f32]| -> Result<Tensor> {
            let times = numel as u64 / period + 2;
            let table = Tensor::from_slice(table).f_to_device(device)?;
            Ok(table.f_repeat([times as i64])?)
        };
        Ok(Pattern {
            period,
            rank: rank.into(),
            numel,
            own: tile(&own)?,
            sum: tile(&sum)?,
        })
    }

    /// Overwrites `data`, a vector of this pattern's length, with this rank's numbers.
    pub fn fill(&self, data: &Tensor, round: u64) -> Result<()> {
        let start = (self.rank * STRIDE + round) % self.period;
        let numbers = self.own.f_narrow(0, start as i64, self.numel)?;
        data.shallow_clone().f_copy_(&numbers)?;
        Ok(())
    }

    /// How `data` differs from the sum of all ranks' numbers of `round`.
    pub fn difference(&self, data: &Tensor, round: u64) -> Result<Option<String>> {
        let start = (round % self.period) as i64;
        let right = self.sum.f_narrow(0, start, self.numel)?;
        if data.f_equal(&right)? {
            return Ok(None);
        }
        let differs = data.f_ne_tensor(&right)?;
        let bad = i64::try_from(differs.f_count_nonzero(0)?)?;
        let first = i64::try_from(differs.f_nonzero()?.f_min()?)?;
        let (got, right) = (data.double_value(&[first]), right.double_value(&[first]));
        Ok(Some(format!(
            "{bad} of {} sums of round {round} are wrong; number {first} is {got}, not {right}",
            self.numel
        )))
    }
}

/// The largest odd period, up to [`PERIOD`], whose sums stay exact.
fn period(world_size: u32) -> u64 {
    let limit = (EXACT / u64::from(world_size.max(1))).max(2);
    ((limit - 1) | 1).min(PERIOD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    fn numbers(rank: u32, world: u32, round: u64) -> Tensor {
        let data = Tensor::zeros([1000], (Kind::Float, Device::Cpu));
        let pattern = Pattern::new(rank, world, 1000, Device::Cpu).unwrap();
        pattern.fill(&data, round).unwrap();
        data
    }

    #[test]
    fn sums_of_any_number_of_ranks_are_exact() {
        for world in [1, 2, 3, 255, 256, 257, 4096, 1 << 20] {
            let largest = (period(world) - 1) * u64::from(world);
            assert!(largest < EXACT && period(world) % 2 == 1, "{world}");
        }
        let pattern = Pattern::new(0, 5, 1000, Device::Cpu).unwrap();
        for round in [0, 1, 65_520, 65_521, 1 << 40] {
            let sum: Tensor = (0..5).map(|rank| numbers(rank, 5, round)).sum();
            assert_eq!(pattern.difference(&sum, round).unwrap(), None, "{round}");
        }
    }

    #[test]
    fn stale_missing_and_moved_numbers_are_wrong_sums() {
        let pattern = Pattern::new(1, 3, 1000, Device::Cpu).unwrap();
        let wrong = |sum: Tensor| pattern.difference(&sum, 7).unwrap().unwrap();
        let of = |ranks: [u32; 3], rounds: [u64; 3]| -> Tensor {
            (0..3).map(|i| numbers(ranks[i], 3, rounds[i])).sum()
        };
        for (ranks, rounds) in [
            ([0, 1, 2], [6, 6, 6]),
            ([0, 1, 2], [7, 6, 7]),
            ([0, 1, 1], [7, 7, 7]),
        ] {
            let text = wrong(of(ranks, rounds));
            assert!(text.starts_with("1000 of 1000 sums of round 7"), "{text}");
        }
        let moved = of([0, 1, 2], [7, 7, 7]).roll([256], [0]);
        assert!(wrong(moved).starts_with("1000 of 1000"));
        let bit = of([0, 1, 2], [7, 7, 7]);
        let right = bit.double_value(&[42]);
        let _ = bit.get(42).g_add_scalar_(0.5);
        assert_eq!(
            wrong(bit),
            format!(
                "1 of 1000 sums of round 7 are wrong; number 42 is {}, not {right}",
                right + 0.5
            )
        );
    }
}
