//! A run's history as plots.

use super::svg::{self, Panel, Series};
use crate::meter::{History, StepRecord};
use std::collections::BTreeMap;

/// `curves.svg`: loss, learning rate, top-1 and throughput; dashed lines where the run was resumed.
pub(super) fn curves(history: &History) -> String {
    let marks: Vec<f64> = history
        .starts
        .iter()
        .filter(|s| s.step > 0)
        .map(|s| s.step as f64)
        .collect();
    let over_steps = |title: &str, series: Vec<Series>, from_zero| Panel {
        title: title.into(),
        x_label: "step".into(),
        series,
        marks: marks.clone(),
        from_zero,
    };
    let train = |name: &str, value: fn(&StepRecord) -> Option<f64>| Series {
        name: name.into(),
        points: history
            .steps
            .iter()
            .filter_map(|r| Some((r.step as f64, value(r)?)))
            .collect(),
        dots: false,
    };
    let validation_loss = Series {
        name: "validation".into(),
        points: history
            .validations
            .iter()
            .filter_map(|v| Some((v.step as f64, v.loss?)))
            .collect(),
        dots: true,
    };
    let validation_top1 = Series {
        name: "validation".into(),
        points: history
            .validations
            .iter()
            .filter_map(|v| Some((f64::from(v.epoch), v.top1?)))
            .collect(),
        dots: true,
    };
    let train_top1 = Series {
        name: "train".into(),
        points: train_top1(&history.steps),
        dots: false,
    };
    svg::render(&[
        over_steps(
            "loss",
            vec![train("train", |r| r.loss), validation_loss],
            false,
        ),
        Panel {
            title: "top-1 in percent".into(),
            x_label: "epoch".into(),
            series: vec![train_top1, validation_top1],
            ..Panel::default()
        },
        over_steps("learning rate", vec![train("lr", |r| r.lr)], true),
        over_steps(
            "clips/s over all ranks",
            vec![train("clips/s", |r| r.clips_per_s)],
            true,
        ),
    ])
}

/// By epoch, the mean over the steps that know their top-1.
fn train_top1(steps: &[StepRecord]) -> Vec<(f64, f64)> {
    let mut sums: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
    for (epoch, top1) in steps.iter().filter_map(|r| Some((r.epoch, r.top1?))) {
        let sum = sums.entry(epoch).or_default();
        *sum = (sum.0 + top1, sum.1 + 1.0);
    }
    sums.into_iter()
        .map(|(epoch, (sum, count))| (f64::from(epoch), sum / count))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meter::{StartRecord, ValidationRecord};

    #[test]
    fn curves_of_any_history_are_well_formed() {
        svg::tests::assert_well_formed(&curves(&History::default()));
        let history = History {
            starts: vec![
                StartRecord::default(),
                StartRecord {
                    step: 2,
                    ..Default::default()
                },
            ],
            steps: (1..4)
                .map(|step| StepRecord {
                    step,
                    epoch: 1,
                    loss: Some(1.0),
                    ..Default::default()
                })
                .collect(),
            validations: vec![ValidationRecord {
                step: 3,
                epoch: 1,
                top1: Some(50.0),
                ..Default::default()
            }],
            ..History::default()
        };
        let svg = curves(&history);
        svg::tests::assert_well_formed(&svg);
        assert_eq!(
            svg.matches("stroke-dasharray").count(),
            1,
            "one resume in the one step panel with data"
        );
        assert_eq!(svg.matches("no data").count(), 2, "neither lr nor clips/s");
    }

    #[test]
    fn train_top1_is_the_mean_of_an_epoch() {
        let step = |epoch, top1| StepRecord {
            epoch,
            top1,
            ..Default::default()
        };
        let steps = [
            step(1, Some(10.0)),
            step(1, None),
            step(1, Some(20.0)),
            step(2, Some(40.0)),
        ];
        assert_eq!(train_top1(&steps), [(1.0, 15.0), (2.0, 40.0)]);
    }
}
