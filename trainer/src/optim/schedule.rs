//! The learning rate as a pure function of the step.

use std::f64::consts::PI;
use tsm_job::config::{Schedule, Warmup};

/// The learning rate of a step, before the groups' multipliers.
///
/// `base_lr` is [`tsm_job::Config::scaled_lr`]; `step` counts optimizer steps from 0 over the
/// whole run, so a resumed run continues where it was. It has a fraction in the rest of an epoch
/// that another global batch began: the schedule stays one of epochs.
///
/// - `Step`: `base_lr * gamma^(milestones reached)`.
/// - `Cosine`: `base_lr * (1 + cos(pi * e / epochs)) / 2`, e the whole epoch (original TSM code)
///   or, with `per_step`, its fraction (PaddleVideo).
/// - Warm-up with `Step` and `Constant` multiplies (MMEngine's chained `LinearLR`); with `Cosine`
///   it rises in a line from `start_factor * base_lr` to the cosine's value where the warm-up
///   ends (PaddleVideo's `CustomWarmupCosineDecay`).
/// - A warm-up by epoch reaches its end in its last epoch (MMEngine: five epochs from 0.1 are
///   0.1, 0.325, 0.55, 0.775, 1); one by step reaches it in the first step after it.
pub fn lr_at(
    schedule: &Schedule,
    warmup: Option<&Warmup>,
    base_lr: f64,
    epochs: u32,
    steps_per_epoch: u64,
    step: f64,
) -> f64 {
    let steps_per_epoch = steps_per_epoch.max(1) as f64;
    let epoch = step / steps_per_epoch;
    let whole_epoch = epoch.floor();
    let scheduled = scheduled(schedule, base_lr, epochs, steps_per_epoch, step);
    let Some(warmup) = warmup else {
        return scheduled;
    };
    let (now, length) = if warmup.per_step {
        (epoch, warmup.epochs)
    } else {
        (whole_epoch, warmup.epochs - 1.0)
    };
    let over = if warmup.per_step {
        epoch >= warmup.epochs
    } else {
        whole_epoch >= warmup.epochs
    };
    if over || warmup.epochs <= 0.0 {
        return scheduled;
    }
    let progress = if length > 0.0 {
        (now / length).min(1.0)
    } else {
        0.0
    };
    match schedule {
        Schedule::Step { .. } | Schedule::Constant {} => {
            scheduled * (warmup.start_factor + (1.0 - warmup.start_factor) * progress)
        }
        Schedule::Cosine { .. } => {
            let start = warmup.start_factor * base_lr;
            let end = cosine(base_lr, length.max(0.0), epochs);
            start + (end - start) * progress
        }
    }
}

fn scheduled(
    schedule: &Schedule,
    base_lr: f64,
    epochs: u32,
    steps_per_epoch: f64,
    step: f64,
) -> f64 {
    match schedule {
        Schedule::Step { milestones, gamma } => {
            let reached = milestones
                .iter()
                .filter(|m| step >= **m * steps_per_epoch)
                .count();
            base_lr * gamma.powi(reached as i32)
        }
        Schedule::Cosine { per_step: true } => cosine(base_lr, step / steps_per_epoch, epochs),
        Schedule::Cosine { per_step: false } => {
            cosine(base_lr, (step / steps_per_epoch).floor(), epochs)
        }
        Schedule::Constant {} => base_lr,
    }
}

fn cosine(base_lr: f64, epoch: f64, epochs: u32) -> f64 {
    0.5 * base_lr * (1.0 + (PI * epoch / f64::from(epochs.max(1))).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, want: f64) {
        assert!(
            (got - want).abs() <= 1e-12 * want.abs().max(1e-6),
            "{got} is not {want}"
        );
    }

    #[test]
    fn original_step_schedule_changes_at_the_milestone() {
        let s = Schedule::Step {
            milestones: vec![20.0, 40.0],
            gamma: 0.1,
        };
        let at = |epoch: u64, extra: u64| lr_at(&s, None, 0.02, 50, 7, (epoch * 7 + extra) as f64);
        close(at(0, 0), 0.02);
        close(at(19, 6), 0.02);
        close(at(20, 0), 0.002);
        close(at(39, 6), 0.002);
        close(at(40, 0), 0.0002);
        close(at(49, 6), 0.0002);
    }

    #[test]
    fn original_cosine_is_constant_within_an_epoch() {
        let s = Schedule::Cosine { per_step: false };
        for epoch in [0.0, 1.0, 25.0, 49.0] {
            let want = 0.5 * 0.01 * (1.0 + (PI * epoch / 50.0).cos());
            close(lr_at(&s, None, 0.01, 50, 10, epoch * 10.0), want);
            close(lr_at(&s, None, 0.01, 50, 10, epoch * 10.0 + 9.0), want);
        }
        close(lr_at(&s, None, 0.01, 50, 10, 250.0), 0.005);
    }

    #[test]
    fn mmengine_linear_warmup_by_epoch() {
        let s = Schedule::Step {
            milestones: vec![25.0, 45.0],
            gamma: 0.1,
        };
        let w = Warmup {
            epochs: 5.0,
            start_factor: 0.1,
            per_step: false,
        };
        let lr = |epoch: u64| lr_at(&s, Some(&w), 0.02, 50, 4, (epoch * 4 + 3) as f64);
        for (epoch, factor) in [0.1, 0.325, 0.55, 0.775, 1.0, 1.0].into_iter().enumerate() {
            close(lr(epoch as u64), 0.02 * factor);
        }
        close(lr(24), 0.02);
        close(lr(25), 0.002);
        close(lr(45), 0.0002);
    }

    #[test]
    fn mmcv_linear_warmup_by_step() {
        // lr * (1 - (1 - step / warm-up steps) * (1 - ratio))
        let w = Warmup {
            epochs: 2.0,
            start_factor: 0.1,
            per_step: true,
        };
        for step in 0..25u64 {
            let ratio = 1.0 - (1.0 - (step as f64 / 20.0).min(1.0)) * 0.9;
            close(
                lr_at(&Schedule::Constant {}, Some(&w), 0.5, 10, 10, step as f64),
                0.5 * ratio,
            );
        }
    }

    #[test]
    fn paddle_warmup_meets_the_cosine() {
        // CustomWarmupCosineDecay of PP-TSM: 10 epochs from 0.005, base 0.01, 80 epochs.
        let s = Schedule::Cosine { per_step: true };
        let w = Warmup {
            epochs: 10.0,
            start_factor: 0.5,
            per_step: true,
        };
        let lr = |step: u64| lr_at(&s, Some(&w), 0.01, 80, 100, step as f64);
        let at_ten = 0.5 * 0.01 * ((PI * 10.0 / 80.0).cos() + 1.0);
        close(lr(0), 0.005);
        close(lr(500), 0.005 + (at_ten - 0.005) * 0.5);
        close(lr(1000), at_ten);
        close(lr(4000), 0.005);
        assert!(lr(7999) > 0.0 && lr(7999) < 1e-8);
    }

    #[test]
    fn one_epoch_of_warmup_by_epoch_is_the_start_factor() {
        let w = Warmup {
            epochs: 1.0,
            start_factor: 0.25,
            per_step: false,
        };
        close(
            lr_at(&Schedule::Constant {}, Some(&w), 1.0, 3, 5, 4.0),
            0.25,
        );
        close(lr_at(&Schedule::Constant {}, Some(&w), 1.0, 3, 5, 5.0), 1.0);
    }

    #[test]
    fn a_place_inside_an_epoch_has_one_rate_whatever_the_batch() {
        let s = Schedule::Cosine { per_step: true };
        // 40 of 120 clips: step 5 of 15 with 8 clips each, 3 1/3 of 10 with 12.
        let with_8 = lr_at(&s, None, 0.01, 80, 15, 2.0 * 15.0 + 5.0);
        let with_12 = lr_at(&s, None, 0.01, 80, 10, 2.0 * 10.0 + 40.0 / 12.0);
        close(with_8, with_12);
        let s = Schedule::Step {
            milestones: vec![2.5],
            gamma: 0.1,
        };
        close(lr_at(&s, None, 1.0, 80, 10, 24.9), 1.0);
        close(lr_at(&s, None, 1.0, 80, 10, 25.0), 0.1);
    }
}
