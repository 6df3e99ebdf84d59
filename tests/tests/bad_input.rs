//! Every wrong input has its message and its exit code, and leaves nothing half done.

use crate::job::{Outcome, Scene, config, contains, events, expect, json, stderr_of, survivors};
use fs_err as fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tsm_job::exit;

/// The job is refused before anything starts: no run folder.
fn refused(scene: &Scene, command: Command, code: i32, parts: &[&str]) -> Outcome {
    let outcome = expect(command, code);
    assert!(outcome.err.starts_with("error: "), "{}", outcome.err);
    contains(&outcome.err, parts);
    assert!(!scene.path("run").exists(), "a run folder was made");
    outcome
}

/// The workers start, and all end with `code` before the first step is saved.
fn fails(scene: &Scene, command: Command, code: i32, parts: &[&str]) -> Outcome {
    let outcome = expect(command, code);
    let run = scene.run("run");
    contains(&outcome.err, &[" failed first"]);
    contains(&outcome.err, parts);
    let failure = json(&run.failure());
    assert_eq!(failure["exit_code"], code);
    contains(failure["message"].as_str().expect("a message"), &parts[..1]);
    assert!(!run.summary().exists(), "a failed run has no summary");
    let manifest = json(&run.manifest());
    assert_eq!(
        (&manifest["outcome"], &manifest["exit_code"]),
        (&"failed".into(), &code.into())
    );
    let saved = fs::read_dir(run.checkpoints()).map_or(0, Iterator::count);
    assert_eq!(saved, 0, "a checkpoint of a run that never took a step");
    let left = survivors(&scene.path("run"));
    assert!(left.is_empty(), "still running: {left:?}");
    outcome
}

fn edit(path: &Path, change: impl FnOnce(String) -> String) {
    let text = fs::read_to_string(path).unwrap();
    fs::write(path, change(text)).unwrap();
}

#[test]
fn a_misspelt_key_is_shown_with_its_place() {
    let scene = Scene::new();
    let text = fs::read_to_string(config("demo.yaml")).unwrap();
    let is_epochs = |l: &&str| l.starts_with("  epochs: ");
    let right = text.lines().find(is_epochs).unwrap();
    let line = 1 + text.lines().position(|l| l == right).unwrap();
    let wrong = right.replace("epochs", "epoches");
    fs::write(scene.path("job.yaml"), text.replace(right, &wrong)).unwrap();
    let command = scene.launch(&["--cpus", "2", "--run-dir", "run", "job.yaml"]);
    let place = format!("job.yaml:{line}:3: unknown key `epoches` in train");
    refused(
        &scene,
        command,
        exit::CONFIG,
        &[&place, "did you mean `epochs`?"],
    );
}

#[test]
fn all_problems_are_listed_at_once() {
    let scene = Scene::new();
    let overrides = [
        "optim.momentum=2",
        "train.epochs=some",
        "model.arch=resnet5",
        "optm.lr=1",
    ];
    let parts = [
        // The missing `train.epochs` is not a fifth problem.
        "4 problems in the configuration",
        "override optim.momentum=2: ",
        "override train.epochs=some: ",
        "did you mean `resnet50`?",
        "unknown section `optm`",
    ];
    refused(
        &scene,
        scene.job("run", 2, &overrides),
        exit::CONFIG,
        &parts,
    );
}

#[test]
fn more_gpus_than_the_machine_has() {
    let scene = Scene::new();
    scene.motion_set(8, 8);
    let mut command = scene.launch(&["--gpus", "8", "--run-dir", "run"]);
    command.arg(config("demo.yaml")).args(scene.overrides(&[]));
    command.env("CUDA_VISIBLE_DEVICES", "");
    let parts = ["cannot start 8 workers", "0 GPUs are visible", "hint: "];
    refused(&scene, command, exit::PREFLIGHT, &parts);
}

#[test]
fn a_list_or_weights_that_are_missing() {
    let scene = Scene::new();
    scene.motion_set(8, 8);
    let overrides = [
        "data.train_list=nowhere/train.txt",
        "model.weights=nowhere.safetensors",
    ];
    let parts = [
        "2 paths of the configuration",
        "data.train_list is nowhere/train.txt: no such file",
        "model.weights is nowhere.safetensors: no such file",
        "hint: ",
    ];
    refused(&scene, scene.job("run", 2, &overrides), exit::DATA, &parts);
}

#[test]
fn a_list_with_bad_lines() {
    let scene = Scene::new();
    scene.motion_set(8, 8);
    edit(&scene.path("motion/train.txt"), |text| {
        let mut lines: Vec<&str> = text.lines().collect();
        lines[2] = "clip eleven 3";
        lines[4] = "clip 12 8";
        lines.join("\n")
    });
    let parts = [
        "2 bad lines",
        "train.txt:3: `clip eleven 3`: the number of frames is `eleven`",
        "train.txt:5: `clip 12 8`: label 8 is not in 0..8",
    ];
    fails(&scene, scene.job("run", 2, &[]), exit::DATA, &parts);
}

/// Removes the frames of the clip on `line` of the training list; the path of its first.
fn remove_frames(scene: &Scene, line: usize) -> PathBuf {
    let list = fs::read_to_string(scene.path("motion/train.txt")).unwrap();
    let clip = list
        .lines()
        .nth(line - 1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap();
    let folder = scene.path("motion").join(clip);
    for entry in fs::read_dir(&folder).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    folder.join("img_00001.jpg")
}

#[test]
fn frames_that_are_missing_stop_the_run() {
    let scene = Scene::new();
    scene.motion_set(16, 8);
    let frame = remove_frames(&scene, 6);
    let folder = frame.parent().unwrap().display().to_string();
    let parts = [
        "cannot read a sample",
        &folder,
        "train.txt:6",
        "data.on_error: skip",
    ];
    let outcome = fails(&scene, scene.job("run", 2, &[]), exit::DATA, &parts);
    let rank = json(&scene.run("run").failure())["rank"].as_u64().unwrap();
    contains(&outcome.err, &[&format!("error: rank {rank} failed first")]);
    contains(&stderr_of(&scene.run("run"), rank as u32), &[&folder]);
}

#[test]
fn frames_that_are_missing_are_left_out_counted_and_named_on_request() {
    let scene = Scene::new();
    scene.motion_set(16, 8);
    let frame = remove_frames(&scene, 6);
    let overrides = ["data.on_error=skip", "train.epochs=3", "train.log_every=1"];
    expect(scene.job("run", 2, &overrides), exit::OK);
    let run = scene.run("run");
    // Once an epoch, whichever rank's turn it is.
    assert_eq!(json(&run.summary())["bad_videos"], 3);
    let said = format!("{}{}", stderr_of(&run, 0), stderr_of(&run, 1));
    let folder = frame.parent().unwrap().display().to_string();
    let named = said
        .lines()
        .filter(|l| l.starts_with("warning: left out: ") && l.contains(&folder));
    assert_eq!(named.count(), 3, "{said}");

    let scarce = scene.job(
        "scarce",
        2,
        &["data.on_error=skip", "data.max_bad_videos=0"],
    );
    contains(
        &expect(scarce, exit::DATA).err,
        &["data.max_bad_videos is 0", &folder],
    );
}

#[test]
fn a_truncated_jpeg_stops_the_run() {
    let scene = Scene::new();
    scene.motion_set(8, 8);
    let list = fs::read_to_string(scene.path("motion/train.txt")).unwrap();
    let clip = list.lines().nth(3).unwrap().split(' ').next().unwrap();
    let folder = scene.path("motion").join(clip);
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    }
    let parts = [
        "cannot read a sample",
        &folder.display().to_string(),
        "train.txt:4",
        ".jpg",
    ];
    fails(&scene, scene.job("run", 2, &[]), exit::DATA, &parts);
}

#[test]
fn a_checkpoint_of_another_network() {
    let scene = Scene::new();
    scene.motion_set(8, 8);
    expect(scene.job("before", 2, &[]), exit::OK);
    let checkpoint = scene.run("before").checkpoints().join("best.safetensors");
    let mut command = scene.job("run", 2, &["model.num_classes=9", "data.class_names=null"]);
    command.arg("--resume").arg(&checkpoint);
    let parts = [
        "is from another network",
        "model.num_classes is 8 in the checkpoint, 9 in this run",
    ];
    fails(&scene, command, exit::CONFIG, &parts);
}

#[test]
fn weights_that_are_no_weights_or_of_another_network() {
    let scene = Scene::new();
    scene.motion_set(8, 8);
    fs::write(scene.path("notes.safetensors"), "these are not weights").unwrap();
    let command = scene.job("run", 2, &["model.weights=notes.safetensors"]);
    fails(
        &scene,
        command,
        exit::DATA,
        &["cannot load weights", "notes.safetensors"],
    );

    let scene = Scene::new();
    scene.motion_set(8, 8);
    let zeros = vec![0; 16 * 3 * 7 * 7 * 4];
    let conv1 =
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![16, 3, 7, 7], &zeros);
    let file = safetensors::serialize([("conv1.weight", conv1.unwrap())], None).unwrap();
    fs::write(scene.path("one.safetensors"), file).unwrap();
    let command = scene.job("run", 2, &["model.weights=one.safetensors"]);
    let parts = [
        "does not fit the network",
        "model.weights_min_coverage asks for 90.0 %",
        "model.arch",
    ];
    fails(&scene, command, exit::CONFIG, &parts);
}

#[test]
fn a_loss_that_is_not_finite_stops_all_ranks_at_the_same_step() {
    let scene = Scene::new();
    scene.motion_set(64, 8);
    let overrides = [
        "optim.lr=1e9",
        "optim.max_grad_norm=null",
        "train.log_every=1",
    ];
    fails(
        &scene,
        scene.job("run", 2, &overrides),
        exit::DIVERGED,
        &["the loss is not finite at step "],
    );
    let run = scene.run("run");
    let ends: Vec<_> = events(&run.events(), "exit")
        .iter()
        .map(|e| e["end"]["code"].as_i64())
        .collect();
    assert_eq!(
        ends,
        [Some(i64::from(exit::DIVERGED)); 2],
        "both ranks end by themselves"
    );
    let step = |rank| {
        let said = stderr_of(&run, rank);
        let (_, rest) = said.split_once("not finite at step ").expect("the step");
        rest.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(step(0), step(1));
    // Every step before has a finite loss in the metrics, and no later one is there.
    let steps = events(&run.metrics(), "step");
    assert_eq!(steps.len() as u64, step(0) - 1);
    assert!(steps.iter().all(|s| s["loss"].is_f64()), "{steps:?}");
}

/// A small file system of its own; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, with a word on stderr, where mounting is not allowed.
    fn mount(at: PathBuf) -> Option<SmallDisk> {
        fs::create_dir(&at).unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
            .arg(&at)
            .output();
        if mount.is_ok_and(|o| o.status.success()) {
            return Some(SmallDisk(at));
        }
        eprintln!("skipped: a full disk needs the right to mount a tmpfs");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_named_with_what_was_needed_and_free() {
    let scene = Scene::new();
    scene.motion_set(8, 8);
    let Some(_disk) = SmallDisk::mount(scene.path("disk")) else {
        return;
    };
    let outcome = expect(scene.job("disk/early", 2, &[]), exit::PREFLIGHT);
    let parts = [
        " cannot run the job: ",
        " are free for ",
        "hint: remove old runs, or take another folder with --run-dir",
    ];
    contains(&outcome.err, &parts);

    let mut unchecked = scene.job("disk/run", 2, &[]);
    unchecked.args(["--preflight", "off"]);
    let outcome = expect(unchecked, exit::CANNOT_WRITE);
    let parts = [
        "error: rank 0 failed first",
        "cannot write checkpoint",
        "bytes needed",
        "bytes free on its file system",
        "hint: free some space",
    ];
    contains(&outcome.err, &parts);
    let run = scene.run("disk/run");
    let left = fs::read_dir(run.checkpoints()).unwrap().count();
    assert_eq!(
        left, 0,
        "half a checkpoint takes the space of the next attempt"
    );
    assert!(survivors(run.path()).is_empty());
}
