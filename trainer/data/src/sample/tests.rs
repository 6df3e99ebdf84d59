//! Tests of its parent module.

use super::*;

const ALL: [Sampler; 4] = [Sampler::Mit, Sampler::Mm0, Sampler::Mm1, Sampler::Paddle];
const MODES: [Mode; 7] = [
    Mode::Train,
    Mode::Val,
    Mode::Test,
    Mode::TestTwice,
    Mode::DenseTrain,
    Mode::DenseVal,
    Mode::DenseTest,
];

fn rng(seed: u64) -> SplitMix64 {
    SplitMix64::new(seed)
}

fn fixed(sampler: Sampler, mode: Mode, num_frames: u64) -> Vec<u64> {
    sample(sampler, mode, num_frames, 8, &mut rng(0))
}

// The vectors below were seen by running the original code with T = 8.

#[test]
fn middles_equal_the_originals() {
    for (n, expected) in [
        (100, [6, 18, 31, 43, 56, 68, 81, 93]),
        (37, [2, 6, 11, 16, 20, 25, 30, 34]),
        (12, [0, 2, 3, 5, 6, 8, 9, 11]),
        (300, [18, 56, 93, 131, 168, 206, 243, 281]),
    ] {
        for sampler in ALL {
            assert_eq!(
                fixed(sampler, Mode::Val, n),
                expected,
                "{sampler:?} val N={n}"
            );
            assert_eq!(
                fixed(sampler, Mode::Test, n),
                expected,
                "{sampler:?} test N={n}"
            );
        }
    }
}

#[test]
fn the_second_clip_of_a_twice_sampled_video_takes_the_starts() {
    for sampler in ALL {
        assert_eq!(
            fixed(sampler, Mode::TestTwice, 100),
            [6, 18, 31, 43, 56, 68, 81, 93, 0, 12, 25, 37, 50, 62, 75, 87],
            "{sampler:?}"
        );
    }
}

#[test]
fn videos_shorter_than_the_clip() {
    let spread = [0, 0, 1, 2, 2, 3, 4, 4];
    assert_eq!(fixed(Sampler::Mit, Mode::Val, 5), [0; 8]);
    assert_eq!(fixed(Sampler::Paddle, Mode::Val, 5), [0; 8]);
    assert_eq!(fixed(Sampler::Paddle, Mode::Test, 5), [0; 8]);
    assert_eq!(fixed(Sampler::Mit, Mode::Test, 5), spread);
    for sampler in [Sampler::Mm0, Sampler::Mm1] {
        assert_eq!(fixed(sampler, Mode::Val, 5), spread);
        assert_eq!(fixed(sampler, Mode::Test, 5), spread);
        assert_eq!(fixed(sampler, Mode::Train, 5), [0, 1, 1, 2, 2, 3, 4, 4]);
    }
    // Derived: 7 * 3/8 = 2.625 rounds to 3, which is past the end.
    assert_eq!(
        fixed(Sampler::Mm1, Mode::Train, 3),
        [0, 0, 1, 1, 2, 2, 2, 0]
    );
    assert_eq!(fixed(Sampler::Mit, Mode::Train, 5), [0; 8]);
    assert_eq!(fixed(Sampler::Paddle, Mode::Train, 5), [0; 8]);
}

#[test]
fn videos_as_long_as_the_clip() {
    let each_once = [0, 1, 2, 3, 4, 5, 6, 7];
    assert_eq!(fixed(Sampler::Mit, Mode::Val, 8), [0; 8]);
    assert_eq!(fixed(Sampler::Paddle, Mode::Val, 8), [0; 8]);
    for (sampler, mode) in [
        (Sampler::Mit, Mode::Test),
        (Sampler::Mm0, Mode::Val),
        (Sampler::Mm1, Mode::Val),
        (Sampler::Mit, Mode::Train),
        (Sampler::Mm1, Mode::Train),
        (Sampler::Paddle, Mode::Train),
    ] {
        assert_eq!(fixed(sampler, mode, 8), each_once, "{sampler:?} {mode:?}");
    }
}

#[test]
fn training_below_two_clip_lengths_never_sees_the_tail() {
    for sampler in ALL {
        for seed in 0..50 {
            let frames = sample(sampler, Mode::Train, 15, 8, &mut rng(seed));
            assert_eq!(frames, [0, 1, 2, 3, 4, 5, 6, 7], "{sampler:?}");
        }
    }
}

#[test]
fn dense_test_equals_the_originals() {
    for sampler in ALL {
        let frames = fixed(sampler, Mode::DenseTest, 300);
        let starts: Vec<u64> = frames.iter().step_by(8).copied().collect();
        assert_eq!(starts, [0, 26, 52, 78, 104, 131, 157, 183, 209, 236]);
        assert_eq!(frames[72..], [236, 244, 252, 260, 268, 276, 284, 292]);
        let wrapped = fixed(sampler, Mode::DenseTest, 40);
        assert_eq!(wrapped[..8], [0, 8, 16, 24, 32, 0, 8, 16]);
        assert_eq!(wrapped[72..], wrapped[..8]);
    }
}

#[test]
fn prediction_of_paddle_differs_from_its_evaluation() {
    assert_eq!(
        paddle_predict(300, 8),
        [18, 55, 92, 129, 166, 203, 240, 277]
    );
    assert_eq!(paddle_predict(5, 8), [0, 1, 2, 3, 4, 0, 1, 2]);
}

#[test]
fn even_frames_only() {
    let files: Vec<u64> = mit_even_only(300, 8, Mode::DenseTest, &mut rng(0))
        .into_iter()
        .map(|i| i + 1)
        .collect();
    assert_eq!(files[..8], [2, 10, 18, 26, 34, 42, 50, 58]);
    let starts: Vec<u64> = files.iter().step_by(8).copied().collect();
    assert_eq!(starts, [2, 28, 54, 80, 106, 132, 158, 184, 210, 238]);
    for seed in 0..50 {
        for mode in [Mode::Train, Mode::Val, Mode::DenseTrain] {
            let frames = mit_even_only(75, 8, mode, &mut rng(seed));
            assert!(
                frames.iter().all(|&i| i < 75 && i % 2 == 1),
                "{mode:?} {frames:?}"
            );
        }
    }
}

#[test]
fn every_mode_gives_its_clips_within_the_video() {
    for sampler in ALL {
        for mode in MODES {
            for num_frames in (1..80).chain([127, 128, 129, 300, 1001]) {
                for t in [1, 3, 8, 16] {
                    let frames = sample(sampler, mode, num_frames, t, &mut rng(num_frames));
                    assert_eq!(frames.len(), num_clips(sampler, mode) * t);
                    let worst = *frames.iter().max().unwrap();
                    assert!(
                        worst < num_frames,
                        "{sampler:?} {mode:?} N={num_frames} T={t}: {worst}"
                    );
                }
            }
        }
    }
}

#[test]
fn uniform_clips_do_not_go_back_in_time() {
    for sampler in ALL {
        for mode in [Mode::Train, Mode::Val, Mode::Test] {
            // Short videos of MMAction2 may wrap, see above.
            let shortest = if mode == Mode::Train { 8 } else { 1 };
            for num_frames in shortest..200 {
                let frames = sample(sampler, mode, num_frames, 8, &mut rng(num_frames));
                assert!(
                    frames.is_sorted(),
                    "{sampler:?} {mode:?} N={num_frames}: {frames:?}"
                );
            }
        }
    }
}

#[test]
fn training_takes_every_frame_of_every_segment_in_time() {
    for sampler in ALL {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..400 {
            let frames = sample(sampler, Mode::Train, 40, 8, &mut rng(seed));
            for (i, &f) in frames.iter().enumerate() {
                assert_eq!(f / 5, i as u64);
            }
            seen.extend(frames);
        }
        assert_eq!(seen.len(), 40);
    }
}

#[test]
fn dense_training_never_starts_at_the_last_position() {
    let starts: std::collections::BTreeSet<u64> = (0..200)
        .map(|seed| mit(68, 8, Mode::DenseTrain, &mut rng(seed))[0])
        .collect();
    assert_eq!(starts, (0..4).collect());
}
