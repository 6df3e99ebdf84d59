//! What a pod finds in its environment, without a cluster.

use clap::Parser;
use serde_json::Value;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use tsm_launch::cli::{Args, Nodes};
use tsm_launch::port::Port;

use crate::demo::{DEMO, write_lists};
use crate::harness::{FAKE, NODE_TIMEOUT, Running, Scene, finish, start, until};
use crate::program::write_program;

/// A key as the volume of a Secret holds it: behind two links.
fn mount_key(scene: &Scene) -> String {
    let data = scene.path("secret/..2026_01_31");
    fs_err::create_dir_all(&data).unwrap();
    let made = scene
        .command(&["key", "secret/..2026_01_31/key"])
        .status()
        .unwrap();
    assert!(made.success());
    fs_err::set_permissions(data.join("key"), PermissionsExt::from_mode(0o400)).unwrap();
    symlink("..2026_01_31", scene.path("secret/..data")).unwrap();
    symlink("..data/key", scene.path("secret/key")).unwrap();
    "secret/key".into()
}

/// Nobody else gets it while it is held; a launcher can listen there.
fn free_port() -> Port {
    Port::reserve().unwrap()
}

/// A pod of Kubeflow's trainer, with the variables that its older operator sets beside.
fn pod(scene: &Scene, rank: u32, port: u16, words: &str) -> Command {
    let mut command = scene.command(&words.split_whitespace().collect::<Vec<_>>());
    command
        .env("PET_NNODES", "2")
        .env("PET_NODE_RANK", rank.to_string())
        .env("PET_MASTER_ADDR", "localhost")
        .env("PET_MASTER_PORT", port.to_string())
        .env("PET_NPROC_PER_NODE", "2")
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", "2")
        .env("MASTER_ADDR", "somewhere-else")
        .env("CUDA_VISIBLE_DEVICES", "");
    command
}

fn log(scene: &Scene, rank: u32) -> String {
    String::from_utf8(scene.log(rank, "out")).unwrap()
}

#[test]
fn pods_of_kubeflow_are_nodes() {
    let scene = Scene::new();
    let key = mount_key(&scene);
    let held = free_port();
    let port = held.number;
    let words = format!(
        "--run-dir run --node-timeout {NODE_TIMEOUT} --key-file {key} -- {FAKE} --print-env --touch done{{rank}} --on-rank 2 \
         --wait-for done0 --wait-for done1 --wait-for done3 --exit 17"
    );
    // The one that is dialled comes last.
    let pods: Vec<Running> = [1, 0]
        .map(|rank| start(&mut pod(&scene, rank, port, &words)))
        .into();
    for pod in pods {
        let outcome = finish(pod);
        assert_eq!(outcome.code, 17, "{}", outcome.err);
    }
    for rank in 0..4 {
        let log = log(&scene, rank);
        let has = |line: String| assert!(log.lines().any(|l| l == line), "{line}\n{log}");
        has(format!("RANK={rank}"));
        has("WORLD_SIZE=4".into());
        has(format!("NODE_RANK={}", rank / 2));
        has(format!("PET_NODE_RANK={}", rank / 2));
    }
    assert_eq!(scene.json("failure.json")["rank"], 2);
}

#[test]
fn a_pod_alone_needs_no_key_and_two_do() {
    let scene = Scene::new();
    let words = format!("--run-dir run -- {FAKE} --print-env");
    let outcome = finish(start(pod(&scene, 0, 1, &words).env("PET_NNODES", "1")));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(log(&scene, 1).contains("WORLD_SIZE=2\n"));
    let outcome = finish(start(&mut pod(&scene, 0, 1, &words)));
    assert_eq!(outcome.code, 64, "{}", outcome.err);
    assert!(
        outcome.err.contains("--key-file FILE on every node"),
        "{}",
        outcome.err
    );
    let outcome = finish(start(
        pod(&scene, 0, 1, &words).env_remove("PET_MASTER_PORT"),
    ));
    assert_eq!(outcome.code, 64, "{}", outcome.err);
    assert!(
        outcome.err.contains("PET_MASTER_PORT is not set"),
        "{}",
        outcome.err
    );
}

#[test]
fn a_pod_of_an_indexed_job_has_its_place_whoever_coordinates() {
    let scene = Scene::new();
    let key = mount_key(&scene);
    let held = free_port();
    let port = held.number;
    let words = format!(
        "--run-dir run --nodes 2 --node-timeout {NODE_TIMEOUT} --rendezvous localhost:{port} --key-file {key} --cpus 1 \
         -- {FAKE} --print-env"
    );
    let pod = |index: u32| {
        let mut command = scene.command(&words.split_whitespace().collect::<Vec<_>>());
        start(command.env("JOB_COMPLETION_INDEX", index.to_string()))
    };
    let second = pod(1);
    // The folder is the coordinator's.
    until("the second to coordinate", || {
        scene.run_dir().exists().then_some(())
    });
    for pod in [pod(0), second] {
        let outcome = finish(pod);
        assert_eq!(outcome.code, 0, "{}", outcome.err);
    }
    for rank in 0..2 {
        let line = format!("JOB_COMPLETION_INDEX={rank}\n");
        assert!(log(&scene, rank).contains(&line), "{line}");
    }
}

/// All pods are started again with the command that they had. One of them may look into the folder when another has
/// written its config, with its own devices, there.
#[test]
fn pods_that_are_started_again_go_on_with_their_run() {
    let scene = Scene::new();
    let key = mount_key(&scene);
    write_lists(&scene.path(""));
    // Each waits until the other has said it: the first that fails ends both.
    let script = "#!/bin/sh\necho from ${TSM_RESUME_FROM:-nothing}; n=$(cat code); touch said-$n-$RANK\n\
                  until [ -e said-$n-0 ] && [ -e said-$n-1 ]; do sleep 0.01; done; exit $n\n";
    write_program(&scene.path("trainer"), script);
    let config = scene.run_dir().join("config.yaml");
    let went_on = format!("from nothing\nfrom {}\n", scene.run_dir().display());
    for (code, log_of_all) in [(9, "from nothing\n"), (0, went_on.as_str())] {
        fs_err::write(scene.path("code"), code.to_string()).unwrap();
        let held = free_port();
        let port = held.number;
        let words = format!(
            "--run-dir run --continue --nodes 2 --node-timeout {NODE_TIMEOUT} --rendezvous localhost:{port} \
             --key-file {key} --cpus 1 --trainer trainer {DEMO}"
        );
        let pod = || start(&mut scene.command(&words.split_whitespace().collect::<Vec<_>>()));
        let first = pod();
        until("the config", || config.exists().then_some(()));
        for pod in [pod(), first] {
            let outcome = finish(pod);
            assert_eq!(outcome.code, code, "{}", outcome.err);
        }
        assert_eq!(log(&scene, 1), log_of_all);
    }
}

#[test]
fn a_name_that_comes_late_is_waited_for() {
    let in_namespace = || {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private"]);
        command
    };
    let can = in_namespace()
        .arg("true")
        .status()
        .is_ok_and(|s| s.success());
    if !can {
        eprintln!("skipped: no mount namespace of its own without root");
        return;
    }
    let scene = Scene::new();
    let (key, held) = (mount_key(&scene), free_port());
    let port = held.number;
    fs_err::copy("/etc/hosts", scene.path("hosts")).unwrap();
    let script = format!(
        "mount --bind hosts /etc/hosts && exec \"$0\" --run-dir run --nodes 1 \
         --rendezvous late-0.late.invalid:{port} --key-file {key} --cpus 1 -- {FAKE} --touch done 2>err"
    );
    let mut command = scene.command_of("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    command.arg(env!("CARGO_BIN_EXE_tsm-launch"));
    let pod = start(command.env("KUBERNETES_SERVICE_HOST", "10.0.0.1"));
    until("a first look at the name", || {
        let said = fs_err::read_to_string(scene.path("err")).ok()?;
        said.contains("for late-0.late.invalid to have an address")
            .then_some(())
    });
    let hosts = fs_err::read_to_string(scene.path("hosts")).unwrap();
    fs_err::write(
        scene.path("hosts"),
        format!("{hosts}\n127.0.0.1 late-0.late.invalid\n"),
    )
    .unwrap();
    let outcome = finish(pod);
    let said = fs_err::read_to_string(scene.path("err")).unwrap();
    assert_eq!(outcome.code, 0, "{said}");
    assert!(scene.path("done").exists(), "{said}");
}

#[test]
fn words_that_nobody_reads_are_no_failure() {
    let scene = Scene::new();
    let key = mount_key(&scene);
    let words = format!(
        "--nodes 1 --rendezvous late-0.late.invalid:1 --key-file {key} --join-timeout 2s --cpus 1 -- {FAKE}"
    );
    let mut command = scene.command(&words.split_whitespace().collect::<Vec<_>>());
    let (reader, stderr) = std::io::pipe().unwrap();
    drop(reader);
    let command = command.env("KUBERNETES_SERVICE_HOST", "10.0.0.1");
    let status = command.stderr(stderr).status().unwrap();
    assert_eq!(status.code(), Some(69));
}

#[test]
fn the_example_says_what_this_program_understands() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/kubernetes/job.yaml");
    let text = fs_err::read_to_string(path).unwrap();
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    let [service, job] = documents.as_slice() else {
        panic!("{} documents", documents.len())
    };
    let spec = &job["spec"];
    let pod = &spec["template"]["spec"];
    let container = &pod["containers"][0];
    assert_eq!(
        (&service["kind"], &job["kind"]),
        (&"Service".into(), &"Job".into())
    );
    // What it takes for pods to have names: see the documentation of indexed Jobs.
    assert_eq!(spec["completionMode"], "Indexed");
    assert_eq!(service["spec"]["clusterIP"], "None");
    assert_eq!(service["spec"]["publishNotReadyAddresses"], true);
    assert_eq!(pod["subdomain"], service["metadata"]["name"]);
    let selector = &service["spec"]["selector"]["batch.kubernetes.io/job-name"];
    assert_eq!(*selector, job["metadata"]["name"]);
    // YAML 1.1, which Kubernetes reads, takes it for an octal number.
    assert!(text.contains("defaultMode: 0400\n"));

    let words = ["command", "args"].map(|key| container[key].as_array().unwrap());
    let words: Vec<&str> = words
        .into_iter()
        .flatten()
        .map(|w| w.as_str().unwrap())
        .collect();
    let args = Args::try_parse_from(&words).unwrap_or_else(|e| panic!("{e}"));
    let num = spec["completions"].as_u64().unwrap() as u32;
    assert_eq!(args.nodes, Some(Nodes { min: num, max: num }));
    assert_eq!(spec["parallelism"], spec["completions"]);
    let (job, service) = (&job["metadata"]["name"], &service["metadata"]["name"]);
    let port = &container["ports"][0]["containerPort"];
    let point = format!(
        "{}-0.{}:{port}",
        job.as_str().unwrap(),
        service.as_str().unwrap()
    );
    assert_eq!(args.rendezvous, Some(point));
    let mount = container["volumeMounts"][0]["mountPath"].as_str().unwrap();
    assert_eq!(args.key_file.unwrap(), Path::new(mount).join("key"));
    let gpus = container["resources"]["limits"]["nvidia.com/gpu"].to_string();
    assert_eq!(args.gpus.unwrap().to_string(), gpus);
    let config = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(args.config.unwrap());
    tsm_job::Config::load(&config, &args.overrides).unwrap();

    // The same words with what is here in place of GPUs and data.
    let scene = Scene::new();
    let kept = words[1..]
        .iter()
        .filter(|word| word.starts_with("--") && !word.starts_with("--gpus"));
    let mut kept: Vec<&str> = kept.copied().collect();
    kept.extend(["--cpus=1", "--dry-run", "--", FAKE]);
    let outcome = finish(start(&mut scene.command(&kept)));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(outcome.out.contains("world size  2\n"), "{}", outcome.out);
}
