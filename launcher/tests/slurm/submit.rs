//! Scripts: those that are rendered and those in `slurm/`; and a job that is queued again.

use clap::Parser;
use std::path::Path;
use tsm_job::Config;
use tsm_job::exit;
use tsm_launch::start::slurm::{Options, Submit, render};

use crate::cluster;
use crate::cluster::Cluster;
use crate::program::write_program;

fn options(cluster: &Cluster, program: &Path, directory: &Path, words: &[&str]) -> Options {
    let config = cluster
        .repository("configs/ucf101.yaml")
        .to_string_lossy()
        .into_owned();
    let words = ["tsm-launch slurm"]
        .iter()
        .chain(words)
        .copied()
        .chain([config.as_str()]);
    let submit = Submit::try_parse_from(words).unwrap_or_else(|e| panic!("{e}"));
    let config = Config::load(&submit.config, &submit.overrides).unwrap();
    submit.options(&config, program, directory).unwrap()
}

/// What sbatch thinks of a script.
fn test_only(cluster: &Cluster, script: &str, more: &[&str]) -> Result<(), String> {
    let file = tempfile::NamedTempFile::new_in(cluster.path()).unwrap();
    fs_err::write(file.path(), script).unwrap();
    let output = cluster
        .command("sbatch")
        .arg("--test-only")
        .args(more)
        .arg(file.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        Ok(())
    } else {
        Err(said)
    }
}

#[test]
fn rendered_scripts_are_accepted() {
    let Some(cluster) = cluster() else { return };
    let plain = [
        "--nodes", "4", "--gpus", "8", "--time", "1-00:00", "--mem", "0",
    ];
    let all = [
        "--gpus",
        "2",
        "--cpus-per-gpu",
        "2",
        "--partition",
        "high",
        "--job-name",
        "a \"b\" c\\d",
        "--signal-lead",
        "10m",
        "--no-requeue",
        "--no-kill",
        "--extra=--exclusive",
        "--setup",
        "true",
    ];
    for words in [plain.as_slice(), all.as_slice(), &["--cpus", "4"]] {
        let options = options(
            &cluster,
            Path::new("/opt/tsm-launch"),
            cluster.path(),
            words,
        );
        assert_eq!(
            test_only(&cluster, &render(&options), &[]),
            Ok(()),
            "{words:?}"
        );
    }
    let five = options(
        &cluster,
        Path::new("/opt/tsm-launch"),
        cluster.path(),
        &["--nodes", "5", "--gpus", "1"],
    );
    assert!(
        test_only(&cluster, &render(&five), &[]).is_err(),
        "sbatch looks at what it is given"
    );
}

#[test]
fn a_submitted_job_runs_the_command_in_place_with_its_words_whole() {
    let Some(cluster) = cluster() else { return };
    // A folder that needs every kind of quoting.
    let directory = cluster.path().join("50% o'f \"it\"");
    fs_err::create_dir_all(directory.join("runs")).unwrap();
    let program = directory.join("tsm launch");
    write_program(
        &program,
        "#!/bin/bash\npwd; printf '<%s>' \"$0\" \"$@\"; echo; ps -o ppid= -p $$ | xargs ps -o comm= -p\n",
    );
    let options = options(
        &cluster,
        &program,
        &directory,
        &["--gpus", "1", "--with=--label=a b", "--setup", "echo ready"],
    );
    let submitted = cluster
        .slurm()
        .submit(&options, &directory.join("runs"), "ucf101")
        .unwrap();
    let job = tsm_launch::start::slurm::JobId {
        id: submitted.job.parse().unwrap(),
        array: None,
    };
    assert_eq!(
        submitted.run_dir,
        directory.join("runs").join(format!("ucf101-slurm-{job}"))
    );
    assert_eq!(cluster.wait(job).exit, (0, 0));
    let said = fs_err::read_to_string(&submitted.output).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    let config = cluster.repository("configs/ucf101.yaml");
    let words = format!(
        "<{}><--nodes><1><--gpus><1><--label=a b><{}>",
        program.display(),
        config.display()
    );
    // Its parent is SLURM's own process: no shell is in between that would swallow signals.
    assert_eq!(
        lines,
        ["ready", &directory.to_string_lossy(), &words, "slurmstepd"]
    );
}

#[test]
fn sbatch_refuses_in_its_own_words() {
    let Some(cluster) = cluster() else { return };
    let options = options(
        &cluster,
        Path::new("/bin/true"),
        cluster.path(),
        &["--gpus", "1", "--partition", "nowhere"],
    );
    let error = cluster
        .slurm()
        .submit(&options, cluster.path(), "x")
        .unwrap_err();
    assert_eq!(error.code, exit::PREFLIGHT);
    assert!(
        error.message.contains("nvalid partition name specified"),
        "{error}"
    );
}

#[test]
fn a_job_is_queued_again_and_goes_on_in_the_same_file() {
    let Some(cluster) = cluster() else { return };
    let script = "#!/bin/bash\n#SBATCH --requeue --open-mode=append\necho start ${SLURM_RESTART_COUNT:-0}\n[ -n \"$SLURM_RESTART_COUNT\" ] || sleep 300\n";
    let job = cluster.sbatch(&[], script);
    cluster.until("the first start", || {
        cluster.job_output(job).contains("start 0").then_some(())
    });
    assert!(cluster.job(job).requeue);
    cluster.slurm().requeue(job).unwrap();
    cluster.until("the queue", || {
        (cluster.job(job).state == "PENDING").then_some(())
    });
    // Not hurried on with `scontrol update StartTime=now`: a job that starts in the second in which its
    // last start was ended, fails with "job credential revoked".
    let done = cluster.wait(job);
    assert_eq!(
        (done.state.as_str(), done.exit, done.restarts),
        ("COMPLETED", (0, 0), 1)
    );
    let said = cluster.job_output(job);
    assert!(
        said.starts_with("start 0\n") && said.ends_with("start 1\n"),
        "{said}"
    );
    let unknown = tsm_launch::start::slurm::JobId {
        id: 999_999,
        array: None,
    };
    let error = cluster.slurm().requeue(unknown).unwrap_err();
    assert!(
        error.code == exit::PREFLIGHT && error.message.contains("nvalid job id"),
        "{error}"
    );
}

#[test]
fn the_scripts_of_the_repository_are_accepted() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../slurm");
    let is_script = |path: &std::path::PathBuf| path.extension().is_some_and(|e| e == "sbatch");
    let scripts: Vec<_> = fs_err::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(is_script)
        .collect();
    assert!(scripts.len() >= 3, "{scripts:?}");
    for script in &scripts {
        let status = std::process::Command::new("bash")
            .arg("-n")
            .arg(script)
            .status()
            .unwrap();
        assert!(status.success(), "{}", script.display());
    }
    let Some(cluster) = cluster() else { return };
    for script in &scripts {
        let text = fs_err::read_to_string(script).unwrap();
        // The nodes here have four cores.
        let accepted = test_only(&cluster, &text, &["--cpus-per-task=4"]);
        assert_eq!(accepted, Ok(()), "{}", script.display());
    }
}

#[test]
fn the_sweep_makes_a_table_of_what_rank_0_measured() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("tsm-launch");
    // On 1, 2 and 4 nodes a step takes 100, 125 and 200 ms; the first step is slow.
    let fake = r#"#!/bin/bash
echo "$@" >> calls
mkdir -p "$6/logs"
case $2 in 1) ms=100 ;; 2) ms=125 ;; 4) ms=200 ;; esac
echo "{\"step_ms\":[900.5,$ms.0,$ms.0],\"peak_bytes\":1,\"gpu\":null}" > "$6/logs/n1-0.out"
echo no > "$6/logs/n1-10.out"
"#;
    write_program(&program, fake);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../slurm/bench-sweep.sbatch");
    let output = std::process::Command::new("bash")
        .arg(script)
        .args(["--clips", "4", "--device", "gpu"])
        .current_dir(dir.path())
        .env("TSM_BIN", dir.path())
        .env("SLURM_JOB_ID", "7")
        .env("SLURM_JOB_NUM_NODES", "5")
        .env("SLURM_GPUS_ON_NODE", "8")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let table = fs_err::read_to_string(dir.path().join("runs/bench-slurm-7/sweep.md")).unwrap();
    assert_eq!(
        table,
        "| nodes | GPUs | step, median | clips/s | of linear |\n|---|---|---|---|---|\n\
         | 1 | 8 | 100.0 ms | 320 | 100.0 % |\n\
         | 2 | 16 | 125.0 ms | 512 | 80.0 % |\n\
         | 4 | 32 | 200.0 ms | 640 | 50.0 % |\n"
    );
    let calls = fs_err::read_to_string(dir.path().join("calls")).unwrap();
    assert!(
        calls
            .lines()
            .nth(1)
            .unwrap()
            .ends_with("tsm-bench __step --clips 4 --device gpu"),
        "{calls}"
    );
}

#[test]
fn a_cluster_leaves_no_process_behind() {
    let Some(_here) = cluster() else { return };
    let other = Cluster::start().expect("a second cluster beside the first");
    let marker = other.path().to_string_lossy().into_owned();
    let job = other.sbatch(
        &["--nodes=2"],
        "#!/bin/bash\ntrap '' TERM\nsrun sleep 1000 & setsid sleep 1000\n",
    );
    other.until("the job", || {
        (other.job(job).state == "RUNNING").then_some(())
    });
    drop(other);
    let belongs = |entry: fs_err::DirEntry| {
        let read = |name: &str| fs_err::read(entry.path().join(name)).unwrap_or_default();
        let text = [read("cmdline"), read("environ")].concat();
        // A zombie has neither.
        String::from_utf8_lossy(&text)
            .contains(&marker)
            .then(|| String::from_utf8_lossy(&read("cmdline")).replace('\0', " "))
    };
    let left: Vec<String> = fs_err::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(belongs)
        .collect();
    assert_eq!(left, Vec::<String>::new());
}
