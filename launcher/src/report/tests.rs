use super::*;
use crate::blame::tests::fault;
use std::sync::LazyLock;

fn place(rank: usize, stderr: &[&str]) -> Place {
    Place {
        host: "gpu-01".into(),
        device: "cpu".into(),
        pid: 100 + rank as i32,
        stderr_file: format!("logs/gpu-01-{rank}.err").into(),
        error_file: "/nonexistent".into(),
        exception: None,
        stderr: stderr.iter().map(|s| s.to_string()).collect(),
        oom_kill: None,
        stuck_in: None,
    }
}

fn run<'a>() -> Run<'a> {
    static RESUME: LazyLock<GoOn> =
        LazyLock::new(|| GoOn::Command("tsm-launch --cpus 6 --resume runs/r".into()));
    Run {
        id: "r",
        dir: Path::new("runs/r"),
        exit_code: 17,
        tells: true,
        oom_kills: OomKills::default(),
        xids: &[],
        homes: &[],
        stacks: None,
        earlier: &[],
        missing: None,
        resume: Some(&RESUME),
    }
}

fn report(ends: &[End], oom_kills: OomKills) -> String {
    let sent = vec![libc::SIGTERM];
    let rank = |(i, end): (usize, &End)| Rank {
        end: Some(*end),
        order: i,
        after_stop: i > 0,
        sent: if i > 0 { sent.clone() } else { Vec::new() },
        ended_at: Duration::from_micros(2_100_000 + 900 * i as u64),
        first_at: Duration::from_micros(2_100_000 + 900 * i as u64),
        step: Some(7),
        ..Rank::default()
    };
    let ranks: Vec<Rank> = ends.iter().enumerate().map(rank).collect();
    let places: Vec<Place> = (0..ends.len())
        .map(|i| place(i, if i == 0 { &["boom"] } else { &[] }))
        .collect();
    let fault = fault(&ranks, |i| own_words(&places[i])).unwrap();
    let run = Run { oom_kills, ..run() };
    failure(&run, &fault, &ranks, &places).to_string()
}

#[test]
fn the_report_says_who_what_where_and_what_next() {
    let (term, zero) = (End::Signal(libc::SIGTERM), End::Code(0));
    let text = report(
        &[End::Code(17), term, term, zero, term, End::Code(76)],
        OomKills::default(),
    );
    let expected = "error: rank 0 failed first: exit code 17
  class: program error
  where: host gpu-01, cpu, pid 100
  when: 2.1 s after the start, last finished step 7
  stderr (logs/gpu-01-0.err):
    | boom
  named first because its end came first in the kernel's order; the others:
    ranks 1-2,4: stopped by the launcher: signal 15 (SIGTERM), 0.9 to 3.6 ms after
    rank 3: stopped by the launcher: exit code 0, 2.7 ms after
    rank 5: lost another rank: exit code 76, 4.5 ms after
  hint: once the cause is gone, continue with: tsm-launch --cpus 6 --resume runs/r";
    assert_eq!(text, expected);
}

/// After it had told of its failure.
#[test]
fn of_a_rank_that_the_launcher_ended_the_headline_says_what_it_had_told() {
    let term = Some(End::Signal(libc::SIGTERM));
    let stopped = |message: &str| Rank {
        record: crate::blame::tests::said("panic", message),
        after_stop: false,
        ..ended(term, 5)
    };
    let headline = |rank: Rank, stderr: &[&str]| {
        let (ranks, places) = ([rank], [place(0, stderr)]);
        let fault = Fault {
            culprit: Culprit::Rank(0),
            reason: "it announced its failure".into(),
        };
        let failure = failure(&run(), &fault, &ranks, &places);
        let json = serde_json::to_value(&failure).unwrap();
        assert_eq!(
            (json["end"]["signal"].as_i64(), &json["was_stopped"]),
            (Some(15), &true.into())
        );
        let text = failure.to_string();
        let meaning = "\n  meaning: the launcher stopped it before its own end was done\n";
        assert!(text.contains(meaning), "{text}");
        assert!(!text.contains("\n  evidence: "), "{text}");
        failure.headline()
    };
    let panic = stopped("index 7 out of range\nfor a clip");
    assert_eq!(
        headline(panic, &[]),
        "rank 0 failed first: index 7 out of range"
    );
    let silent = headline(stopped(""), &[]);
    let text = "rank 0 failed first: it said so, and was stopped: signal 15 (SIGTERM)";
    assert_eq!(silent, text);
    let traceback = [
        "Traceback (most recent call last):",
        "  File \"a.py\", line 23, in train",
        "ValueError: broken clip",
    ];
    let text = "rank 0 failed first: ValueError: broken clip, at a.py:23 in train";
    assert_eq!(headline(ended(term, 5), &traceback), text);
}

#[test]
fn only_who_was_told_nothing_is_said_to_have_succeeded() {
    let rank = |end, sent: &[i32]| Rank {
        sent: sent.into(),
        after_stop: !sent.is_empty(),
        ..ended(Some(End::Code(end)), 5)
    };
    let ranks = [rank(17, &[]), rank(0, &[]), rank(0, &[libc::SIGTERM])];
    let places = two_hosts(&ranks);
    let fault = fault(&ranks, |i| own_words(&places[i])).unwrap();
    let text = failure(&run(), &fault, &ranks, &places).to_string();
    for line in [
        "rank 1 on gpu-01: succeeded, ",
        "rank 2 on gpu-02: stopped by the launcher: exit code 0, ",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

#[test]
fn a_job_of_slurm_goes_on_as_slurm_lets_it() {
    let hint = |may, exit_code| {
        let ranks = [ended(Some(End::Code(1)), 5)];
        let places = [place(0, &["boom"])];
        let fault = fault(&ranks, |i| own_words(&places[i])).unwrap();
        let job = "7_2".into();
        let run = Run {
            exit_code,
            resume: Some(&GoOn::Requeue { job, may }),
            ..run()
        };
        failure(&run, &fault, &ranks, &places).hint
    };
    let continued = "once the cause is gone, continue with: ";
    assert_eq!(hint(true, 1), format!("{continued}scontrol requeue 7_2"));
    // A turn after code 93 does nothing, and a job with --no-requeue has none.
    let new = format!("{continued}a new job, and --resume runs/r in it");
    assert_eq!(hint(true, exit::DO_NOT_REQUEUE), new);
    assert_eq!(hint(false, 1), new);
}

#[test]
fn a_code_means_ours_only_from_a_program_that_talks_to_us() {
    let text = |code, tells| {
        let ranks = [ended(Some(End::Code(code)), 5)];
        let places = [place(0, &["boom"])];
        let fault = fault(&ranks, |i| own_words(&places[i])).unwrap();
        failure(&Run { tells, ..run() }, &fault, &ranks, &places).to_string()
    };
    for code in [64, 65, 70, 75, 76, 92, 93] {
        assert!(!text(code, false).contains("meaning"), "{code}");
    }
    assert!(text(70, true).contains("meaning: a bug of tsm-trainer"));
    assert!(text(127, false).contains("meaning: the program was not found"));
}

#[test]
fn sigkill_comes_with_the_evidence_for_the_out_of_memory_killer() {
    let killed = End::Signal(libc::SIGKILL);
    let counted = |all, unnamed| report(&[killed], OomKills { all, unnamed });
    assert!(counted(2, 1).contains("out-of-memory killer ended 2 process(es)"));
    assert!(counted(2, 0).contains("the out-of-memory killer ended 2 others meanwhile"));
    assert!(counted(0, 0).contains("the out-of-memory killer did not count a process"));
    let counted = |all| report(&[End::Code(1)], OomKills { all, unnamed: all });
    let meaning = "meaning: the kernel's out-of-memory killer ended 2 process(es) during the run";
    assert!(counted(2).contains(meaning));
    assert!(!counted(0).contains("meaning: "));
}

#[test]
fn torchs_error_file_is_read_in_both_forms() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("e.json");
    fs_err::write(
        &path,
        r#"{"message": {"message": "ValueError: x", "extraInfo": {}}}"#,
    )
    .unwrap();
    assert_eq!(torch_error(&path).as_deref(), Some("ValueError: x"));
    fs_err::write(&path, r#"{"message": "plain"}"#).unwrap();
    assert_eq!(torch_error(&path).as_deref(), Some("plain"));
    fs_err::write(&path, "not json").unwrap();
    assert_eq!(torch_error(&path), None);
}

/// `ranks` of two hosts with half of them each.
fn two_hosts(ranks: &[Rank]) -> Vec<Place> {
    (0..ranks.len())
        .map(|i| Place {
            host: format!("gpu-{:02}", 1 + 2 * i / ranks.len()),
            ..place(i, &[])
        })
        .collect()
}

fn ended(end: Option<End>, ms: u64) -> Rank {
    Rank {
        end,
        after_stop: true,
        sent: vec![libc::SIGTERM],
        ended_at: Duration::from_millis(ms),
        first_at: Duration::from_millis(ms),
        step: Some(ms / 1000),
        ..Rank::default()
    }
}

#[test]
fn many_ranks_on_several_hosts_are_folded_and_the_host_is_told_where_it_matters() {
    let term = Some(End::Signal(libc::SIGTERM));
    let mut ranks: Vec<Rank> = (0..64).map(|i| ended(term, 2010 + i)).collect();
    ranks[7] = Rank {
        after_stop: false,
        sent: Vec::new(),
        ..ended(Some(End::Code(1)), 2005)
    };
    ranks[40].end = Some(End::Code(3));
    ranks[50].end = None;
    let mut places = two_hosts(&ranks);
    places[7].stderr = vec![
        "Traceback (most recent call last):".into(),
        "  File \"train.py\", line 9, in step".into(),
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.".into(),
        "[rank7]: bye".into(),
    ];
    places[50].stuck_in = Some("state D in nv_open".into());
    let fault = Fault {
        culprit: Culprit::Rank(7),
        reason: "its end came first".into(),
    };
    let failure = failure(&run(), &fault, &ranks, &places);
    let text = failure.to_string();
    for part in [
        "error: rank 7 failed first: exit code 1\n  class: out of GPU memory\n",
        "  evidence: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB., at train.py:9 in step\n",
        "    ranks 0-6,8-39,41-49,51-63 on 2 hosts: stopped by the launcher: signal 15 (SIGTERM), 5.0 to 68.0 ms after\n",
        "    rank 40 on gpu-02: exit code 3, 45.0 ms after\n",
        "    rank 50 on gpu-02: did not end after SIGKILL, state D in nv_open\n",
        "  hint: a smaller batch per rank",
        "; then continue with: tsm-launch --cpus 6 --resume runs/r",
    ] {
        assert!(text.contains(part), "{text}\nlacks {part}");
    }
    let json = serde_json::to_value(&failure).unwrap();
    assert_eq!(
        (&json["rank"], &json["class"]),
        (&7.into(), &"gpu_out_of_memory".into())
    );
    assert_eq!(json["evidence"], failure.evidence);
    assert!(
        json["signature"]
            .as_str()
            .unwrap()
            .starts_with("out of GPU memory: torch.OutOf")
    );
    assert_eq!(
        (
            json["others"].as_array().unwrap().len(),
            &json["others"][39]["host"]
        ),
        (63, &"gpu-02".into())
    );
}

#[test]
fn a_lost_node_is_named_with_its_ranks() {
    let term = Some(End::Signal(libc::SIGTERM));
    let ranks = [
        ended(term, 9010),
        ended(term, 9020),
        ended(None, 8000),
        ended(None, 0),
    ];
    let fault = Fault {
        culprit: Culprit::Node {
            node: 1,
            host: "gpu-02".into(),
            how: "no sign of life for 1.5 s".into(),
            at: Duration::from_secs(9),
        },
        reason: "no rank is known to have failed by itself before".into(),
    };
    let home = |i: usize| Home {
        node_rank: i / 2,
        is_lost: i >= 2,
        ..Home::default()
    };
    let homes: Vec<Home> = (0..4).map(home).collect();
    let earlier = [Incident {
        at: Duration::from_millis(4100),
        ran: Duration::from_secs(4),
        class: Class::Killed,
        again: class::Again::MayWork,
        signature: "killed from outside: signal 9 (SIGKILL)".into(),
        evidence: "signal 9 (SIGKILL)".into(),
        host: Some("gpu-01".into()),
        agent: 0,
        rank: Some(1),
        tells: true,
        step: Some(3),
        checkpoint_step: None,
    }];
    let run = Run {
        homes: &homes,
        earlier: &earlier,
        resume: None,
        ..run()
    };
    let failure = failure(&run, &fault, &ranks, &two_hosts(&ranks));
    let expected = "error: node gpu-02 was lost first: no sign of life for 1.5 s
  class: node lost
  where: host gpu-02, ranks 2-3
  when: 9.0 s after the start, last finished step 8
  named first because no rank is known to have failed by itself before; the others:
    ranks 0-1 on gpu-01: stopped by the launcher: signal 15 (SIGTERM), 10.0 to 20.0 ms after
    ranks 2-3 on gpu-02: on a node that was lost; its end is not known
  failed before, and was started again:
    4.1 s after the start: rank 1 on gpu-01 at step 3: killed from outside: signal 9 (SIGKILL)
  hint: see whether the machine is up, was taken by its scheduler, or lost its network";
    assert_eq!(failure.to_string(), expected);
    let json = serde_json::to_value(&failure).unwrap();
    assert_eq!(
        (&json["rank"], &json["pid"]),
        (&serde_json::Value::Null, &serde_json::Value::Null)
    );
    assert_eq!(json["earlier"][0]["class"], "killed");
    let incident = failure.incident(Duration::from_secs(5), Some(8), None);
    assert_eq!(
        incident.to_string(),
        "node gpu-02 at step 8: node lost: no sign of life for 1.5 s"
    );
    assert_eq!(incident.signature, "node lost");
    assert_eq!(
        (incident.at, incident.again),
        (Duration::from_secs(9), class::Again::Elsewhere)
    );
}

#[test]
fn ranks_that_hang_are_named_with_their_stacks() {
    let term = Some(End::Signal(libc::SIGTERM));
    let ranks: Vec<Rank> = (0..4).map(|i| ended(term, 60_500 + i)).collect();
    let fault = |late: &[usize]| Fault {
        culprit: Culprit::Late {
            ranks: late.to_vec(),
            at: Duration::from_secs(60),
        },
        reason: "nothing had failed when the hang was found".into(),
    };
    let run = Run {
        stacks: Some("rank 2: futex_wait\n  #0 read_clip\n"),
        ..run()
    };
    let text = failure(&run, &fault(&[2, 3]), &ranks, &two_hosts(&ranks)).to_string();
    let start = "error: ranks 2-3 hang: no step for too long
  class: hang
  where: host gpu-02, cpu, pid 102
  when: 60.0 s after the start, last finished step 60
  stacks:
    | rank 2: futex_wait
    |   #0 read_clip
  stderr: empty (logs/gpu-01-2.err)
";
    assert!(text.starts_with(start), "{text}");
    assert!(
        text.contains("\n    ranks 0-1 on gpu-01: stopped by the launcher: "),
        "{text}"
    );
    let one = failure(&run, &fault(&[2]), &ranks, &two_hosts(&ranks));
    assert!(one.to_string().starts_with("error: rank 2 hangs: "));
    assert_eq!(one.others.len(), 3);
}

#[test]
fn a_text_of_many_different_ends_stays_short() {
    let mut ranks: Vec<Rank> = (0..40).map(|i| ended(Some(End::Code(i)), 10)).collect();
    ranks[0].end = Some(End::Code(99));
    let fault = Fault {
        culprit: Culprit::Rank(0),
        reason: "its end came first".into(),
    };
    let text = failure(&run(), &fault, &ranks, &two_hosts(&ranks)).to_string();
    assert!(
        text.contains("    and 23 more such lines, see failure.json\n"),
        "{text}"
    );
    assert!(text.lines().count() < 30, "{text}");
}

#[test]
fn of_a_long_history_the_first_and_the_last_failures_are_told() {
    let ranks = [ended(Some(End::Code(3)), 10)];
    let fault = Fault {
        culprit: Culprit::Rank(0),
        reason: "its end came first".into(),
    };
    let incident = |i: u64| Incident {
        at: Duration::from_secs(i),
        ran: Duration::from_secs(1),
        class: Class::Program,
        again: class::Again::MayWork,
        signature: "program error: exit code #".into(),
        evidence: "exit code 3".into(),
        host: None,
        agent: 0,
        rank: Some(0),
        tells: false,
        step: None,
        checkpoint_step: None,
    };
    let told = |number: u64| {
        let earlier: Vec<Incident> = (0..number).map(incident).collect();
        let run = Run {
            earlier: &earlier,
            ..run()
        };
        let failure = failure(&run, &fault, &ranks, &two_hosts(&ranks));
        assert_eq!(failure.earlier.len() as u64, number);
        let text = failure.to_string();
        let lines = text.lines().filter(|line| {
            line.ends_with("exit code 3") && line.starts_with("    ")
                || line.starts_with("    and ")
        });
        lines
            .map(|line| line.trim().split(" s after").next().unwrap().to_string())
            .collect::<Vec<_>>()
    };
    let times = |range: std::ops::Range<u64>| range.map(|i| format!("{i}.0")).collect::<Vec<_>>();
    for all in [0, 1, 16, 17] {
        assert_eq!(told(all), times(0..all));
    }
    for all in [18, 1000] {
        let more = vec![format!("and {} more, see failure.json", all - 16)];
        assert_eq!(told(all), [times(0..8), more, times(all - 8..all)].concat());
    }
}
