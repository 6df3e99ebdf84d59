//! What is written down about a run.

use crate::harness::{FAKE, Scene, finish, start, until};
use rustix::process::Signal;
use serde_json::{Value, json};

#[test]
fn versions_are_those_of_the_launcher_of_the_node_and_of_what_rank_0_says() {
    let scene = Scene::new();
    let says = "--when RANK=0 --version tsm-trainer 0.9 --version libtorch 2.11.0 --end --when RANK=1 --version other 1 --end";
    let outcome = scene.launch("--cpus 2", says);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let versions = &scene.json("manifest.json")["versions"];
    assert_eq!(versions["tsm-launch"], env!("CARGO_PKG_VERSION"));
    assert_eq!(versions["tsm-trainer"], "0.9");
    assert_eq!(versions["libtorch"], "2.11.0");
    assert!(versions["other"].is_null(), "of rank 1");
    let kernel = fs_err::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(versions["kernel"], kernel.trim());
    let names: Vec<&String> = versions.as_object().unwrap().keys().collect();
    assert!(!names.iter().any(|name| *name == "slurm"), "{names:?}");
}

#[test]
fn every_start_names_the_checkpoint_that_its_ranks_went_on_from() {
    let scene = Scene::new();
    let says = "--when TSM_GENERATION=1 --resumed 40 checkpoints/step-40.safetensors --end \
                --when TSM_GENERATION=0 --step 41 --kill 9 --end --step 42";
    let outcome = scene.launch("--cpus 1 --max-restarts 1", says);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let manifest = scene.json("manifest.json");
    let told = |i: usize| {
        let generation = &manifest["generations"][i];
        (
            generation["resumed_from"].clone(),
            generation["resumed_step"].clone(),
        )
    };
    assert_eq!(told(0), (Value::Null, Value::Null));
    assert_eq!(
        told(1),
        (json!("checkpoints/step-40.safetensors"), json!(40))
    );
}

/// Though a node tells of the newest step only, a few times a second.
#[test]
fn every_start_says_which_steps_it_made() {
    let scene = Scene::new();
    let says = "--when TSM_GENERATION=0 --step 1 --step 2 --step 3 --kill 9 --end --step 3 --step 4 --step 5";
    let outcome = scene.launch("--cpus 1 --max-restarts 1", says);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let manifest = scene.json("manifest.json");
    for (i, steps) in [(0, [1, 3]), (1, [3, 5])] {
        let generation = &manifest["generations"][i];
        let found = [&generation["first_step"], &generation["last_step"]];
        assert_eq!(found, steps, "{generation:#}");
    }
}

#[test]
fn of_a_program_without_steps_no_goodput_is_known() {
    let scene = Scene::new();
    assert_eq!(scene.launch("--cpus 1", "--say nothing").code, 0);
    let manifest = scene.json("manifest.json");
    assert!(manifest["goodput"].is_null(), "{}", manifest["goodput"]);
    let scene = Scene::new();
    assert_eq!(scene.launch("--cpus 1", "--step 1 --step 2").code, 0);
    let manifest = scene.json("manifest.json");
    assert!(manifest["goodput"].is_number(), "{}", manifest["goodput"]);
}

#[test]
fn the_run_folder_says_why_a_job_did_not_come_to_its_end() {
    let reasons = |scene: &Scene| {
        let manifest = scene.json("manifest.json");
        let events = scene.read("events.jsonl");
        let leave = events
            .lines()
            .find(|line| line.contains(r#""event":"leave""#));
        let leave: Value = serde_json::from_str(leave.expect("it is written down")).unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        (
            text(&manifest["reason"]),
            text(&manifest["generations"][0]["cause"]),
            text(&leave["reason"]),
        )
    };
    // It is a coordinator like any other, and nobody joins.
    let scene = Scene::new();
    let key = scene.path("key").display().to_string();
    assert_eq!(finish(start(&mut scene.command(&["key", &key]))).code, 0);
    let port = tsm_launch::port::Port::reserve().expect("a port");
    let point = format!("127.0.0.1:{}", port.number);
    let options =
        format!("--cpus 1 --nodes 2 --join-timeout 1s --rendezvous {point} --key-file {key}");
    let outcome = scene.launch(&options, "");
    assert_eq!(outcome.code, 69, "{}", outcome.err);
    let (reason, _, left) = reasons(&scene);
    assert!(
        reason.ends_with("joined within 1s, 2 are needed"),
        "{reason}"
    );
    assert_eq!(reason, left);

    let scene = Scene::new();
    let outcome = scene.launch("--cpus 1", "--kill 9");
    let (reason, cause, _) = reasons(&scene);
    assert_eq!(outcome.code, 137);
    assert_eq!(reason, "rank 0 failed first: signal 9 (SIGKILL)");
    assert_eq!(cause, reason);

    let scene = Scene::new();
    let ready = scene.path("ready").display().to_string();
    let running = scene.start("--cpus 1", &format!("--touch {ready}{{rank}} --hang"));
    scene.wait_for_pids("ready", 1);
    running.signal(Signal::TERM);
    assert_eq!(finish(running).code, 143);
    let (reason, cause, left) = reasons(&scene);
    let by = format!("SIGTERM from process {} (", std::process::id());
    assert!(reason.starts_with(&by), "{reason}");
    assert_eq!(
        (cause.as_str(), left.as_str()),
        ("stopped: SIGTERM", "SIGTERM")
    );

    let scene = Scene::new();
    assert_eq!(scene.launch("--cpus 1", "").code, 0);
    assert!(scene.json("manifest.json")["reason"].is_null());
}

#[test]
fn the_manifest_of_a_killed_launcher_tells_what_happened_until_then_and_later_that_it_was_killed() {
    let scene = Scene::new();
    let ready = scene.path("ready").display().to_string();
    let says = format!(
        "--when TSM_GENERATION=2 --print-cores --touch {ready}{{rank}} --hang --end --on-rank 1 --exit 3"
    );
    let running = scene.start("--cpus 2 --max-restarts 5 --grace 1s", &says);
    let pids = scene.wait_for_pids("ready", 2);
    let read = || fs_err::read_to_string(scene.run_dir().join("manifest.json")).ok();
    let manifest: Value = until("the manifest to name the processes of start 3", || {
        let manifest: Value = serde_json::from_str(&read()?).expect("never half a manifest");
        (manifest["ranks"][1]["pid"] == pids[1]).then_some(manifest)
    });
    running.signal(Signal::KILL);
    assert_eq!(finish(running).code, 137);
    assert_eq!(manifest["ranks"][0]["pid"], pids[0]);
    let cores = tsm_launch::cores::allowed();
    for rank in 0..2 {
        let own = tsm_launch::cores::share(&cores, rank, 2);
        let found = &manifest["ranks"][rank]["cores"];
        match own {
            [] => assert_eq!(found, &Value::Null),
            own => assert_eq!(found, &tsm_launch::cores::to_list(own)),
        }
    }
    let generations = manifest["generations"].as_array().unwrap();
    let causes: Vec<&Value> = generations.iter().map(|g| &g["cause"]).collect();
    let failed = "rank 1 failed first: exit code 3";
    assert_eq!(causes, [&json!(failed), &json!(failed), &Value::Null]);

    scene.assert_nothing_survives();
    let words = ["--cpus", "1", "--resume", "run", "--", FAKE];
    let outcome = finish(start(&mut scene.command(&words)));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let kept = scene.json("manifest-1.json");
    assert_eq!(
        (&kept["outcome"], &kept["exit_code"]),
        (&json!("killed"), &Value::Null)
    );
    let ended = kept["ended"].as_str().expect("a time");
    assert!(ended > kept["started"].as_str().unwrap(), "{kept:#}");
    let last = &kept["generations"][2];
    assert_eq!(last["ended"], ended);
    assert_eq!(last["cause"], "tsm-launch or its machine was killed");
    assert_eq!(kept["generations"][1], generations[1]);
    assert_eq!(scene.json("manifest.json")["outcome"], "succeeded");
}
