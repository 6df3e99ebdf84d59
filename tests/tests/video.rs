//! Video files of several containers and codecs are trained on as they are.

use crate::job::{Scene, expect, history};
use fs_err as fs;
use std::collections::BTreeSet;
use std::fmt::Write;
use tsm_job::exit;

#[test]
fn real_videos_of_several_formats_are_a_training_set() {
    let Some(videos) = tsm_tests::shared("videos") else {
        return;
    };
    let table = fs::read_to_string(videos.join("labels.csv")).unwrap();
    let rows: Vec<(&str, &str)> = table
        .lines()
        .skip(1)
        .map(|line| {
            let mut fields = line.split(',');
            (fields.next().unwrap(), fields.next().unwrap())
        })
        .collect();
    let extension = |name: &str| name.rsplit('.').next().unwrap().to_owned();
    let formats: BTreeSet<String> = rows.iter().map(|(file, _)| extension(file)).collect();
    assert!(formats.len() >= 3, "{formats:?}");
    let labels: Vec<&str> = rows
        .iter()
        .map(|r| r.1)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let list = rows.iter().fold(String::new(), |mut text, (file, label)| {
        let label = labels.iter().position(|l| l == label).unwrap();
        writeln!(text, "{file} {label}").unwrap();
        text
    });

    let scene = Scene::new();
    fs::create_dir(scene.path("motion")).unwrap();
    for name in ["motion/train.txt", "motion/val.txt"] {
        fs::write(scene.path(name), &list).unwrap();
    }
    fs::write(scene.path("motion/classes.txt"), labels.join("\n")).unwrap();
    let root = format!("data.root={}", videos.display());
    let classes = format!("model.num_classes={}", labels.len());
    let overrides = [
        "data.format=video",
        &root,
        &classes,
        "data.train.short_side=40",
        "data.val.short_side=40",
        "train.batch_per_rank=2",
        "train.drop_last=false",
        "train.log_every=1",
    ];
    expect(scene.job("run", 2, &overrides), exit::OK);
    let history = history(&scene.run("run"));
    // A last step that has no clip for every rank is left out.
    let steps = rows.len() / 4 + usize::from(rows.len() % 4 >= 2);
    assert_eq!(history.steps.len(), steps);
    assert!(
        history
            .steps
            .iter()
            .all(|s| s.loss.is_some_and(f64::is_finite))
    );
    let validation = history.validations.last().unwrap();
    assert_eq!(validation.num_clips, rows.len() as u64);
    assert!(validation.loss.is_some_and(f64::is_finite));
    assert_eq!(
        crate::job::json(&scene.run("run").summary())["bad_videos"],
        0
    );
}
