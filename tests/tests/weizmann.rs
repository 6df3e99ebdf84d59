//! Real actions of real people: trained on six, recognised on three others.

use crate::job::{
    DEADLINE, Scene, config, contains, events, expect_within, history, json, kill_rank, start,
};
use std::time::Duration;
use tsm_job::exit;
use tsm_tests::weizmann::write_frames;

/// Percent of the clips of unseen people.
const WANTED: f64 = 80.0;

#[test]
fn actions_of_unseen_people_are_recognised_also_after_a_kill() {
    let Some(motion) = tsm_tests::shared("motion") else {
        return;
    };
    let scene = Scene::new();
    let data = scene.path("weizmann");
    let counts = write_frames(&motion, &data).unwrap_or_else(|e| panic!("{e:#}"));
    assert_eq!(counts, (63, 30));

    let seed = std::env::var("TSM_SEED").unwrap_or("0".into());
    let path = |key: &str, name: &str| format!("data.{key}={}", data.join(name).display());
    let mut words: Vec<String> = ["--cpus", "2", "--run-dir", "run"].map(String::from).into();
    words.push(config("demo.yaml").to_string_lossy().into_owned());
    words.extend([
        path("root", ""),
        path("train_list", "train.txt"),
        path("val_list", "val.txt"),
        path("class_names", "classes.txt"),
        format!("run.seed={seed}"),
    ]);
    // 96 x 120 pixels; every action is the same to the left and to the right. Seeds 0, 1 and 2 end
    // at 100, 96.7 and 96.7 %; with 8 frames, since steps and jumps are short, at 100, 83 and 97 %.
    let recipe = [
        "data.frame_template=img_{:05}.png",
        "data.train.crop.multi_scale.scales=[1.0, 0.875, 0.75]",
        "data.train.size=64",
        "data.train.flip=0.5",
        "data.val.short_side=72",
        "data.val.size=64",
        "model.num_classes=10",
        "model.num_segments=16",
        "model.width=0.25",
        "model.shift.div=8",
        "model.head.dropout=0.3",
        "model.head.init_std=0.001",
        "train.batch_per_rank=4",
        "train.epochs=110",
        "train.eval_every=20",
        "train.checkpoint_every=20",
        "train.checkpoint_steps=50",
        "optim.base_batch=8",
        "optim.lr=0.02",
        "optim.max_grad_norm=20",
        "optim.warmup=null",
    ];
    words.extend(recipe.map(String::from));

    let run = scene.run("run");
    let mut running = start(scene.launch(&words));
    let halfway = run.checkpoints().join("step-00000400.json");
    running.until("checkpoint half-way", || halfway.exists().then_some(()));
    kill_rank(&run, 1);
    let outcome = running.finish(10 * DEADLINE);
    assert_eq!(
        outcome.code,
        exit::SIGNAL_BASE + libc::SIGKILL,
        "{}",
        outcome.err
    );
    contains(&outcome.err, &["error: rank 1 failed first"]);

    expect_within(scene.resume("run", &[]), exit::OK, 10 * DEADLINE);
    let starts = events(&run.metrics(), "start");
    assert!(
        starts.len() == 2 && starts[1]["step"].as_u64() >= Some(400),
        "{starts:?}"
    );
    let history = history(&run);
    assert_eq!(history.steps.len(), 110 * 7);
    let last = history.validations.last().unwrap();
    let top1 = last.top1.unwrap();
    eprintln!(
        "seed {seed}: top-1 {top1:.1} % of {} clips of unseen people, {:.0?} of training",
        last.num_clips,
        Duration::from_secs_f64(history.elapsed_s)
    );
    assert_eq!(last.num_clips, 30);
    assert_eq!(json(&run.summary())["last"]["top1"].as_f64(), last.top1);
    assert!(top1 >= WANTED, "top-1 is {top1:.1} %, {WANTED} % is wanted");
}
