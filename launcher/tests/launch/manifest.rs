//! What is written down about a run.

use crate::harness::Scene;
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
