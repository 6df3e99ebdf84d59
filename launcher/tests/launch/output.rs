//! Logs: nothing lost, nothing torn.

use crate::harness::{FAKE, Killed, Running, Scene, finish, start, until};
use crate::refusals::Mount;
use fs_err::File;
use fs_err::os::unix::fs::OpenOptionsExt;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

const LINES: usize = 50_000;

#[test]
fn no_line_of_four_busy_ranks_is_lost_or_torn() {
    let scene = Scene::new();
    let outcome = scene.launch("--cpus 4 --preflight off", &format!("--spam {LINES}"));
    assert_eq!(outcome.code, 0);
    for (kind, letter, width, console) in [
        ("out", "o", 90, &outcome.out),
        ("err", "e", 70, &outcome.err),
    ] {
        let mut next = [0usize; 4];
        for line in console
            .lines()
            .filter(|line| !line.starts_with("tsm-launch: "))
        {
            let (rank, text) = line
                .split_once(" | ")
                .unwrap_or_else(|| panic!("torn: {line:?}"));
            let rank: usize = rank.parse().unwrap_or_else(|_| panic!("torn: {line:?}"));
            let i = next[rank];
            assert_eq!(
                text,
                format!("{kind} {rank} {i} {}", letter.repeat(i % width))
            );
            next[rank] += 1;
        }
        assert_eq!(next, [LINES; 4]);
        for rank in 0..4 {
            let log = String::from_utf8(scene.log(rank, kind)).unwrap();
            let expected =
                (0..LINES).map(|i| format!("{kind} {rank} {i} {}\n", letter.repeat(i % width)));
            assert!(
                log.chars().eq(expected.collect::<String>().chars()),
                "{kind} of rank {rank} differs"
            );
        }
    }
}

#[test]
fn the_last_words_before_a_crash_are_kept() {
    for _ in 0..10 {
        let scene = Scene::new();
        let outcome = scene.launch(
            "--cpus 2",
            "--on-rank 1 --spam 500 --say last-words --kill 9",
        );
        assert_eq!(outcome.code, 137);
        assert!(scene.log(1, "err").ends_with(b"last-words\n"));
        assert!(
            outcome.err.contains("    | last-words\n"),
            "{}",
            outcome.err
        );
    }
}

#[test]
fn chosen_ranks_are_shown_and_all_are_kept() {
    for (show, shown) in [
        ("none", vec![]),
        ("0,2", vec![0, 2]),
        ("all", vec![0, 1, 2]),
    ] {
        let scene = Scene::new();
        let outcome = scene.launch(&format!("--cpus 3 --show-ranks {show}"), "--say hello");
        assert_eq!(ranks_that_said("hello", &outcome.err), shown, "{show}");
        for rank in 0..3 {
            assert_eq!(scene.log(rank, "err"), b"hello\n");
        }
    }
}

#[test]
fn bytes_that_are_no_text_pass_through() {
    let scene = Scene::new();
    let outcome = scene.launch("--cpus 1", "--raw ff00fe0a0d31300d32300a --exit 2");
    assert_eq!(outcome.code, 2);
    assert_eq!(scene.log(0, "err"), b"\xff\x00\xfe\n\r10\r20\n");
    assert!(
        outcome.err.contains("0 | 20\n"),
        "of a progress bar the last state is shown: {}",
        outcome.err
    );
    let failure = scene.json("failure.json");
    assert_eq!(failure["stderr"][1], "20");
}

#[test]
fn a_reader_that_goes_away_stops_nothing() {
    let scene = Scene::new();
    let launch = env!("CARGO_BIN_EXE_tsm-launch");
    let fake = crate::harness::FAKE;
    let script = format!(
        "{{ {launch} --cpus 2 --run-dir run -- {fake} --spam 20000; echo code $? >&2; }} | head -n 1"
    );
    let err = finish(start(scene.command_of("sh").args(["-c", &script]))).err;
    assert!(
        err.contains("code 0\n"),
        "{}",
        &err[err.len().saturating_sub(500)..]
    );
    let log = String::from_utf8(scene.log(1, "out")).unwrap();
    assert_eq!(log.lines().count(), 20_000);
}

#[test]
fn a_reader_that_has_seen_enough_of_a_plan_is_no_error_and_a_full_disk_is() {
    let scene = Scene::new();
    let launcher = env!("CARGO_BIN_EXE_tsm-launch");
    for words in ["--dry-run --cpus 4096 -- true", "doctor --json"] {
        // The reader is gone before anything is printed.
        let script = r#"{ while [ ! -e closed ]; do sleep 0.01; done; "$0" "$@"; echo code $? >&2; } | { exec <&-; touch closed; }"#;
        let shell = |script: &str| {
            let _ = fs_err::remove_file(scene.path("closed"));
            let mut shell = scene.command_of("sh");
            shell.args(["-c", script, launcher]);
            finish(start(shell.args(words.split(' '))))
        };
        let outcome = shell(script);
        assert_eq!(outcome.err, "code 0\n", "{words}");
        let outcome = shell(r#"exec "$0" "$@" > /dev/full"#);
        assert_eq!(outcome.code, 73, "{words}: {}", outcome.err);
        let said = "error: cannot write to stdout: No space left on device";
        assert!(outcome.err.starts_with(said), "{words}: {}", outcome.err);
    }
}

/// As the fifo of a script whose other half has died.
#[test]
fn whoever_waits_for_a_config_that_nobody_writes_hears_of_it() {
    let scene = Scene::new();
    let fifo = scene.path("job.yaml");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    let running = start_writing(&scene, &["--cpus=1", "job.yaml"]);
    let said = "tsm-launch: still waiting for job.yaml: it is a fifo ";
    until("the fifo to be named", || {
        read_err(&scene).contains(said).then_some(())
    });
    // It still reads what comes.
    fs_err::write(&fifo, "no_such_section: 1\n").unwrap();
    let outcome = finish(running);
    let err = read_err(&scene);
    assert_eq!(outcome.code, 78, "{err}");
    assert!(err.contains("no_such_section"), "{err}");
    assert_eq!(err.matches("still waiting").count(), 1, "{err}");
}

/// The ranks in the labels of `line`, sorted: on a busy machine not all need to be folded into one.
fn ranks_that_said(line: &str, console: &str) -> Vec<u32> {
    let ends = format!(" | {line}");
    let mut ranks: Vec<u32> = console
        .lines()
        .filter_map(|shown| shown.strip_suffix(&ends))
        .flat_map(|label| {
            let list = label.trim().trim_start_matches('[').trim_end_matches(']');
            let ranks = tsm_launch::cores::from_list(list).expect("a list of ranks");
            (0..64).filter(move |&rank| ranks.is_set(rank as usize))
        })
        .collect();
    ranks.sort_unstable();
    ranks
}

#[test]
fn what_all_ranks_say_at_once_is_shown_once() {
    let scene = Scene::new();
    let actions = "--touch ready{rank} --wait-for go --say hello --wait-for end";
    let running = scene.start("--cpus 8", actions);
    scene.wait_for_pids("ready", 8);
    fs_err::write(scene.path("go"), "").unwrap();
    let said = |rank| (scene.log(rank, "err") == b"hello\n").then_some(());
    for rank in 0..8 {
        until("hello", || said(rank));
    }
    fs_err::write(scene.path("end"), "").unwrap();
    let outcome = finish(running);
    assert_eq!(
        ranks_that_said("hello", &outcome.err),
        (0..8).collect::<Vec<_>>()
    );
    let shown = outcome.err.matches(" | hello\n").count();
    assert!(shown < 8, "nothing was folded: {}", outcome.err);
}

/// A terminal takes a few KiB and then nothing, as after Ctrl-S.
#[test]
fn a_stopped_terminal_holds_up_no_worker() {
    let scene = Scene::new();
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let terminal = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(name.to_str().unwrap())
        .unwrap();
    let spam = LINES.to_string();
    let actions = [
        "--cpus",
        "4",
        "--run-dir",
        "run",
        "--",
        FAKE,
        "--spam",
        &spam,
    ];
    let mut command = scene.command(&actions);
    command
        .args(["--touch", "done{rank}"])
        .stdout(terminal.try_clone().unwrap().into_file())
        .stderr(terminal.into_file());
    let mut launcher = Killed(command.spawn().unwrap());
    // Its descriptors of the terminal would keep it open for ever.
    drop(command);
    scene.wait_for_pids("done", 4);
    let reader = std::thread::spawn(move || {
        // The end of a terminal is an error.
        let (mut text, mut chunk) = (Vec::new(), [0; 4096]);
        while let Ok(n @ 1..) = rustix::io::read(&master, &mut chunk) {
            text.extend_from_slice(&chunk[..n]);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    assert_eq!(launcher.0.wait().unwrap().code(), Some(0));
    let text = reader.join().unwrap();
    let missed: usize = text
        .lines()
        .filter(|line| line.contains(" not shown: see ") && line.contains("/run/logs/"))
        .map(|line| line.split(' ').nth(1).unwrap().parse::<usize>().unwrap())
        .sum();
    let shown = text.lines().filter(|line| line.contains(" | ")).count();
    assert!(missed > 0, "{}", &text[text.len().saturating_sub(2000)..]);
    assert_eq!(missed + shown, 2 * 4 * LINES);
    for rank in 0..4 {
        for kind in ["out", "err"] {
            let lines = scene
                .log(rank, kind)
                .iter()
                .filter(|&&b| b == b'\n')
                .count();
            assert_eq!(lines, LINES);
        }
    }
}

/// Also where nothing of the run folder can be written any more.
#[test]
fn a_disk_that_fills_up_while_the_job_runs_is_said_once_when_it_is_noticed() {
    let scene = Scene::new();
    let full = scene.path("full");
    fs_err::create_dir(&full).unwrap();
    let Some(_mount) = Mount::tmpfs(&full) else {
        return;
    };
    let options = [
        "--cpus=2",
        "--preflight=off",
        "--run-dir=full/run",
        "--",
        FAKE,
    ];
    let go = scene.path("go").display().to_string();
    let actions = ["--spam", "2000", "--wait-for", &go, "--exit", "3"];
    let running = start_writing(&scene, &[&options[..], &actions].concat());
    let lost = "warning: output of the ranks on ";
    until("the full disk to be said", || {
        read_err(&scene).contains(lost).then_some(())
    });
    fs_err::write(&go, "").unwrap();
    let code = finish(running).code;
    let err = read_err(&scene);
    assert_eq!(code, 3, "{err}");
    assert_eq!(err.matches(lost).count(), 1, "{err}");
    let said = err.lines().skip_while(|line| !line.contains(lost)).take(2);
    let said = said.collect::<Vec<_>>().join("\n");
    let file = full.join("run/logs").display().to_string();
    assert!(
        said.contains(&file) && said.contains("No space left"),
        "{said}"
    );
    assert!(said.contains("hint: free some space"), "{said}");
    let of_folder = "events.jsonl, failure.json or manifest.json is not complete";
    assert_eq!(err.matches(of_folder).count(), 1, "{err}");
    assert!(!err.contains("the whole output"), "{err}");
    let hint = format!("  hint: not all output of the ranks is in {file}: ");
    assert!(err.contains(&hint), "{err}");
}

/// `ulimit -f`, as a batch system may set it: it ends who writes a larger file, and the launcher writes for others.
#[test]
fn a_limit_of_file_size_ends_the_ranks_that_pass_it_and_not_the_launcher() {
    let scene = Scene::new();
    let launcher = env!("CARGO_BIN_EXE_tsm-launch");
    // 64 KiB. The second rank writes a file of its own.
    let script = r#"ulimit -f 128; launcher=$0; exec "$launcher" --cpus 2 --preflight off --grace 60s --run-dir run -- \
        sh -c 'echo up$RANK; [ $RANK = 0 ] && "$0" --spam 3000 && touch printed && exec "$0" --hang
               while [ ! -e printed ]; do sleep 0.01; done; exec cat /dev/zero > large' "$@" "#;
    let outcome = finish(start(
        scene.command_of("sh").args(["-c", script, launcher, FAKE]),
    ));
    let err = &outcome.err;
    assert_eq!(outcome.code, 128 + libc::SIGXFSZ, "{err}");
    assert!(
        err.contains("rank 1 failed first: signal 25 (SIGXFSZ)"),
        "{err}"
    );
    assert_eq!(
        err.matches("warning: output of the ranks on ").count(),
        1,
        "{err}"
    );
    assert!(
        err.contains("File too large") && err.contains("hint: raise the limit of file size"),
        "{err}"
    );
    assert_eq!(scene.json("manifest.json")["outcome"], "failed");
    let kept = scene.log(0, "out").len();
    assert_eq!(kept, 128 * 512);
}

#[test]
fn lines_of_the_diary_that_a_full_disk_took_are_counted_when_there_is_room_again() {
    let scene = Scene::new();
    let full = scene.path("full");
    fs_err::create_dir(&full).unwrap();
    let Some(_mount) = Mount::tmpfs(&full) else {
        return;
    };
    // The ends of so many ranks take more room than the file's last block has.
    let script = r#"
        [ $RANK = 0 ] || [ $TSM_RESTART_COUNT = 1 ] || exec sleep 1000
        [ $RANK = 0 ] || exit 0
        case $TSM_RESTART_COUNT in
        0) cat /dev/zero > full/filler; exit 3 ;;
        1) rm full/filler ;;
        esac"#;
    let options = "--cpus 24 --max-restarts 1 --preflight off --grace 5s --run-dir full/run";
    let mut words: Vec<&str> = options.split(' ').collect();
    words.extend(["--", "sh", "-c", script]);
    let outcome = finish(start(&mut scene.command(&words)));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let warning = "events.jsonl, failure.json or manifest.json is not complete";
    assert_eq!(outcome.err.matches(warning).count(), 1, "{}", outcome.err);
    let text = fs_err::read_to_string(full.join("run/events.jsonl")).unwrap();
    let lines = text.lines().map(serde_json::from_str::<serde_json::Value>);
    let (whole, torn): (Vec<_>, Vec<_>) = lines.partition(Result::is_ok);
    let whole: Vec<_> = whole.into_iter().flatten().collect();
    let lost: u64 = whole.iter().filter_map(|line| line["lines"].as_u64()).sum();
    let number = |kind| whole.iter().filter(|line| line["event"] == kind).count() as u64;
    assert!(lost > 0 && torn.len() as u64 <= lost, "{text}");
    assert!(number("lost") > 0, "{text}");
    let told = number("spawn") + number("exit") + number("start") + number("generation_end");
    assert!(
        told < 2 * 24 * 2 + 4 && told + lost >= 2 * 24 * 2 + 4,
        "{text}"
    );
    assert_eq!(whole.last().unwrap()["event"], "end", "{text}");
    let manifest = fs_err::read_to_string(full.join("run/manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["generations"].as_array().unwrap().len(), 2);
}

#[test]
fn a_run_folder_that_is_removed_is_said_while_the_job_runs() {
    let scene = Scene::new();
    let go = scene.path("go").display().to_string();
    let ready = scene.path("ready{rank}").display().to_string();
    let words = ["--cpus=2", "--run-dir=run", "--", FAKE, "--touch", &ready];
    let actions = ["--wait-for", &go, "--exit", "3"];
    let running = start_writing(&scene, &[&words[..], &actions].concat());
    scene.wait_for_pids("ready", 2);
    fs_err::remove_dir_all(scene.run_dir()).unwrap();
    let removed = "warning: the run folder was removed while the job runs";
    until("the removed folder to be said", || {
        read_err(&scene).contains(removed).then_some(())
    });
    fs_err::write(&go, "").unwrap();
    let code = finish(running).code;
    let err = read_err(&scene);
    assert_eq!(code, 3, "{err}");
    assert_eq!(err.matches(removed).count(), 1, "{err}");
    assert!(
        err.contains(&format!(
            "goes nowhere: {}\n  hint: ",
            scene.run_dir().display()
        )),
        "{err}"
    );
    assert!(
        err.contains("logs: ") && !err.contains("the whole output"),
        "{err}"
    );
}

/// `tsm-launch` with its output in files: nobody reads a pipe while it runs. See [`read_err`].
pub fn start_writing(scene: &Scene, words: &[&str]) -> Running {
    let mut shell = scene.command_of("sh");
    let launcher = env!("CARGO_BIN_EXE_tsm-launch");
    shell.args(["-c", r#"exec "$0" "$@" > out 2> err"#, launcher]);
    start(shell.args(words))
}

pub fn read_err(scene: &Scene) -> String {
    fs_err::read_to_string(scene.path("err")).unwrap_or_default()
}
