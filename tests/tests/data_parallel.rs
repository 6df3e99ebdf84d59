//! Two ranks train on what one would, and count every validation clip once.
//!
//! BatchNorm normalises with the statistics of a rank's own batch, so in general two ranks of four
//! clips are not one of eight. Here every clip of the training list is the same folder under
//! another label: the statistics are the same however the clips are dealt out, and loss and
//! gradients depend on which labels make a step, and on nothing else. `partial_bn` freezes all
//! BatchNorms but the first: on the few values of so small a network they would turn a rounding
//! error of 1e-7 into 1e-2 within six steps (with it, the losses differ by 2e-7 at most).

use crate::job::{Scene, expect, history};
use fs_err as fs;
use std::fmt::Write;
use tsm_job::exit;
use tsm_trainer::meter::History;

const STEPS: usize = 12;

/// Relative: float32 sums in another order, and what `STEPS` updates make of it.
const TOLERANCE: f64 = 1e-5;

fn train(scene: &Scene, run: &str, ranks: u32, more: &[&str]) -> History {
    let mut overrides = vec![
        "data.train.crop={center: {}}",
        // As many frames as segments: sampling has no choice.
        "model.num_segments=12",
        "model.head.init_std=0.1",
        "model.partial_bn=true",
        "train.log_every=1",
        "optim.scale_lr=false",
        "optim.lr=0.005",
    ];
    overrides.extend(more);
    expect(scene.job(run, ranks, &overrides), exit::OK);
    history(&scene.run(run))
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= TOLERANCE * a.abs()
}

fn assert_equal_training(a: &History, b: &History, what: &str) {
    assert_eq!((a.steps.len(), b.steps.len()), (STEPS, STEPS), "{what}");
    for (a, b) in a.steps.iter().zip(&b.steps) {
        let (loss, other) = (a.loss.unwrap(), b.loss.unwrap());
        assert!(
            close(loss, other),
            "{what}: loss at step {}: {loss} and {other}",
            a.step
        );
        assert_eq!(
            (a.top1, a.top5),
            (b.top1, b.top5),
            "{what}: step {}",
            a.step
        );
    }
    let losses: Vec<f64> = a.steps.iter().map(|s| s.loss.unwrap()).collect();
    let distinct = losses.windows(2).filter(|w| !close(w[0], w[1])).count();
    assert_eq!(
        distinct,
        STEPS - 1,
        "steps that look alike prove nothing: {losses:?}"
    );
}

#[test]
fn two_ranks_see_the_clips_that_one_would() {
    let scene = Scene::new();
    scene.motion_set(8, 17);
    let list = scene.path("motion/train.txt");
    let first = fs::read_to_string(&list).unwrap();
    let folder = first.split(' ').next().unwrap();
    // Uneven, so that two steps rarely have the same labels.
    let labels = (0..8 * STEPS).map(|i| (i * i / 3 + i / 7) % 8);
    let same = labels.fold(String::new(), |mut text, label| {
        writeln!(text, "{folder} 12 {label}").unwrap();
        text
    });
    fs::write(&list, same).unwrap();

    let one = train(&scene, "one", 1, &["train.batch_per_rank=8"]);
    let two = train(&scene, "two", 2, &["train.batch_per_rank=4"]);
    let micro = train(
        &scene,
        "micro",
        2,
        &["train.batch_per_rank=2", "train.accumulation=2"],
    );
    assert_equal_training(&one, &two, "1 x 8 and 2 x 4");
    assert_equal_training(&one, &micro, "1 x 8 and 2 x 2 x 2");

    // 17 clips do not divide by two ranks, nor by their batches.
    let [a, b] = [&one, &two].map(|h| h.validations.last().unwrap());
    assert_eq!((a.num_clips, b.num_clips), (17, 17));
    assert_eq!(
        (a.top1, a.top5, a.mean_class),
        (b.top1, b.top5, b.mean_class)
    );
    let (loss, other) = (a.loss.unwrap(), b.loss.unwrap());
    assert!(close(loss, other), "validation loss {loss} and {other}");
    let hits = a.top5.unwrap() * 17.0 / 100.0;
    assert!((hits - hits.round()).abs() < 1e-9, "{hits} of 17 clips");
}
