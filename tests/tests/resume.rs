//! A rank is killed in the middle of an epoch; the run goes on from its checkpoints as if nothing
//! had happened.

use crate::job::{Scene, contains, events, expect, history, json, kill_rank, stderr_of};
use fs_err as fs;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use tsm_job::{RunDir, exit};
use tsm_trainer::meter::StepRecord;

const STEPS_PER_EPOCH: u64 = 12;

/// Everything random is on: dropout, scales and positions of crops, flips, frames of a segment.
const JOB: [&str; 8] = [
    "run.seed=3",
    "model.head.dropout=0.5",
    "data.train.size=24",
    "data.train.flip=0.5",
    "train.epochs=2",
    "train.checkpoint_steps=5",
    "train.keep_last=100",
    "train.log_every=1",
];

pub fn tensors(run: &RunDir, step: u64) -> PathBuf {
    run.checkpoints()
        .join(format!("step-{step:08}.safetensors"))
}

/// Panics unless both checkpoints have the same tensors, bit for bit.
pub fn assert_identical(a: &Path, b: &Path) {
    let (a, b) = (fs::read(a).unwrap(), fs::read(b).unwrap());
    let (a, b) = (
        SafeTensors::deserialize(&a).unwrap(),
        SafeTensors::deserialize(&b).unwrap(),
    );
    let mut names = a.names();
    let mut other = b.names();
    names.sort();
    other.sort();
    assert_eq!(names, other);
    for section in ["model/", "buffer/", "momentum/"] {
        let count = names.iter().filter(|n| n.starts_with(section)).count();
        assert!(count > 10, "{count} tensors of {section}");
    }
    for name in names {
        let (left, right) = (a.tensor(name).unwrap(), b.tensor(name).unwrap());
        assert!(left.data() == right.data(), "{name} differs");
    }
}

/// What training made of a step, without times.
pub fn learned(r: &StepRecord) -> (u64, [Option<u64>; 5]) {
    let numbers = [r.loss, r.top1, r.top5, r.lr, r.grad_norm];
    (r.step, numbers.map(|n| n.map(f64::to_bits)))
}

fn assert_same_training(a: &RunDir, b: &RunDir) {
    let (one, two) = (history(a), history(b));
    assert_eq!(one.steps.len() as u64, 2 * STEPS_PER_EPOCH);
    let learn = |steps: &[StepRecord]| steps.iter().map(learned).collect::<Vec<_>>();
    assert_eq!(learn(&one.steps), learn(&two.steps));
    let validated =
        |v: &tsm_trainer::meter::ValidationRecord| (v.step, v.num_clips, v.loss, v.top1);
    assert_eq!(
        one.validations.iter().map(validated).collect::<Vec<_>>(),
        two.validations.iter().map(validated).collect::<Vec<_>>()
    );
    assert_identical(
        &tensors(a, 2 * STEPS_PER_EPOCH),
        &tensors(b, 2 * STEPS_PER_EPOCH),
    );
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let scene = Scene::new();
    scene.motion_set(96, 8);
    expect(scene.job("whole", 2, &JOB), exit::OK);
    let whole = scene.run("whole");

    let killed = scene.run("killed");
    let mut running = crate::job::start(scene.job("killed", 2, &JOB));
    let manifest = tensors(&killed, 15).with_extension("json");
    running.until("checkpoint of step 15", || manifest.exists().then_some(()));
    kill_rank(&killed, 1);
    let outcome = running.finish(crate::job::DEADLINE);
    assert_eq!(
        outcome.code,
        exit::SIGNAL_BASE + libc::SIGKILL,
        "{}",
        outcome.err
    );
    contains(
        &outcome.err,
        &["error: rank 1 failed first", "SIGKILL", "--resume"],
    );
    let failure = json(&killed.failure());
    assert_eq!(
        (&failure["rank"], &failure["exit_code"]),
        (&1.into(), &137.into())
    );
    assert!(!killed.summary().exists(), "a killed run has no summary");

    // Copies, because going on changes the folder.
    copy_folder(killed.path(), &scene.path("truncated"));
    copy_folder(killed.path(), &scene.path("reseeded"));
    let newest = events_of_checkpoints(&killed);
    let from = *newest.last().unwrap();
    assert!(
        from > STEPS_PER_EPOCH && from < 2 * STEPS_PER_EPOCH,
        "killed in the middle of the second epoch, not with checkpoints {newest:?}"
    );

    expect(scene.resume("killed", &[]), exit::OK);
    let starts = events(&killed.metrics(), "start");
    let steps: Vec<_> = starts.iter().map(|s| s["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, from]);
    assert_eq!(json(&killed.summary())["resumed_from"], from);
    let manifest = json(&killed.manifest());
    for part in ["tsm-launch", "tsm-trainer", "libtorch", "kernel"] {
        assert!(manifest["versions"][part].is_string(), "{manifest:#}");
    }
    assert_resumed(&killed, Some(from));
    let earlier = json(&killed.path().join("manifest-1.json"));
    assert!(earlier["generations"][0]["resumed_from"].is_null());
    assert_same_training(&whole, &killed);

    truncated_newest_checkpoint(&scene, &whole, &newest);
    another_seed(&scene, &whole, from);
}

/// A run from the checkpoint of another one loses a rank before its own first checkpoint: started again by the launcher,
/// or continued by hand, it goes on from the same checkpoint as before, and one that began without any from its beginning.
#[test]
fn a_run_without_a_checkpoint_of_its_own_goes_on_from_where_it_began() {
    let scene = Scene::new();
    scene.motion_set(96, 8);
    let job = |run: &str, epochs: u64, checkpoint_steps: u64| {
        let mut words = JOB.to_vec();
        let epochs = format!("train.epochs={epochs}");
        let steps = format!("train.checkpoint_steps={checkpoint_steps}");
        words.extend([epochs.as_str(), steps.as_str()]);
        scene.job(run, 2, &words)
    };
    expect(job("old", 1, 5), exit::OK);
    let start = tensors(&scene.run("old"), STEPS_PER_EPOCH);
    let start = start.to_str().unwrap();
    let first_step = |run: &RunDir| run.metrics().exists() && !history(run).steps.is_empty();
    let kill_early = |run: &str, options: &[&str]| {
        let mut command = job(run, 2, 1000);
        command.args(options);
        let mut running = crate::job::start(command);
        let run = scene.run(run);
        running.until("a step", || first_step(&run).then_some(()));
        assert!(
            !run.checkpoints().exists() || events_of_checkpoints(&run).is_empty(),
            "it had saved before it was killed"
        );
        kill_rank(&run, 1);
        running.finish(crate::job::DEADLINE)
    };
    let origins = |run: &RunDir| {
        let generations = json(&run.manifest())["generations"].clone();
        let of = |g: &serde_json::Value| (g["resumed_from"].clone(), g["resumed_step"].as_u64());
        generations
            .as_array()
            .unwrap()
            .iter()
            .map(of)
            .collect::<Vec<_>>()
    };
    let began = (start.into(), Some(STEPS_PER_EPOCH));

    let outcome = kill_early("again", &["--resume", start, "--max-restarts", "2"]);
    assert_eq!(outcome.code, exit::OK, "{}", outcome.err);
    assert_eq!(origins(&scene.run("again")), [began.clone(), began.clone()]);

    let killed = exit::SIGNAL_BASE + libc::SIGKILL;
    assert_eq!(kill_early("by-hand", &["--resume", start]).code, killed);
    expect(scene.resume("by-hand", &[]), exit::OK);
    assert_eq!(origins(&scene.run("by-hand")), [began]);

    assert_eq!(kill_early("anew", &[]).code, killed);
    let outcome = expect(scene.resume("anew", &[]), exit::OK);
    contains(&outcome.out, &["start from the beginning: "]);
    assert_eq!(
        origins(&scene.run("anew")),
        [(serde_json::Value::Null, None)]
    );
}

/// The manifest names the checkpoint from which the first start of the ranks went on.
fn assert_resumed(run: &RunDir, step: Option<u64>) {
    let manifest = json(&run.manifest());
    let generation = &manifest["generations"][0];
    let path = step.map(|step| tensors(run, step).display().to_string());
    assert_eq!(generation["resumed_from"].as_str(), path.as_deref());
    assert_eq!(generation["resumed_step"].as_u64(), step);
}

/// Steps of the checkpoints of a run, oldest first.
fn events_of_checkpoints(run: &RunDir) -> Vec<u64> {
    let files = fs::read_dir(run.checkpoints()).unwrap().flatten();
    let step = |name: String| {
        name.strip_prefix("step-")?
            .strip_suffix(".json")?
            .parse()
            .ok()
    };
    let mut steps: Vec<u64> = files
        .filter_map(|f| step(f.file_name().to_string_lossy().into_owned()))
        .collect();
    steps.sort();
    steps
}

fn truncated_newest_checkpoint(scene: &Scene, whole: &RunDir, steps: &[u64]) {
    let [.., before, newest] = *steps else {
        panic!("one checkpoint only: {steps:?}");
    };
    let run = scene.run("truncated");
    let broken = tensors(&run, newest);
    let length = fs::metadata(&broken).unwrap().len();
    let file = fs::OpenOptions::new().write(true).open(&broken).unwrap();
    file.set_len(length / 2).unwrap();
    let outcome = expect(scene.resume("truncated", &[]), exit::OK);
    let name = format!("step-{newest:08}.safetensors");
    contains(&outcome.out, &["warning: ", &name, "is not usable"]);
    assert_eq!(json(&run.summary())["resumed_from"], before);
    assert_resumed(&run, Some(before));
    assert_same_training(whole, &run);
}

fn another_seed(scene: &Scene, whole: &RunDir, from: u64) {
    let run = scene.run("reseeded");
    let before = fs::read(run.metrics()).unwrap();
    let outcome = expect(scene.resume("reseeded", &["run.seed=4"]), exit::CONFIG);
    contains(
        &outcome.err,
        &[
            "run.seed was 3, now 4",
            "hint: ",
            &format!("step-{from:08}"),
        ],
    );
    contains(&stderr_of(&run, 1), &["run.seed was 3, now 4"]);
    assert_eq!(
        fs::read(run.metrics()).unwrap(),
        before,
        "nothing was trained"
    );

    // The refused seed is kept, and is not what the next attempt starts with.
    assert!(run.path().join("config-2.yaml.refused").exists());
    expect(scene.resume("reseeded", &[]), exit::OK);
    assert_same_training(whole, &run);
}
