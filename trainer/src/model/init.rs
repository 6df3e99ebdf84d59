//! Initial weights: a function of name, seed and index, so that they depend neither on the order
//! in which layers are made nor on libtorch's global generator.

use tch::Tensor;

/// A float32 CPU tensor of `size` drawn from N(0, std).
pub(super) fn normal(name: &str, seed: u64, size: &[i64], std: f64) -> Tensor {
    let count =
        usize::try_from(size.iter().product::<i64>()).expect("sizes of layers are positive");
    let mut stream = SplitMix64(fnv1a64(name) ^ SplitMix64(seed).next());
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        // Box-Muller: two uniforms give two independent normals.
        let radius = std * (-2.0 * stream.unit().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * stream.unit()).sin_cos();
        values.extend([(radius * cos) as f32, (radius * sin) as f32]);
    }
    values.truncate(count);
    Tensor::from_slice(&values).view(size)
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Uniform in (0, 1]: never 0, so its logarithm is finite.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}

fn fnv1a64(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_has_the_asked_moments_and_repeats() {
        let a = normal("layer1.0.conv1.weight", 7, &[64, 64, 3, 3], 0.05);
        assert_eq!(a.size(), [64, 64, 3, 3]);
        let std = f64::try_from(a.std(true)).unwrap();
        let mean = f64::try_from(a.mean(None)).unwrap();
        assert!((std / 0.05 - 1.0).abs() < 0.02, "std {std}");
        assert!(mean.abs() < 0.001, "mean {mean}");
        assert!(a.equal(&normal("layer1.0.conv1.weight", 7, &[64, 64, 3, 3], 0.05)));
    }

    #[test]
    fn name_and_seed_change_every_value() {
        let a = normal("fc.weight", 1, &[100], 1.0);
        for other in [
            normal("fc.weight", 2, &[100], 1.0),
            normal("fd.weight", 1, &[100], 1.0),
        ] {
            assert_eq!(i64::try_from(a.eq_tensor(&other).sum(None)).unwrap(), 0);
        }
    }
}
