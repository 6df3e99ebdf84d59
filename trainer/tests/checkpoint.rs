//! Checkpoints on a real file system: exact round trips, damage, full disks.

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use tsm_job::config::{self, Arch, HeadOrder, PrecisionMode, ShiftMode};
use tsm_job::exit;
use tsm_trainer::checkpoint::{
    Checkpoints, FORMAT, Found, LossScaleState, Meta, Snapshot, find, section,
};
use tsm_trainer::ddp::Peers;
use tsm_trainer::train::origin;

fn model() -> config::Model {
    config::Model {
        arch: Arch::Resnet18,
        width: 0.25,
        num_classes: 3,
        num_segments: 8,
        shift: config::Shift {
            mode: ShiftMode::Bi,
            direction: Default::default(),
            div: 8,
            place: Default::default(),
            n_round: None,
        },
        temporal_pool: false,
        head: config::Head {
            order: HeadOrder::DropoutFcMean,
            dropout: 0.5,
            init_std: 0.001,
        },
        partial_bn: false,
        weights: None,
        weights_min_coverage: 0.9,
    }
}

fn meta(step: u64) -> Meta {
    Meta {
        format: FORMAT,
        run_id: "demo-1".into(),
        epoch: 2,
        step,
        step_in_epoch: 5,
        clips_in_epoch: Some(5 * 16),
        num_clips: Some(96),
        samples_seen: step * 16,
        global_batch: 16,
        world_size: 2,
        seed: 7,
        loss_scale: Some(LossScaleState {
            scale: 32768.0,
            good_steps: 41,
        }),
        best_top1: Some(61.25),
        best_epoch: 3,
        class_names: vec!["up".into(), "down, \"quoted\"".into(), "stäy".into()],
        model: model(),
        torch: "2.11.0".into(),
    }
}

fn snapshot(step: u64) -> Snapshot {
    let weight = Tensor::arange(12, (Kind::Float, Device::Cpu)).reshape([3, 4]) * step as f64;
    let mut s = Snapshot::new(meta(step));
    s.put(section::MODEL, [("fc.weight", &weight)]);
    s.put(section::MOMENTUM, [("fc.weight", &(weight * 0.5))]);
    s
}

fn bits(t: &Tensor) -> (Kind, Vec<i64>, Vec<u8>) {
    let t = t.contiguous();
    let mut bytes = vec![0u8; t.numel() * t.kind().elt_size_in_bytes()];
    t.copy_data_u8(&mut bytes, t.numel());
    (t.kind(), t.size(), bytes)
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs_err::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn code(e: &anyhow::Error) -> i32 {
    exit::code_of(e)
}

#[test]
fn every_kind_comes_back_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let floats = Tensor::from_slice(&[
        1.0f32,
        -0.0,
        f32::NAN,
        f32::INFINITY,
        1e-40,
        0.33333334,
        65504.0,
        -1e30,
    ]);
    let mut s = Snapshot::new(meta(12));
    let tensors = [
        ("float", floats.shallow_clone()),
        ("half", floats.to_kind(Kind::Half)),
        ("bf16", floats.to_kind(Kind::BFloat16)),
        ("double", floats.to_kind(Kind::Double)),
        ("count", Tensor::from(123456789012i64)),
        ("strided", floats.reshape([2, 4]).tr()),
        ("empty", Tensor::zeros([0, 3], (Kind::Float, Device::Cpu))),
        ("flags", Tensor::from_slice(&[true, false, true])),
    ];
    s.put(section::BUFFER, tensors.iter().map(|(n, t)| (*n, t)));
    let path = Checkpoints::open(dir.path(), 3)
        .unwrap()
        .save(&s, false)
        .unwrap();

    let back = find(&path).unwrap().snapshot;
    assert_eq!(back.meta, s.meta);
    assert_eq!(
        back.tensors.keys().collect::<Vec<_>>(),
        s.tensors.keys().collect::<Vec<_>>()
    );
    for (key, tensor) in &s.tensors {
        assert_eq!(bits(&back.tensors[key]), bits(tensor), "{key}");
    }
}

#[test]
fn restore_writes_all_or_nothing() {
    let s = snapshot(3);
    let good = Tensor::zeros([3, 4], (Kind::Float, Device::Cpu));
    s.restore(section::MODEL, [("fc.weight", &good)]).unwrap();
    assert_eq!(bits(&good), bits(&s.tensors["model/fc.weight"]));

    let target = Tensor::zeros([3, 4], (Kind::Float, Device::Cpu));
    let other = Tensor::zeros([3], (Kind::Float, Device::Cpu));
    let e = s
        .restore(
            section::MODEL,
            [("fc.weight", &target), ("fc.bias", &other)],
        )
        .unwrap_err();
    assert!(e.to_string().contains("model/fc.bias is missing"), "{e}");
    assert_eq!(code(&e), exit::DATA);
    assert_eq!(f64::try_from(target.abs().sum(Kind::Float)).unwrap(), 0.0);

    let e = s
        .restore(section::MODEL, [("fc.weight", &other)])
        .unwrap_err();
    assert!(
        e.to_string().contains("[3, 4]") && e.to_string().contains("[3]"),
        "{e}"
    );
    let half = Tensor::zeros([3, 4], (Kind::Half, Device::Cpu));
    let e = s
        .restore(section::MODEL, [("fc.weight", &half)])
        .unwrap_err();
    assert!(e.to_string().contains("Half"), "{e}");
    let e = s.restore(section::MODEL, []).unwrap_err();
    assert!(
        e.to_string()
            .contains("model/fc.weight of the checkpoint is unknown"),
        "{e}"
    );
}

#[test]
fn another_network_is_refused_field_by_field() {
    let s = snapshot(3);
    let mut same = model();
    same.weights = Some("elsewhere.safetensors".into());
    s.check_model(&same).unwrap();

    let mut other = model();
    other.shift.mode = ShiftMode::Uni;
    other.num_classes = 27;
    let e = s.check_model(&other).unwrap_err();
    assert_eq!(code(&e), exit::CONFIG);
    let text = e.to_string();
    assert!(
        text.contains("model.shift.mode is \"bi\" in the checkpoint, \"uni\" in this run"),
        "{text}"
    );
    assert!(
        text.contains("model.num_classes is 3 in the checkpoint, 27 in this run"),
        "{text}"
    );
    assert!(!text.contains("width"), "{text}");
}

#[test]
fn damaged_checkpoints_are_skipped_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let c = Checkpoints::open(dir.path(), 10).unwrap();
    for step in 1..=6 {
        c.save(&snapshot(step), false).unwrap();
    }
    let file = |step: u64, end: &str| dir.path().join(format!("step-{step:08}.{end}"));
    // 6: a byte flipped in the data; 5: cut short; 4: no manifest; 3: manifest cut; 2: tensors gone.
    let mut data = fs_err::read(file(6, "safetensors")).unwrap();
    *data.last_mut().unwrap() ^= 1;
    fs_err::write(file(6, "safetensors"), data).unwrap();
    let data = fs_err::read(file(5, "safetensors")).unwrap();
    fs_err::write(file(5, "safetensors"), &data[..data.len() - 7]).unwrap();
    fs_err::remove_file(file(4, "json")).unwrap();
    let data = fs_err::read(file(3, "json")).unwrap();
    fs_err::write(file(3, "json"), &data[..data.len() / 2]).unwrap();
    fs_err::remove_file(file(2, "safetensors")).unwrap();

    let found = find(dir.path()).unwrap();
    assert_eq!(found.snapshot.meta.step, 1);
    assert_eq!(found.path, file(1, "safetensors"));
    let skipped = found.skipped.join("\n");
    assert_eq!(found.skipped.len(), 4, "{skipped}");
    for (step, why) in [
        (6, "SHA-256"),
        (5, "bytes, its manifest says"),
        (3, "JSON"),
        (2, "step-00000002.safetensors"),
    ] {
        let line = &found
            .skipped
            .iter()
            .find(|l| l.contains(&format!("step-{step:08}")));
        assert!(
            line.is_some_and(|l| l.contains(why)),
            "{step} {why}: {skipped}"
        );
    }

    let e = find(&file(6, "safetensors")).unwrap_err();
    assert_eq!(code(&e), exit::DATA);
    let e = find(&file(4, "safetensors")).unwrap_err();
    assert!(e.to_string().contains("no manifest"), "{e}");

    fs_err::remove_file(file(1, "json")).unwrap();
    let e = find(dir.path()).unwrap_err();
    assert!(e.to_string().contains("none of its 4 checkpoints"), "{e}");
}

#[test]
fn a_format_of_the_future_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let c = Checkpoints::open(dir.path(), 3).unwrap();
    let path = c.save(&snapshot(1), false).unwrap().with_extension("json");
    let text = fs_err::read_to_string(&path).unwrap();
    fs_err::write(&path, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    let e = find(&path).unwrap_err();
    assert!(
        e.to_string()
            .contains("it has format 2, this program reads format 1"),
        "{e}"
    );
}

#[test]
fn resume_takes_a_run_a_folder_or_a_file() {
    let run = tempfile::tempdir().unwrap();
    let dir = run.path().join("checkpoints");
    let e = find(&dir).unwrap_err();
    assert!(e.to_string().contains("does not exist"), "{e}");
    let c = Checkpoints::open(&dir, 3).unwrap();
    let e = find(run.path()).unwrap_err();
    assert!(e.to_string().contains("no step-*.json"), "{e}");
    let first = c.save(&snapshot(9), false).unwrap();
    c.save(&snapshot(10), false).unwrap();
    for (path, step) in [
        (run.path(), 10),
        (&*dir, 10),
        (&*first, 9),
        (&*first.with_extension("json"), 9),
    ] {
        assert_eq!(find(path).unwrap().snapshot.meta.step, step, "{path:?}");
    }
}

#[test]
fn old_checkpoints_go_and_the_best_stays() {
    let dir = tempfile::tempdir().unwrap();
    let c = Checkpoints::open(dir.path(), 2).unwrap();
    assert!(c.best().unwrap().is_none());
    for step in 1..=5 {
        c.save(&snapshot(step), step == 2).unwrap();
    }
    assert_eq!(
        files(dir.path()),
        [
            "best.json",
            "best.safetensors",
            "step-00000004.json",
            "step-00000004.safetensors",
            "step-00000005.json",
            "step-00000005.safetensors",
        ]
    );
    assert_eq!(c.best().unwrap().unwrap().step, 2);
    let best = find(&dir.path().join("best.safetensors")).unwrap().snapshot;
    assert_eq!(
        bits(&best.tensors["model/fc.weight"]),
        bits(&snapshot(2).tensors["model/fc.weight"])
    );
    c.save(&snapshot(6), true).unwrap();
    assert_eq!(
        find(&dir.path().join("best.json"))
            .unwrap()
            .snapshot
            .meta
            .step,
        6
    );
}

#[test]
fn what_an_interrupted_save_left_is_ignored_then_removed() {
    let dir = tempfile::tempdir().unwrap();
    let c = Checkpoints::open(dir.path(), 3).unwrap();
    c.save(&snapshot(1), false).unwrap();
    fs_err::write(dir.path().join(".tmp-step-00000002.safetensors"), "half").unwrap();
    // Killed between the tensors and their manifest.
    fs_err::write(dir.path().join("step-00000003.safetensors"), "whole").unwrap();
    let found = find(dir.path()).unwrap();
    assert_eq!((found.snapshot.meta.step, found.skipped.len()), (1, 0));
    Checkpoints::open(dir.path(), 3).unwrap();
    assert!(!dir.path().join(".tmp-step-00000002.safetensors").exists());
    c.save(&snapshot(3), false).unwrap();
    assert_eq!(find(dir.path()).unwrap().snapshot.meta.step, 3);
}

const FOLDER: &str = "TSM_TEST_CHECKPOINT_FOLDER";

/// Runs in a child whose disk or file size is limited, see below.
#[test]
#[ignore = "runs as the child of the two tests below"]
fn child_saves_small_then_large() {
    let Ok(dir) = std::env::var(FOLDER) else {
        eprintln!("skipped: {FOLDER} is not set");
        return;
    };
    let dir = Path::new(&dir);
    let c = Checkpoints::open(dir, 3).unwrap();
    c.save(&snapshot(1), true).unwrap();
    let before = files(dir);
    let mut large = snapshot(2);
    let tensor = Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu));
    large.put(section::MODEL, [("large", &tensor)]);
    let e = c.save(&large, true).unwrap_err();
    assert_eq!(files(dir), before, "a failed save must leave nothing");
    assert_eq!(find(dir).unwrap().snapshot.meta.step, 1);
    assert_eq!(c.best().unwrap().unwrap().step, 1);
    println!("CODE {} ERROR {e}", code(&e));
}

fn run_child(shell: &str, dir: &Path) -> std::io::Result<std::process::Output> {
    Command::new("sh")
        .args(["-c", shell])
        .arg(std::env::current_exe()?)
        .args([
            "--exact",
            "child_saves_small_then_large",
            "--ignored",
            "--nocapture",
        ])
        .env(FOLDER, dir)
        .output()
}

fn assert_refused(output: &std::process::Output, dir: &Path) {
    let text = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{err}");
    assert!(
        text.contains("CODE 73 ERROR cannot write checkpoint"),
        "{text}\n{err}"
    );
    assert!(
        text.contains(&dir.join("step-00000002.safetensors").display().to_string()),
        "{text}"
    );
    assert!(
        text.contains("bytes needed") && text.contains("bytes free"),
        "{text}"
    );
}

#[test]
fn a_write_that_fails_half_way_leaves_the_earlier_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    // SIGXFSZ ignored, so the write fails with EFBIG as on a full disk with ENOSPC.
    let output = run_child(
        "trap '' XFSZ; ulimit -f 1000; exec \"$0\" \"$@\"",
        dir.path(),
    )
    .unwrap();
    assert_refused(&output, dir.path());
}

#[test]
fn a_full_disk_leaves_the_earlier_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let mount = format!("mount -t tmpfs -o size=1m none '{}'", dir.path().display());
    let probe = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", &mount])
        .output();
    if !probe.is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: no private mount of a small file system is allowed here");
        return;
    }
    let shell = format!(
        "exec unshare --user --map-root-user --mount sh -c '{} && exec \"$0\" \"$@\"' \"$0\" \"$@\"",
        mount.replace('\'', "'\\''")
    );
    let output = run_child(&shell, dir.path()).unwrap();
    assert_refused(&output, dir.path());
    assert!(
        files(dir.path()).is_empty(),
        "the mount must have been private"
    );
}

/// Everything a run needs to go on, as the training loop collects it.
fn collect(r: &common::Rank, step: u64) -> Snapshot {
    let mut s = Snapshot::new(meta(step));
    s.meta.loss_scale = r.precision.scale().map(|l| l.export().unwrap());
    let params = r.net.params.iter().map(|p| (p.name.as_str(), &p.tensor));
    s.put(section::MODEL, params);
    s.put(section::MOMENTUM, r.sgd.momenta());
    s.put(section::MASTER, r.sgd.masters());
    s
}

fn resumed(peers: Arc<Peers>, mode: PrecisionMode, s: &Snapshot) -> common::Rank {
    let mut r = common::Rank::new(peers, mode);
    let params = r.net.params.iter().map(|p| (p.name.as_str(), &p.tensor));
    s.restore(section::MODEL, params).unwrap();
    r.sgd
        .import(&s.section(section::MOMENTUM), &s.section(section::MASTER))
        .unwrap();
    if let (Some(scale), Some(state)) = (r.precision.scale_mut(), s.meta.loss_scale) {
        scale.import(state).unwrap();
    }
    r
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    for mode in [
        PrecisionMode::Fp32,
        PrecisionMode::Bf16,
        PrecisionMode::Fp16,
        PrecisionMode::O2,
    ] {
        let dir = tempfile::tempdir().unwrap();
        let same = common::world(2, common::TIMEOUT, |peers| {
            let rank = peers.rank();
            let clip = |step: i64| common::batch(step * 4 + i64::from(rank) * 2, 2);
            let mut whole = common::Rank::new(peers.clone(), mode);
            for step in 0..4 {
                whole.step(&[clip(step)], 0.05).unwrap();
            }
            if rank == 0 {
                let c = Checkpoints::open(dir.path(), 3).unwrap();
                c.save(&collect(&whole, 4), false).unwrap();
            }
            peers
                .barrier(common::TIMEOUT, "barrier after the checkpoint")
                .unwrap();
            let found = find(dir.path()).unwrap();
            let mut second = resumed(peers, mode, &found.snapshot);
            for step in 4..8 {
                whole.step(&[clip(step)], 0.05).unwrap();
                second.step(&[clip(step)], 0.05).unwrap();
            }
            let state = |r: &common::Rank| {
                let s = collect(r, 8);
                let tensors: Vec<_> = s
                    .tensors
                    .iter()
                    .map(|(k, t)| (k.clone(), bits(t)))
                    .collect();
                (tensors, s.meta.loss_scale)
            };
            state(&whole) == state(&second)
        });
        assert_eq!(same, [true, true], "{mode:?}");
    }
}

/// What `rank` of 3 makes of the folder `resume`, after so many restarts.
fn origin(peers: &Peers, resume: &Path, restarts: u32) -> anyhow::Result<(Option<Found>, String)> {
    origin_of(peers, (resume, None), None, restarts)
}

/// Likewise in the run folder `run`, where the run began from a checkpoint.
fn origin_of(
    peers: &Peers,
    (resume, start): (&Path, Option<&Path>),
    run: Option<&Path>,
    restarts: u32,
) -> anyhow::Result<(Option<Found>, String)> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let get = |name: &str| match name {
        "RANK" | "LOCAL_RANK" => Some(peers.rank().to_string()),
        "WORLD_SIZE" | "LOCAL_WORLD_SIZE" => Some(peers.world_size().to_string()),
        "MASTER_ADDR" => Some("127.0.0.1".into()),
        "MASTER_PORT" => Some("29500".into()),
        "TSM_RESTART_COUNT" => Some(restarts.to_string()),
        "TSM_RUN_DIR" => run.map(text),
        "TSM_RESUME_FROM" => Some(text(resume)),
        "TSM_START_FROM" => start.map(text),
        _ => None,
    };
    let env = tsm_job::WorkerEnv::from_lookup(get)?;
    let (found, notes) = origin::agree(origin::look(&env)?, peers, Device::Cpu)?;
    Ok((found, notes.join("\n")))
}

#[test]
fn ranks_without_the_newest_checkpoint_get_it_from_one_that_has_it() {
    let root = tempfile::tempdir().unwrap();
    let folder = |rank: u32| root.path().join(rank.to_string());
    let save = |rank: u32, step: u64| {
        let run = Checkpoints::open(&folder(rank).join("checkpoints"), 9).unwrap();
        run.save(&snapshot(step), false).unwrap()
    };
    // Rank 0 has an old one, rank 1 nothing; of the two of rank 2 the newer is broken.
    save(0, 9);
    let newest = save(2, 10);
    fs_err::write(save(2, 11), "not a tensor file").unwrap();
    for restarts in [0, 1] {
        let found = common::world(3, common::TIMEOUT, |peers| {
            origin(&peers, &folder(peers.rank()), restarts).unwrap()
        });
        let sent = "rank 2 sent its checkpoint of step 10 to 2 ranks that did not have it";
        for (rank, (found, notes)) in found.iter().enumerate() {
            let found = found.as_ref().unwrap();
            assert_eq!((found.snapshot.meta.step, &found.path), (10, &newest));
            assert!(notes.contains(sent), "rank {rank}: {notes}");
            assert_eq!(found.skipped.len(), usize::from(rank == 2));
            let wanted = snapshot(10);
            assert_eq!(found.snapshot.meta, wanted.meta);
            assert_eq!(found.snapshot.tensors.len(), wanted.tensors.len());
            for (name, tensor) in &wanted.tensors {
                assert_eq!(bits(&found.snapshot.tensors[name]), bits(tensor), "{name}");
            }
        }
    }

    // A shared folder: everybody reads, nobody sends.
    let shared = common::world(3, common::TIMEOUT, |peers| {
        origin(&peers, &folder(0), 0).unwrap()
    });
    for (found, notes) in shared {
        assert_eq!((found.unwrap().snapshot.meta.step, notes.as_str()), (9, ""));
    }
}

#[test]
fn where_no_rank_has_a_checkpoint_only_a_restart_begins_anew() {
    let root = tempfile::tempdir().unwrap();
    let found = common::world(2, common::TIMEOUT, |peers| {
        (0..2)
            .map(|restarts| origin(&peers, root.path(), restarts))
            .collect::<Vec<_>>()
    });
    for mut found in found {
        let (none, notes) = found.pop().unwrap().unwrap();
        assert!(none.is_none() && notes.starts_with("restart 1 from the beginning: "));
        let e = found.pop().unwrap().unwrap_err();
        assert!(e.to_string().contains("it holds no step-*.json"), "{e}");
        assert_eq!(code(&e), exit::DATA);
    }
}

/// Whether it is a restart, or somebody continues the run in its folder.
#[test]
fn a_run_without_a_checkpoint_of_its_own_goes_on_from_where_it_began() {
    let root = tempfile::tempdir().unwrap();
    let (run, old) = (root.path().join("run"), root.path().join("old"));
    fs_err::create_dir(&run).unwrap();
    let of_old = Checkpoints::open(&old, 9).unwrap();
    let start = of_old.save(&snapshot(9), false).unwrap();
    let look = |start: Option<&Path>, restarts| {
        let found = common::world(2, common::TIMEOUT, |peers| {
            origin_of(&peers, (&run, start), Some(&run), restarts)
                .map(|(found, notes)| (found.map(|f| f.snapshot.meta.step), notes))
        });
        found.into_iter().next().unwrap()
    };
    for (restarts, word) in [(0, "start"), (2, "restart 2")] {
        for (start, step, place) in [
            (None, None, "the beginning".to_string()),
            (Some(start.as_path()), Some(9), start.display().to_string()),
        ] {
            let (found, notes) = look(start, restarts).unwrap();
            assert_eq!(found, step);
            let why = format!("{word} from {place}: {} holds no", run.display());
            assert!(notes.starts_with(&why), "{notes}");
        }
        // What it began from has to be there.
        let gone = root.path().join("gone");
        assert_eq!(code(&look(Some(&gone), restarts).unwrap_err()), exit::DATA);
    }
    // Its own counts more, and one that is broken is no reason to begin anew unless it is a restart.
    let own = Checkpoints::open(&run.join("checkpoints"), 9).unwrap();
    let broken = own.save(&snapshot(4), false).unwrap();
    assert_eq!(look(Some(&start), 0).unwrap().0, Some(4));
    fs_err::write(broken, "not a tensor file").unwrap();
    assert_eq!(code(&look(Some(&start), 0).unwrap_err()), exit::DATA);
    assert_eq!(look(Some(&start), 1).unwrap().0, Some(9));
}

#[test]
fn a_packed_checkpoint_that_was_damaged_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let run = Checkpoints::open(dir.path(), 1).unwrap();
    run.save(&snapshot(3), false).unwrap();
    let bytes = find(dir.path()).unwrap().pack().unwrap();
    assert_eq!(Found::unpack(&bytes).unwrap().snapshot.meta.step, 3);
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    let e = Found::unpack(&other).unwrap_err();
    assert!(e.to_string().contains("its SHA-256 is "), "{e}");
    for length in [0, 7, 20, 100, bytes.len() - 1] {
        let e = Found::unpack(&bytes[..length]).unwrap_err();
        assert_eq!(code(&e), exit::DATA, "{length}: {e}");
    }
}
