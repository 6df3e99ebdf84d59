//! `srun tsm-launch`: tasks that find each other by the step that they are in.

use crate::cluster;

const LAUNCH: &str = env!("CARGO_BIN_EXE_tsm-launch");
const FAKE: &str = env!("CARGO_BIN_EXE_fake-worker");

#[test]
fn one_task_on_each_node_is_a_job() {
    let Some(cluster) = cluster() else { return };
    let dir = tempfile::tempdir_in(cluster.path()).unwrap();
    let step = |more: &[&str], actions: &str| {
        let mut command = cluster.command("srun");
        command.current_dir(dir.path()).args(more);
        command.args([LAUNCH, "--cpus", "2", "--", FAKE]);
        command.args(actions.split_whitespace()).output().unwrap()
    };
    let output = step(
        &["-N3", "--ntasks-per-node=1"],
        "--print-env --on-rank 5 --exit 17",
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(17), "{said}");
    assert!(
        said.contains("6 workers on 3 nodes") && said.contains("rank 5"),
        "{said}"
    );
    let left: Vec<_> = fs_err::read_dir(dir.path().join("runs"))
        .unwrap()
        .flatten()
        .collect();
    assert_eq!(left.len(), 1, "the run folder alone: {left:?}");

    let output = step(&["-N2", "--ntasks-per-node=2"], "");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(64), "{said}");
    assert!(said.contains("srun --ntasks-per-node=1"), "{said}");
}
