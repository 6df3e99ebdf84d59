//! The pixels of the synthetic motion set.
//!
//! A clip is a window moving over an endless texture of hashed value noise. Four things describe
//! the window: its x, its y, its scale and its angle. Each has `num_frames` evenly spaced places;
//! the class runs through the places of one of them, forwards or backwards, and the others stay at
//! a place drawn at random. So every class shows single frames of the same distribution, and the
//! two classes of a pair show the same frames in opposite order: a network that looks at frames
//! one by one has nothing to go by.
//!
//! Only hashes, sums and products are used, no mathematical library, so that the same pixels come
//! out on every machine.

use super::{Demo, Split};

/// Class names by label; labels `2 i` and `2 i + 1` are time reversals of each other.
pub const CLASSES: [&str; 8] = [
    "left",
    "right",
    "up",
    "down",
    "zoom_in",
    "zoom_out",
    "rotate_cw",
    "rotate_ccw",
];

/// SplitMix64's output function (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A hash's top bits as a number in [0, 1).
fn unit(hash: u64) -> f64 {
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

/// Cosine and sine of `turns` full turns, by their series: a library's may round differently
/// elsewhere.
fn rotation(turns: f64) -> (f64, f64) {
    let x = (turns - (turns + 0.5).floor()) * std::f64::consts::TAU;
    let (mut cos, mut sin, mut term) = (0.0, 0.0, 1.0);
    for n in 0..14 {
        cos += term;
        term *= x / f64::from(2 * n + 1);
        sin += term;
        term *= -x / f64::from(2 * n + 2);
    }
    (cos, sin)
}

/// Where the window is at one frame.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Pose {
    x: f64,
    y: f64,
    scale: f64,
    turns: f64,
}

/// Everything random about one clip.
pub(super) struct Clip {
    key: u64,
    pub(super) label: usize,
    pub(super) poses: Vec<Pose>,
    /// Pixels of the texture's coarse cells at scale 1.
    cell: f64,
    origin: (f64, f64),
    contrast: f64,
    brightness: f64,
    tint: [f64; 3],
}

impl Clip {
    pub(super) fn draw(demo: &Demo, split: Split, index: usize) -> Clip {
        let split_key = mix(demo.seed.wrapping_mul(2).wrapping_add(split as u64));
        Clip::with_label(demo, mix(split_key ^ index as u64), index % CLASSES.len())
    }

    /// The clip of `key` as a clip of class `label`: only the order of places depends on the label.
    pub(super) fn with_label(demo: &Demo, key: u64, label: usize) -> Clip {
        let mut draws = 0;
        let mut random = |low: f64, high: f64| {
            draws += 1;
            low + (high - low) * unit(mix(key ^ mix(draws)))
        };
        // Speeds keep the whole way of a clip about the same, however many frames show it.
        let pixel = demo.size as f64 / 64.0;
        let per_frame = 12.0 / demo.frames as f64;
        let speed = random(1.1, 3.3) * pixel * per_frame;
        let zoom = 1.0 + random(0.02, 0.05) * per_frame;
        let spin = random(0.005, 0.011) * per_frame;
        let (scale, turns) = (random(0.8, 1.25), random(0.0, 1.0));

        let last = demo.frames - 1;
        let mut scales = vec![scale; demo.frames];
        for j in 1..demo.frames {
            scales[j] = scales[j - 1] * zoom;
        }
        // So that the middle of the places is `scale`, as for the others.
        let correction = scale / scales[last / 2];
        let offset = |j: usize| j as f64 - last as f64 / 2.0;
        let frozen: [usize; 4] = std::array::from_fn(|_| random(0.0, demo.frames as f64) as usize);
        let (moving, backwards) = (label / 2, label % 2 == 1);
        let poses = (0..demo.frames).map(|t| {
            let mut places = frozen;
            places[moving] = if backwards { last - t } else { t };
            // The picture moves against the window: left and up when the window moves right and
            // down. A zoom in shrinks the window, and it turns against the picture too.
            Pose {
                x: offset(places[0]) * speed,
                y: offset(places[1]) * speed,
                scale: scales[last - places[2]] * correction,
                turns: turns - offset(places[3]) * spin,
            }
        });
        Clip {
            key,
            label,
            poses: poses.collect(),
            cell: random(8.0, 16.0) * pixel,
            origin: (random(0.0, 1e5), random(0.0, 1e5)),
            contrast: random(0.6, 1.4),
            brightness: random(-0.15, 0.15),
            tint: std::array::from_fn(|_| random(0.75, 1.0)),
        }
    }

    /// Value noise at a point, in [0, 1).
    fn texture(&self, octave: u64, x: f64, y: f64) -> f64 {
        let (cell_x, cell_y) = (x.floor(), y.floor());
        let (u, v) = (x - cell_x, y - cell_y);
        let (u, v) = (u * u * (3.0 - 2.0 * u), v * v * (3.0 - 2.0 * v));
        let corner = |dx: i64, dy: i64| {
            let column = (cell_x as i64 + dx)
                .cast_unsigned()
                .wrapping_mul(0xa24b_aed4_963e_e407);
            let row = (cell_y as i64 + dy)
                .cast_unsigned()
                .wrapping_mul(0x9fb2_1c65_1e98_df25);
            unit(mix(self.key ^ octave ^ column ^ row.rotate_left(31)))
        };
        (corner(0, 0) * (1.0 - u) + corner(1, 0) * u) * (1.0 - v)
            + (corner(0, 1) * (1.0 - u) + corner(1, 1) * u) * v
    }

    /// Brightness of frame `t` before noise, `size * size` values around [0, 1].
    pub(super) fn render(&self, t: usize, size: usize, out: &mut Vec<f64>) {
        let pose = self.poses[t];
        let (cos, sin) = rotation(pose.turns);
        let middle = (size as f64 - 1.0) / 2.0;
        out.clear();
        for row in 0..size {
            let y = (row as f64 - middle) * pose.scale + pose.y;
            for column in 0..size {
                let x = (column as f64 - middle) * pose.scale + pose.x;
                let (x, y) = (
                    (cos * x - sin * y) / self.cell,
                    (sin * x + cos * y) / self.cell,
                );
                let coarse = self.texture(0, x + self.origin.0, y + self.origin.1);
                let fine = self.texture(1 << 63, x * 2.1 + self.origin.1, y * 2.1 + self.origin.0);
                let value = 0.65 * coarse + 0.35 * fine - 0.5;
                out.push(0.5 + value * self.contrast + self.brightness);
            }
        }
    }

    /// Frame `t` as RGB, with a little noise that is new in every frame.
    pub(super) fn shade(&self, t: usize, grey: &[f64], rgb: &mut Vec<u8>) {
        rgb.clear();
        let noise_key = mix(self.key ^ mix(!(t as u64)));
        for (i, value) in grey.iter().enumerate() {
            let noise = mix(noise_key ^ i as u64);
            let sum = (noise & 0xffff) + (noise >> 16 & 0xffff) + (noise >> 32 & 0xffff);
            let value = value + (sum as f64 / 65536.0 - 1.5) * 0.05;
            // Adding a half and dropping the fraction rounds; `as` clips to 0..=255.
            rgb.extend(self.tint.map(|tint| (value * tint * 255.0 + 0.5) as u8));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMO: Demo = Demo {
        train: 16,
        val: 8,
        size: 32,
        frames: 6,
        seed: 3,
    };

    fn grey(clip: &Clip, t: usize) -> Vec<f64> {
        let mut out = Vec::new();
        clip.render(t, DEMO.size, &mut out);
        out
    }

    #[test]
    fn the_classes_of_a_pair_are_time_reversals() {
        for label in (0..8).step_by(2) {
            let (forward, back) = (
                Clip::with_label(&DEMO, 9, label),
                Clip::with_label(&DEMO, 9, label + 1),
            );
            for t in 0..DEMO.frames {
                assert_eq!(
                    grey(&forward, t),
                    grey(&back, DEMO.frames - 1 - t),
                    "{}",
                    CLASSES[label]
                );
            }
            assert_ne!(
                grey(&forward, 0),
                grey(&forward, DEMO.frames - 1),
                "{} stands still",
                CLASSES[label]
            );
        }
    }

    /// Every place of every axis comes up equally often in every class, so one frame tells nothing.
    #[test]
    fn places_are_alike_in_all_classes() {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let spread =
            |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
        let poses: Vec<Vec<Pose>> = (0..8)
            .map(|label| {
                (0..4000)
                    .flat_map(|key| Clip::with_label(&DEMO, mix(key), label).poses)
                    .collect()
            })
            .collect();
        let axes: [fn(&Pose) -> f64; 4] = [|p| p.x, |p| p.y, |p| p.scale, |p| p.turns];
        for axis in axes {
            let of: Vec<Vec<f64>> = poses.iter().map(|p| p.iter().map(axis).collect()).collect();
            for class in &of {
                let scale = spread(&of[0]).sqrt();
                assert!((mean(class) - mean(&of[0])).abs() < 0.05 * scale);
                assert!((spread(class) / spread(&of[0]) - 1.0).abs() < 0.05);
            }
        }
    }

    /// Names mean what a viewer sees: in `left`, what was at column c is later further left.
    #[test]
    fn pictures_move_the_way_their_class_says() {
        let unmoved = |label| Clip {
            poses: vec![
                Pose {
                    x: 0.,
                    y: 0.,
                    scale: 1.,
                    turns: 0.
                };
                2
            ],
            ..Clip::with_label(&DEMO, 1, label)
        };
        let step = |label: usize, size: usize| {
            let drawn = Clip::with_label(&DEMO, 1, label).poses;
            let mut clip = unmoved(label);
            clip.poses[1] = Pose {
                x: (drawn[1].x - drawn[0].x).signum() * 3.0,
                y: (drawn[1].y - drawn[0].y).signum() * 3.0,
                scale: drawn[1].scale / drawn[0].scale,
                turns: drawn[1].turns - drawn[0].turns,
            };
            let still = if label / 2 == 0 {
                &mut clip.poses[1].y
            } else {
                &mut clip.poses[1].x
            };
            *still = 0.0;
            if label / 2 > 1 {
                clip.poses[1].y = 0.0;
            }
            let (mut a, mut b) = (Vec::new(), Vec::new());
            clip.render(0, size, &mut a);
            clip.render(1, size, &mut b);
            (a, b, clip.poses[1])
        };
        let same = |a: f64, b: f64| (a - b).abs() < 1e-9;
        let (a, b, _) = step(0, 32);
        assert!(
            (0..32).all(|y| (3..32).all(|x| same(a[y * 32 + x], b[y * 32 + x - 3]))),
            "left"
        );
        let (a, b, _) = step(2, 32);
        assert!(
            (3..32).all(|y| (0..32).all(|x| same(a[y * 32 + x], b[(y - 3) * 32 + x]))),
            "up"
        );
        assert!(
            step(4, 32).2.scale < 1.0,
            "zooming in shows less of the texture"
        );
        // A picture turned clockwise has, right of the middle, what was above it before.
        let mut clip = unmoved(6);
        clip.poses[1].turns = -0.25;
        assert!(step(6, 32).2.turns < 0.0);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        clip.render(0, 33, &mut a);
        clip.render(1, 33, &mut b);
        assert!(
            (1..16).all(|r| (a[(16 - r) * 33 + 16] - b[16 * 33 + 16 + r]).abs() < 1e-6),
            "clockwise"
        );
    }

    #[test]
    fn a_quarter_turn_is_exact_enough() {
        let (cos, sin) = rotation(1.25);
        assert!(cos.abs() < 1e-12 && (sin - 1.0).abs() < 1e-12);
        let (cos, sin) = rotation(-0.5);
        assert!((cos + 1.0).abs() < 1e-9 && sin.abs() < 1e-9);
    }

    fn hash_of(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0, |hash, &b| mix(hash ^ u64::from(b)))
    }

    /// Pixels are fixed for ever; [`VERSION`] rises with a change here.
    #[test]
    fn pixels_are_the_same_on_every_machine() {
        let (mut grey, mut rgb, mut all) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..8 {
            let clip = Clip::draw(&DEMO, Split::Train, index);
            clip.render(2, DEMO.size, &mut grey);
            clip.shade(2, &grey, &mut rgb);
            all.extend_from_slice(&rgb);
        }
        assert_eq!(hash_of(&all), 0xc575_b6a1_ac35_2220, "{:#x}", hash_of(&all));
    }
}
