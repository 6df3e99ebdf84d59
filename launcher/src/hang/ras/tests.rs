use super::*;
use std::io::{BufRead, Write};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, channel};

/// Excerpts of NCCL's own documentation (troubleshooting/ras.rst of NCCL 2.30).
const NORMAL: &str = "\
NCCL version 2.24.3 compiled with CUDA 12.6
CUDA runtime version 12060, driver version 12060

Job summary
===========

  Nodes  Processes         GPUs  Processes     GPUs
(total)   per node  per process    (total)  (total)
      4          8            1         32       32

Communicators... (0.00s)
=============

Group     Comms     Nodes     Ranks     Ranks     Ranks    Status  Errors
    #  in group  per comm  per node  per comm  in group
    0         8         4         1         4        32   RUNNING      OK

Errors
======

Warnings
========

";

const MISMATCH: &str = "\
Group     Comms     Nodes     Ranks     Ranks     Ranks    Status  Errors
    #  in group  per comm  per node  per comm  in group
    0         1         4         8        32        32   RUNNING  MISMATCH

Warnings
========

#0-0 (27a079b828ff1a75) MISMATCH
  Communicator ranks have different collective operation counts
  26 ranks have launched up to operation 6650
  6 ranks have launched up to operation 6649
  Rank 0 -- GPU 0 managed by process 483072 on node 172.16.64.210
  Rank 2 -- GPU 2 managed by process 483074 on node 172.16.64.210
  Rank 3 -- GPU 3 managed by process 483075 on node 172.16.64.210
  Rank 4 -- GPU 4 managed by process 483076 on node 172.16.64.210
  Rank 5 -- GPU 5 managed by process 483077 on node 172.16.64.210
  Rank 7 -- GPU 7 managed by process 483079 on node 172.16.64.210
";

const STATUSES: &str = "\
Group     Comms     Nodes     Ranks     Ranks     Ranks    Status  Errors
    #  in group  per comm  per node  per comm  in group
    0         1         4       1-2        32        32  FINALIZE  MISMATCH
    1         7         4         1         4        28   RUNNING      OK
    2         1         4         1         4         4      INIT      OK

#0-0 (9e17999afaa87dbb) MISMATCH
  Communicator ranks have different status
  26 ranks have status UNKNOWN
  4 ranks have status RUNNING
  Rank 0 -- GPU 0 managed by process 507285 on node 172.16.64.210
  Rank 8 -- GPU 0 managed by process 1598388 on node 172.16.64.212
  Rank 16 -- GPU 0 managed by process 3500071 on node 172.16.64.213
  Rank 24 -- GPU 0 managed by process 2405067 on node 172.16.64.222
  2 ranks have status FINALIZE
  Rank 4 -- GPU 4 managed by process 507289 on node 172.16.64.210
  Rank 20 -- GPU 4 managed by process 3500075 on node 172.16.64.213
";

const INCOMPLETE: &str = "\
Communicators... (2.05s)
=============

Group     Comms     Nodes     Ranks     Ranks     Ranks    Status  Errors
    #  in group  per comm  per node  per comm  in group
    0         1         4       7-8        32        32   RUNNING  INCOMPLETE

Errors
======

INCOMPLETE
  Missing communicator data from 1 job process
  Process 3487984 on node 172.16.64.213 managing GPU 5

#0-0 (cf264af53edbe986) INCOMPLETE
  Missing communicator data from 1 rank
  The missing rank: 21

Warnings
========

TIMEOUT
  Encountered 2 communication timeouts while gathering communicator data
";

const DEAD: &str = "\
Errors
======

DEAD
  1 job process is considered dead (unreachable via the RAS network)
  Process 3487984 on node 172.16.64.213 managing GPU 5

#0-0 (cf264af53edbe986) INCOMPLETE
  Missing communicator data from 1 rank
  The missing rank: 21
";

const JSON: &str = r#"{
  "nccl_version": "2.29.1",
  "cuda_runtime_version": 13000,
  "cuda_driver_version": 13000,
  "timestamp": "2025-12-19 13:06:53",
  "communicators_count": 1,
  "communicators": [
    {
      "hash": "0xae94423cfbb2ef4a",
      "secondary_hash": "0xb7e7187447156001:0xb8242ed28a71381e",
      "size": 2,
      "ranks_count": 1,
      "missing_ranks_count": 1,
      "ranks": [
        {
          "rank": 0,
          "host": "172.16.64.245",
          "pid": 1524344,
          "cuda_dev": 0,
          "nvml_dev": 0,
          "status": {
            "init_state": 0,
            "async_error": 0,
            "finalize_called": false,
            "destroy_flag": false,
            "abort_flag": false
          },
          "collective_counts": {
            "Broadcast": 0,
            "Reduce": 0,
            "AllGather": 0,
            "ReduceScatter": 0,
            "AllReduce": 0
          }
        }
      ],
      "missing_ranks": [
        {
          "rank": 1,
          "host": "172.16.64.245",
          "pid": 1524345,
          "cuda_dev": 1,
          "nvml_dev": 1,
          "status": {
            "unresponsive": true,
            "considered_dead": false
          }
        }
      ]
    }
  ],
  "ras": {
    "collection_time_sec": 0.000,
    "timeouts_count": 0
  }
}
"#;

fn behind_of(status: &Status) -> Vec<(u32, u64, u64)> {
    (status.communicators.iter())
        .flat_map(|c| &c.behind)
        .map(|b| (b.member.rank.unwrap(), b.count, b.most))
        .collect()
}

#[test]
fn a_healthy_job_has_no_faults() {
    let status = parse(NORMAL);
    assert_eq!(status.nccl.as_deref(), Some("2.24.3"));
    assert_eq!(status.to_string(), "");
    assert_eq!(status.suspects(4), [0u32; 0]);
}

#[test]
fn ranks_that_have_launched_less_are_behind() {
    let status = parse(MISMATCH);
    let ranks: Vec<u32> = behind_of(&status).iter().map(|b| b.0).collect();
    assert_eq!(ranks, [0, 2, 3, 4, 5, 7]);
    assert!(
        behind_of(&status)
            .iter()
            .all(|b| (b.1, b.2) == (6649, 6650))
    );
    assert_eq!(status.suspects(32), [0, 2, 3, 4, 5, 7]);
    assert_eq!(status.suspects(64), [0u32; 0], "of a part of the job");
    let text = status.to_string();
    let line = "communicator 27a079b828ff1a75 of 32 ranks: rank 2 (process 483074 on 172.16.64.210 GPU 2) has launched operation 6649, others 6650\n";
    assert!(text.contains(line), "{text}");
}

#[test]
fn the_operation_is_named_where_nccl_names_it() {
    // The wording of NCCL 2.26 and newer, for one rank that is behind and three that are ahead.
    let answer = "\
#0-0 (27a079b828ff1a75) MISMATCH
  Communicator ranks have different AllReduce operation counts
  Rank 1 has launched up to operation 12 -- GPU 1 managed by process 31 on node 10.0.0.1
  3 ranks have launched up to operation 14
  Communicator ranks have different Broadcast operation counts
  3 ranks have launched up to operation 2
  Rank 1 has not launched any operations -- GPU 1 managed by process 31 on node 10.0.0.1
";
    let status = parse(answer);
    assert_eq!(behind_of(&status), [(1, 12, 14), (1, 0, 2)]);
    let operations: Vec<_> = (status.communicators[0].behind.iter())
        .map(|b| b.operation.as_deref())
        .collect();
    assert_eq!(operations, [Some("AllReduce"), Some("Broadcast")]);
}

#[test]
fn different_states_are_not_different_counts() {
    assert_eq!(parse(STATUSES).communicators, []);
}

#[test]
fn missing_ranks_and_silent_processes_are_found() {
    let status = parse(INCOMPLETE);
    let silent = Member {
        rank: None,
        pid: Some(3_487_984),
        node: Some("172.16.64.213".into()),
        gpu: Some("5".into()),
        dead: false,
    };
    assert_eq!(status.silent, std::slice::from_ref(&silent));
    assert_eq!(status.communicators[0].size, Some(32));
    assert_eq!(status.suspects(32), [21]);
    assert_eq!(
        status.to_string(),
        "no answer from process 3487984 on 172.16.64.213 GPU 5\n\
         communicator cf264af53edbe986 of 32 ranks: no data from rank 21\n"
    );

    let status = parse(DEAD);
    assert_eq!(
        status.silent,
        [Member {
            dead: true,
            ..silent
        }]
    );
    assert_eq!(status.communicators[0].missing[0].rank, Some(21));

    // The wording of newer versions.
    let newer = INCOMPLETE.replace(
        "The missing rank: 21",
        "Rank 21 -- GPU 5 managed by process 3487984 on node 172.16.64.213",
    );
    let member = &parse(&newer).communicators[0].missing[0];
    assert_eq!((member.rank, member.pid), (Some(21), Some(3_487_984)));
}

#[test]
fn json_is_read_as_well() {
    let status = parse(JSON);
    assert_eq!(status.nccl.as_deref(), Some("2.29.1"));
    assert_eq!(status.suspects(2), [1]);
    assert_eq!(
        status.to_string(),
        "no answer from process 1524345 on 172.16.64.245 GPU 1\n\
         communicator ae94423cfbb2ef4a of 2 ranks: no data from rank 1 (process 1524345 on 172.16.64.245 GPU 1)\n"
    );
    let joining = JSON.replace("\"unresponsive\": true", "\"unresponsive\": false");
    assert_eq!(parse(&joining).communicators, []);
}

#[test]
fn counts_in_json_are_compared() {
    let rank = |rank: u32, count: u64| {
        format!(
            r#"{{"rank": {rank}, "pid": {}, "collective_counts": {{"AllReduce": {count}, "Broadcast": 3}}}}"#,
            100 + rank
        )
    };
    let ranks = [rank(0, 14), rank(1, 12), rank(2, 14)].join(",");
    let answer = format!(
        r#"{{"communicators": [{{"hash": "0x1", "size": 3, "ranks": [{ranks}]}}], "new": []}}"#
    );
    assert_eq!(behind_of(&parse(&answer)), [(1, 12, 14)]);
}

#[test]
fn an_answer_that_is_passed_on_is_small() {
    let mut text = String::from(
        "#0-0 (27a0) MISMATCH\n  Communicator ranks have different AllReduce operation counts\n  9999 ranks have launched up to operation 3\n  9999 ranks have launched up to operation 2\n",
    );
    for rank in 0..9999 {
        text += &format!("  Rank {rank} -- GPU 0 managed by process 7 on node é\n");
    }
    let answer = Answer::new(&text);
    assert_eq!(answer.status.communicators[0].behind.len(), 256);
    assert!(answer.text.len() < 65 << 10);
    let shown = answer.status.to_string();
    assert_eq!(shown.lines().count(), 9, "{shown}");
    assert!(shown.ends_with("and 248 more that are behind\n"), "{shown}");
}

#[test]
fn any_text_can_be_read() {
    for text in [
        "",
        "{",
        "#0-0",
        "#",
        "  Rank",
        "#0-0 (x) MISMATCH\n  Rank -- \n  5 ranks have",
        "INCOMPLETE\n  Process",
        "{\"communicators\": 3}",
    ] {
        assert_eq!(parse(text).communicators, [], "{text}");
    }
}

/// Answers one connection after the other as `serve` does; the commands of each, when it is over. On a busy machine
/// there may be more of them than were meant: whoever is not greeted in time comes again.
fn server(
    serve: impl Fn(usize, &str) -> Option<String> + Send + 'static,
) -> (String, Receiver<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (told, conversations) = channel();
    std::thread::spawn(move || {
        let mut open = Vec::new();
        for (connection, stream) in listener.incoming().enumerate() {
            let (stream, mut commands) = (stream.unwrap(), Vec::new());
            let mut is_silent = false;
            let mut lines = std::io::BufReader::new(stream.try_clone().unwrap()).lines();
            while let Some(Ok(line)) = lines.next() {
                let answer = serve(connection, &line);
                is_silent = answer.is_none();
                let last = line.ends_with("STATUS") || is_silent;
                commands.push(line);
                let _ = (&stream).write_all(answer.unwrap_or_default().as_bytes());
                if last {
                    break;
                }
            }
            // Without an answer it stays open and silent, as a process that is stopped.
            if is_silent {
                open.push(stream);
            }
            let _ = told.send(commands);
        }
    });
    (address, conversations)
}

const PATIENCE: Duration = Duration::from_secs(20);

fn as_nccl(line: &str, status: &str, json: bool) -> Option<String> {
    Some(match line {
        "CLIENT PROTOCOL 2" => "SERVER PROTOCOL 2\n".into(),
        "SET FORMAT json" if !json => "ERROR: Unknown command SET FORMAT json\n".into(),
        "TIMEOUT 5" | "SET FORMAT json" => "OK\n".into(),
        "VERBOSE STATUS" => status.into(),
        other => format!("ERROR: Unknown command {other}\n"),
    })
}

#[test]
fn a_whole_conversation() {
    let (address, conversations) = server(|_, line| as_nccl(line, JSON, true));
    assert_eq!(ask(&address, PATIENCE).unwrap(), JSON);
    let whole = [
        "CLIENT PROTOCOL 2",
        "TIMEOUT 5",
        "SET FORMAT json",
        "VERBOSE STATUS",
    ];
    while conversations.recv_timeout(PATIENCE).unwrap() != whole {}
}

#[test]
fn an_older_version_answers_in_text() {
    let (address, _) = server(|_, line| as_nccl(line, INCOMPLETE, false));
    let answer = ask(&address, PATIENCE).unwrap();
    assert_eq!(parse(&answer).suspects(32), [21]);
}

#[test]
fn a_process_that_does_not_greet_is_left_for_another() {
    let (address, conversations) = server(|connection, line| match connection {
        0 => None,
        _ => as_nccl(line, NORMAL, true),
    });
    assert_eq!(ask(&address, PATIENCE).unwrap(), NORMAL);
    let silent = conversations.recv_timeout(PATIENCE).unwrap();
    assert_eq!(silent, ["CLIENT PROTOCOL 2"]);
}

#[test]
fn the_wait_for_an_answer_ends() {
    let (address, _) = server(|_, line| match line {
        "VERBOSE STATUS" => None,
        "TIMEOUT 1" => Some("OK\n".into()),
        _ => as_nccl(line, "", true),
    });
    let silent = ask(&address, Duration::from_millis(300));
    let error = format!("{:#}", silent.unwrap_err());
    assert!(error.contains(&address), "{error}");
    assert!(!error.contains("closed"), "{error}");
}

#[test]
fn an_endless_answer_is_cut() {
    let (address, _) = server(|_, line| match line {
        "VERBOSE STATUS" => Some("x".repeat(ask::MAX_BYTES + 100_000)),
        _ => as_nccl(line, "", true),
    });
    let answer = ask(&address, PATIENCE).unwrap();
    assert!(answer.ends_with("[the answer is cut here]\n"));
    assert!(answer.len() < ask::MAX_BYTES + 100);
}

#[test]
fn errors_say_where_and_what_to_do() {
    // Nobody listens there, nor can.
    let held = crate::port::Port::reserve().unwrap();
    let address = format!("127.0.0.1:{}", held.number);
    let error = format!("{:#}", ask(&address, PATIENCE).unwrap_err());
    assert!(
        error.contains(&address) && error.contains("NCCL_RAS_ENABLE"),
        "{error}"
    );
    let error = format!("{:#}", ask("28028", PATIENCE).unwrap_err());
    assert!(error.contains("host:port"), "{error}");

    let (address, _) = server(|_, _| Some("SSH-2.0-OpenSSH_9.2\n".into()));
    let error = format!("{:#}", ask(&address, PATIENCE).unwrap_err());
    assert!(error.contains("something else listens there"), "{error}");
}
