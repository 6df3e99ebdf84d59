use super::*;
use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use crate::cluster::coordinator::tests::{join_of, place_of, settings};
use crate::cluster::message::Progress;
use crate::cluster::wire::MAX_FROM_AGENT as MAX;
use crate::end::End;
use crate::hang::process::{Stack, Thread};
use crate::manifest::environment::Change;
use crate::oom::OomKills;
use tsm_job::message::FailureRecord;

/// All parts are short enough, and whole messages again.
fn parts(message: &FromAgent) -> Vec<FromAgent> {
    assert!(len(message) > MAX, "{} bytes are no test", len(message));
    let parts = fit(message.clone(), MAX);
    for part in &parts {
        let bytes = serde_json::to_vec(part).unwrap();
        assert!(bytes.len() <= MAX, "{} bytes", bytes.len());
        assert_eq!(&serde_json::from_slice::<FromAgent>(&bytes).unwrap(), part);
    }
    parts
}

fn report(ranks: Vec<(Rank, crate::report::Place)>) -> FromAgent {
    FromAgent::Clean {
        generation: 3,
        report: Box::new(NodeReport {
            ranks,
            started_at: Duration::ZERO,
            oom_kills: OomKills::default(),
            xids: vec!["NVRM: Xid 79".into(); 10_000],
            warnings: vec!["w".repeat(1 << 20)],
            missing: Some("m".repeat(1 << 20)),
        }),
    }
}

/// Of what a coordinator that takes in `parts` has in the end.
fn whole(parts: Vec<FromAgent>) -> (Vec<(Rank, crate::report::Place)>, NodeReport) {
    let mut all = Vec::new();
    for part in parts {
        match part {
            FromAgent::Ranks { mut ranks, .. } => all.append(&mut ranks),
            FromAgent::Clean { mut report, .. } => {
                all.append(&mut report.ranks);
                return (all, *report);
            }
            other => panic!("{other:?}"),
        }
    }
    panic!("no last part")
}

fn failed(order: usize, after_stop: bool) -> Rank {
    Rank {
        end: Some(End::Code(1)),
        order,
        after_stop,
        sent: vec![15],
        ..Rank::default()
    }
}

#[test]
fn a_report_of_many_ranks_that_say_much_keeps_the_words_of_the_one_to_blame() {
    let entry = |number: usize| {
        let mut place = place_of("gpu-01");
        place.stderr = (0..50)
            .map(|i| format!("{number} {i} \"{}\"", "€".repeat(430)))
            .collect();
        place.exception = Some("e\n".repeat(32 << 10));
        (
            failed(if number == 200 { 1 } else { number + 2 }, number != 200),
            place,
        )
    };
    let (ranks, report) = whole(parts(&report((0..256).map(entry).collect())));
    assert_eq!(ranks.len(), 256);
    let orders: Vec<usize> = ranks.iter().map(|(rank, _)| rank.order).collect();
    let expected: Vec<usize> = (0..256).map(|n| if n == 200 { 1 } else { n + 2 }).collect();
    assert_eq!(orders, expected);
    assert_eq!(ranks[200].1, entry(200).1);
    let other = &ranks[7].1;
    assert!(
        other.stderr[0].ends_with("lines left out]"),
        "{:?}",
        other.stderr[0]
    );
    assert!(other.stderr.last().unwrap().starts_with("7 49 "));
    assert!(
        other
            .exception
            .as_ref()
            .unwrap()
            .contains("bytes left out]")
    );
    assert_eq!(
        (report.xids.len(), report.xids[64].as_str()),
        (65, "and 9936 more")
    );
    assert!(report.warnings[0].len() <= 1 << 10);
}

#[test]
fn a_huge_record_and_thousands_of_ranks_get_through() {
    let record = FailureRecord {
        rank: 0,
        step: None,
        code: 1,
        cause: "error".into(),
        message: format!("ValueError: {}the end", "\u{1}".repeat(10_000_000)),
        backtrace: Some("b".repeat(10_000_000)),
    };
    let first = Rank {
        record: Some(record),
        ..failed(1, false)
    };
    let one = vec![(first, place_of("gpu-01"))];
    let (ranks, _) = whole(parts(&report(one)));
    let record = ranks[0].0.record.as_ref().unwrap();
    assert!(record.message.starts_with("ValueError: ") && record.message.ends_with("the end"));

    let many = (0..4096).map(|n| (failed(n + 1, n > 0), place_of("gpu-01")));
    let (ranks, _) = whole(parts(&report(many.collect())));
    assert_eq!(ranks.len(), 4096);
    assert_eq!(ranks[4095].0, failed(4096, true));
}

fn thread(tid: i32) -> Thread {
    Thread {
        tid,
        name: "python".into(),
        state: 'S',
        wchan: Some("futex_wait_queue".into()),
        syscall: Some("futex".into()),
        kernel_stack: vec!["futex_wait".into(); 8],
    }
}

fn process(pid: i32, children: usize) -> Process {
    Process {
        pid,
        command: Some("python train.py".into()),
        rss_bytes: 1,
        threads: (0..512).map(thread).collect(),
        children: (0..children).map(|_| process(pid, 0)).collect(),
        stack: Some(Stack {
            pid,
            tool: "gdb".into(),
            text: format!("#0 main\n{}#9 last", "frame\n".repeat(10_000)),
        }),
        notes: vec!["n".into()],
    }
}

#[test]
fn what_was_seen_of_many_ranks_comes_in_several_messages() {
    let inspection = |rank: u32| Inspection {
        rank,
        host: "gpu-01".into(),
        device: "cpu".into(),
        process: process(rank as i32, 2),
    };
    let member = || ras::Member {
        node: Some("n".repeat(1 << 10)),
        ..ras::Member::default()
    };
    let answer = ras::Answer {
        text: "t".repeat(64 << 10),
        status: ras::Status {
            silent: (0..4096).map(|_| member()).collect(),
            ..ras::Status::default()
        },
    };
    let message = FromAgent::Inspected {
        generation: 1,
        looks: (0..64).map(inspection).collect(),
        ras: Some(answer),
        more: false,
    };
    let parts = parts(&message);
    let (mut ranks, mut answers, mut open) = (Vec::new(), 0, 0);
    for part in parts {
        let FromAgent::Inspected {
            looks, ras, more, ..
        } = part
        else {
            panic!("{part:?}");
        };
        answers += usize::from(ras.is_some());
        open += usize::from(!more);
        for look in looks {
            assert!(len(&look) <= MAX_LOOK, "{}", len(&look));
            let stack = look.process.stack.as_ref().unwrap();
            assert!(stack.text.starts_with("#0 main") && stack.text.ends_with("#9 last"));
            assert!(look.process.notes.last().unwrap().ends_with("left out"));
            assert_eq!(look.process.threads[0], thread(0));
            ranks.push(look.rank);
        }
    }
    assert_eq!((ranks, answers, open), ((0..64).collect(), 1, 1));
}

#[test]
fn a_beat_of_ranks_that_step_and_measure_much_is_several() {
    let progress = |local_rank| Progress {
        local_rank,
        step: Some(7),
        section: Some("s".repeat(300)),
        work_ms: (0..300).map(|i| i as f32).collect(),
        ..Progress::default()
    };
    let beat = Beat {
        seq: 5,
        ranks: (0..4096).map(progress).collect(),
        metrics: (0..5000)
            .map(|i| (format!("{i}{}", "m".repeat(500)), 1.5))
            .collect(),
        ..Beat::default()
    };
    let (mut ranks, mut metrics) = (Vec::new(), 0);
    for part in parts(&FromAgent::Beat(beat)) {
        let FromAgent::Beat(beat) = part else {
            panic!("{part:?}");
        };
        assert_eq!(beat.seq, 5);
        metrics += beat.metrics.len();
        for progress in beat.ranks {
            assert_eq!((progress.work_ms.len(), progress.work_ms[31]), (32, 299.0));
            ranks.push(progress.local_rank);
        }
    }
    assert_eq!((ranks, metrics), ((0..4096).collect(), 1000));
}

#[test]
fn output_is_split_between_lines() {
    let mut batch = Batch::new("gpu-01");
    for i in 0..300u32 {
        batch.push(Some(i), i % 2 == 0, &vec![1; 64 << 10]);
    }
    let mut lines = Vec::new();
    for part in parts(&FromAgent::Output { batch }) {
        let FromAgent::Output { batch } = part else {
            panic!("{part:?}");
        };
        for line in batch.lines() {
            assert_eq!(line.text.len(), 64 << 10);
            lines.push(line.rank.unwrap());
        }
    }
    assert_eq!(lines, (0..300).collect::<Vec<_>>());
}

#[test]
fn what_has_no_list_loses_the_middle_of_its_text() {
    let long = || "\u{1}".repeat(2 << 20);
    for message in [
        FromAgent::Notice { text: long() },
        FromAgent::CannotStart {
            generation: 0,
            code: 69,
            message: long(),
        },
        FromAgent::Unfit {
            host: "gpu-01".into(),
            code: 69,
            message: long(),
        },
    ] {
        assert_eq!(parts(&message).len(), 1);
    }
    let change = |i: usize, bytes: usize| Change {
        name: format!("NAME{i}"),
        before: None,
        after: Some("x".repeat(bytes)),
    };
    for (changes, bytes, kept) in [(20, 100 << 10, 20), (20_000, 100, 5000)] {
        let message = FromAgent::Started {
            generation: 0,
            pids: vec![i32::MAX; 4096],
            cores: vec!["1000-1007,2000-2007".into(); 4096],
            at: Duration::ZERO,
            environment: (0..changes).map(|i| change(i, bytes)).collect(),
            containment: Default::default(),
        };
        let [FromAgent::Started { environment, .. }] = &parts(&message)[..] else {
            panic!("one message");
        };
        assert_eq!(environment[0].name, "NAME0");
        assert_eq!(environment.len(), kept);
    }
    let mut join = join_of("gpu-01", 4096);
    let address = (Ipv4Addr::LOCALHOST.into(), "veth0123456789".to_string());
    join.addresses = vec![address; 50_000];
    let [FromAgent::Join(join)] = &parts(&FromAgent::Join(Box::new(join)))[..] else {
        panic!("one message");
    };
    assert_eq!((join.addresses.len(), join.devices.len()), (256, 4096));
}

#[test]
fn a_job_that_no_message_holds_is_refused_before_the_start() {
    let mut job = settings(1, 2).job;
    // All that Linux allows by default, and a config of the same size.
    job.config = Some(("config.yaml".into(), "x: \"y\"\n".repeat(256 << 10)));
    let value = OsString::from_vec(vec![0xff; 100 << 10]);
    job.base_env = Some(vec![("NAME".into(), value.clone()); 20]);
    super::job(&job).unwrap();
    // What it allows with an unlimited stack.
    job.base_env = Some(vec![("NAME".into(), value); 60]);
    let error = super::job(&job).unwrap_err();
    assert_eq!(error.code, exit::USAGE);
    let text = &error.message;
    assert!(
        text.contains("of them the environment; 15.9 are the most\n  hint: "),
        "{text}"
    );

    job.base_env = None;
    job.run_dir = OsString::from_vec(vec![b'/', 0xff]).into();
    let error = super::job(&job).unwrap_err().message;
    assert!(error.contains("is not UTF-8\n  hint: "), "{error}");
}
