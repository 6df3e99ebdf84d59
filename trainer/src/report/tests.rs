use super::*;
use crate::meter::{EpochRecord, Metrics, Record, StartRecord, StepRecord, ValidationRecord};
use std::path::Path;

/// Invented numbers of a run that looks like UCF101 on 8 ranks.
pub(crate) fn summary() -> Summary {
    Summary {
        run: "ucf101-tsm".into(),
        arch: Arch::Resnet50,
        shift: ShiftMode::Bi,
        num_segments: 8,
        num_classes: 101,
        world_size: 8,
        global_batch: 288,
        epochs: 32,
        final_step: 1088,
        best_top1: Some(93.5),
        best_epoch: Some(28),
        last: Some(LastValidation {
            epoch: 32,
            top1: Some(92.0),
            top5: Some(99.0),
            mean_class: Some(91.75),
            loss: Some(0.31),
            num_non_finite: 0,
        }),
        fps_mean: Some(400.0),
        fps_total: Some(380.25),
        frames_per_s_mean: Some(3200.0),
        frames_per_s_total: Some(3042.0),
        elapsed_s: 3900.0,
        resumed_from: None,
        bad_videos: 0,
        reference: None,
        environment: BTreeMap::from([("host".into(), "a|b".into())]),
    }
}

const CONFIG: &str = "
run: {name: tiny, seed: 0, reference: 'top1 50.0 at 12.5 clips/s'}
model: {arch: resnet18, num_classes: 4, num_segments: 2, shift: {mode: uni}, partial_bn: false,
        head: {order: dropout_fc_mean, dropout: 0.5, init_std: 0.001}}
data: {format: rawframes, root: /x, train_list: a, val_list: b, sampler: mit,
       train: {crop: {center: {}}, size: 32, flip: 0}, val: {short_side: 32, size: 32}}
train: {epochs: 3, batch_per_rank: 4, precision: {mode: fp32}}
optim: {lr: 0.01, base_batch: 8, momentum: 0.9, weight_decay: 0, groups: flat, max_grad_norm: 20, schedule: {constant: {}}}
";

#[test]
fn a_report_reads_as_meant() {
    let reference = Some(Reference::from_text(
        "ModelZoo-PyTorch TSM, UCF101, 8p-V: top1 93.87, 410.492 clips/s",
    ));
    let text = markdown(
        &Summary {
            reference,
            ..summary()
        },
        &History::default(),
    );
    assert_eq!(
        text,
        "# ucf101-tsm\n\
         \n\
         ResNet-50, shift bi, 8 segments, 101 classes; 1088 steps of a global batch of 288 clips on 8 ranks, in 1h 05m.\n\
         \n\
         ## Results\n\
         \n\
         | | measured | published |\n\
         |---|--:|--:|\n\
         | best top-1, % | 93.50 at epoch 28 | 93.87 |\n\
         | last top-1, % | 92.00 |  |\n\
         | last top-5, % | 99.00 |  |\n\
         | last mean class accuracy, % | 91.75 |  |\n\
         | last validation loss | 0.31 |  |\n\
         | clips/s, mean of step rates [1] | 400.0 | 410.492 |\n\
         | frames/s, mean of step rates [1] | 3200.0 |  |\n\
         | clips/s, all clips / all step time | 380.2 |  |\n\
         | frames/s, all frames / all step time | 3042.0 |  |\n\
         \n\
         [1] of the last epoch of 7 steps or more, without its first 5 steps and its last.\n\
         \n\
         Published: ModelZoo-PyTorch TSM, UCF101, 8p-V: top1 93.87, 410.492 clips/s. A published rate belongs to its own \
         hardware; accuracies compare only under the same protocol, pretraining and number of epochs.\n\
         \n\
         ## Curves\n\
         \n\
         ![loss, top-1, learning rate and clips/s](curves.svg)\n\
         \n\
         ## Environment\n\
         \n\
         | | |\n\
         |---|---|\n\
         | host | a\\|b |\n\
         \n\
         ## Files\n\
         \n\
         `config.yaml` is what ran, `metrics.jsonl` has every step, `tb/` the same for TensorBoard, `checkpoints/` the weights.\n"
    );
}

#[test]
fn doubts_are_listed() {
    let start = |step, world_size| StartRecord {
        step,
        world_size,
        time_s: 0.0,
    };
    let history = History {
        starts: vec![start(0, 8), start(20, 4)],
        broken_lines: 1,
        ..History::default()
    };
    let text = markdown(
        &Summary {
            resumed_from: Some(20),
            bad_videos: 3,
            ..summary()
        },
        &history,
    );
    let expected = "and its last.\n\n- The run was resumed 1 time, last after step 20.\n\
                    - The number of ranks changed: [8, 4].\n\
                    - 3 samples could not be read and left out since the start or the last resume.\n\
                    - 1 line of metrics.jsonl could not be read.\n\n## Curves";
    assert!(text.contains(expected), "{text}");
}

#[test]
fn a_summary_survives_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::new(dir.path());
    for summary in [
        summary(),
        Summary {
            last: None,
            best_top1: None,
            fps_mean: None,
            ..summary()
        },
    ] {
        summary.write(&run).unwrap();
        assert_eq!(Summary::read(&run).unwrap(), summary);
    }
}

#[test]
fn reference_numbers_are_found_in_free_text() {
    let numbers = |text| {
        let r = Reference::from_text(text);
        (r.top1, r.clips_per_s)
    };
    assert_eq!(
        numbers("TSM README: Top-1: 93.87%, FPS 410.492"),
        (Some(93.87), Some(410.492))
    );
    assert_eq!(
        numbers("295.889 clips/s (top1=93.92)"),
        (Some(93.92), Some(295.889))
    );
    assert_eq!(numbers("clips/s and top1 are unknown"), (None, None));
}

#[test]
fn the_recipes_carry_the_published_numbers_they_reproduce() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    for (file, top1, clips_per_s) in [
        ("ucf101.yaml", 93.87, 410.492),
        ("sthv2.yaml", 58.95, 116.0),
    ] {
        let config = Config::load(&configs.join(file), &[]).unwrap();
        let reference = Reference::from_text(&config.run.reference.unwrap());
        assert_eq!(reference.top1, Some(top1), "{file}");
        assert_eq!(reference.clips_per_s, Some(clips_per_s), "{file}");
        let summary = Summary {
            reference: Some(reference),
            ..summary()
        };
        let report = markdown(&summary, &History::default());
        for published in [format!("| {top1} |\n"), format!("| {clips_per_s} |\n")] {
            assert!(
                report.contains(&published),
                "{file}: no {published:?} in\n{report}"
            );
        }
    }
}

#[test]
fn the_end_of_a_run_is_written_from_its_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::new(dir.path());
    fs_err::write(run.config(), CONFIG).unwrap();
    let config = Config::load(&run.config(), &[]).unwrap();
    let mut metrics = Metrics::append(run.metrics());
    metrics.write(&Record::Start(StartRecord {
        step: 0,
        time_s: 100.0,
        world_size: 2,
    }));
    for (epoch, top1) in [(1, 25.0), (2, 75.0), (3, 50.0)] {
        let (step, time_s) = (u64::from(epoch) * 8, 100.0 + 30.0 * f64::from(epoch));
        metrics.write(&Record::Step(StepRecord {
            step,
            epoch,
            time_s,
            loss: Some(1.0),
            ..Default::default()
        }));
        let clips_per_s_mean = (epoch < 3).then_some(10.0 * f64::from(epoch));
        let rates = EpochRecord {
            step,
            epoch,
            time_s,
            num_steps: 8,
            num_clips: 64,
            train_s: 16.0,
            clips_per_s_mean,
        };
        metrics.write(&Record::Epoch(rates));
        let validation = ValidationRecord {
            step,
            epoch,
            time_s,
            top1: Some(top1),
            num_clips: 4,
            ..Default::default()
        };
        metrics.write(&Record::Validation(validation));
    }
    let end = RunEnd {
        world_size: 2,
        final_step: 24,
        ..RunEnd::default()
    };
    let summary = write(&run, &config, end).unwrap();
    assert_eq!(
        (summary.best_top1, summary.best_epoch),
        (Some(75.0), Some(2))
    );
    assert_eq!(summary.last.as_ref().unwrap().top1, Some(50.0));
    assert_eq!(
        (summary.fps_mean, summary.fps_total),
        (Some(20.0), Some(4.0))
    );
    assert_eq!(
        (summary.frames_per_s_mean, summary.frames_per_s_total),
        (Some(40.0), Some(8.0))
    );
    assert_eq!(
        (
            summary.elapsed_s,
            summary.global_batch,
            summary.resumed_from
        ),
        (90.0, 8, None)
    );
    assert_eq!(Summary::read(&run).unwrap(), summary);
    svg::tests::assert_well_formed(&fs_err::read_to_string(curves_path(&run)).unwrap());
    let report = fs_err::read_to_string(run.report()).unwrap();
    assert!(
        report.contains("| best top-1, % | 75.00 at epoch 2 | 50 |"),
        "{report}"
    );
}

#[test]
fn a_missing_metrics_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::new(dir.path());
    let error = History::read(&run.metrics()).unwrap_err();
    assert!(format!("{error:#}").contains("metrics.jsonl"), "{error:#}");
}
