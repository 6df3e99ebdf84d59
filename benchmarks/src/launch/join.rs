//! A job of very many nodes: one launcher that coordinates, and agents that are no more than the wire.

use super::report::{Case, Goal, Seen};
use super::stage::{Stage, tail};
use super::tools::{Job, Nodes, Programs, Tool};
use super::{Bench, FEW, PATIENCE, VAIN};
use anyhow::{Context, Result, bail};
use std::time::{Duration, Instant};
use tokio::task::LocalSet;
use tsm_launch::cluster::key::Key;
use tsm_launch::cluster::link::Link;
use tsm_launch::cluster::message::{BEATS_PER_LEASE, Beat, Facts, FromAgent, Join, LEASE, ToAgent};
use tsm_launch::cluster::wire;

pub fn join(bench: &mut Bench) {
    for (nodes, goal) in [(64, None), (1024, Some(500.0)), (4096, Some(2000.0))] {
        if nodes > bench.args.max_nodes {
            continue;
        }
        let case = |to: &str, goal: Option<f64>| {
            let name =
                format!("{nodes} agents dial at once, with proof of the key, to the last {to}");
            Case::new("join", name, "ms", goal.map(Goal::AtMost))
        };
        let cases = [case("welcomed", goal), case("told to start", None)];
        let rounds = if nodes <= 1024 {
            bench.rounds()
        } else {
            bench.rounds().min(FEW)
        };
        bench.measure(&[Tool::TsmLaunch], rounds, &cases, |programs, _, _| {
            joined(programs, nodes)
        });
    }
}

fn joined(programs: &Programs, nodes: u32) -> Result<Vec<Seen>> {
    let mut stage = Stage::new()?;
    let key = Key::random();
    let key_file = stage.path("key");
    key.write_file(&key_file)?;
    let port = super::nodes::free_port()?;
    let meet = Nodes {
        num: nodes + 1,
        port,
        key_file,
    };
    let job = Job {
        nodes: Some(meet),
        ..Job::new(1)
    };
    let mut command = programs.command(Tool::TsmLaunch, &job, &stage);
    stage.start(&mut command)?;
    // It listens by the time its own agent has joined.
    let events = stage.path("run/events.jsonl");
    let until = Instant::now() + VAIN;
    while !fs_err::read_to_string(&events).is_ok_and(|text| text.contains("\"join\"")) {
        if Instant::now() > until {
            bail!(
                "the coordinator did not start within {VAIN:?}\n{}",
                stage.printed(0)
            );
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let agents = async {
        let began = Instant::now();
        let (key, done) = (&key, &tokio::sync::watch::channel(false));
        let mut agents = tokio::task::JoinSet::new();
        let (told, mut starts) = tokio::sync::mpsc::unbounded_channel();
        for number in 0..nodes {
            let (key, told, done) = (key.clone(), told.clone(), done.1.clone());
            agents.spawn_local(agent(key, port, number, began, told, done));
        }
        drop(told);
        let (mut welcomed, mut started) = (Duration::ZERO, Duration::ZERO);
        let mut left = nodes;
        while left > 0 {
            tokio::select! {
                Some((welcome, start)) = starts.recv() => {
                    welcomed = welcomed.max(welcome);
                    started = started.max(start);
                    left -= 1;
                }
                // None leaves before it is told to.
                Some(agent) = agents.join_next() => agent??,
            }
        }
        let _ = done.0.send(true);
        while let Some(agent) = agents.join_next().await {
            agent??;
        }
        anyhow::Ok(vec![
            Seen::Value(welcomed.as_secs_f64() * 1e3),
            Seen::Value(started.as_secs_f64() * 1e3),
        ])
    };
    let seen = LocalSet::new().block_on(&runtime, async {
        tokio::time::timeout(PATIENCE, agents).await
    });
    seen.with_context(|| format!("not all agents were told to start within {PATIENCE:?}"))?
        .with_context(|| tail(&stage.printed(0)))
}

/// One node: joins, shows that it lives, has reached the first node, and starts nothing. Tells when it was welcomed and told
/// to start, and stays until all are.
async fn agent(
    key: Key,
    port: u16,
    number: u32,
    began: Instant,
    told: tokio::sync::mpsc::UnboundedSender<(Duration, Duration)>,
    mut done: tokio::sync::watch::Receiver<bool>,
) -> Result<()> {
    let connection = wire::dial("127.0.0.1", port, &key, None, PATIENCE).await?;
    let mut link = Link::over(connection);
    let host = format!("node-{number:04}");
    link.to.send(FromAgent::Join(Box::new(Join {
        version: env!("CARGO_PKG_VERSION").into(),
        host: host.clone(),
        order: Some(number + 1),
        pid: 1,
        devices: vec!["cpu".into()],
        gpus: Vec::new(),
        addresses: vec![(
            [10, 0, (number >> 8) as u8, number as u8].into(),
            "eth0".into(),
        )],
        job: None,
        options: Vec::new(),
        received_ms: 0,
        facts: Facts::default(),
    })));
    let mut beats = tokio::time::interval(LEASE / BEATS_PER_LEASE);
    let (mut seq, mut welcomed) = (0, None);
    loop {
        let message = tokio::select! {
            message = link.from.recv() => message,
            _ = beats.tick() => {
                seq += 1;
                link.to.send(FromAgent::Beat(Beat { seq, at: began.elapsed(), ..Beat::default() }));
                continue;
            }
            _ = done.wait_for(|done| *done) => return Ok(()),
        };
        match message {
            Some(ToAgent::Welcome { .. }) => welcomed = Some(began.elapsed()),
            Some(ToAgent::Probe {
                generation,
                attempt,
                addresses,
                ..
            }) => {
                let by = addresses
                    .into_iter()
                    .map(|address| (address, "eth0".into()))
                    .collect();
                link.to.send(FromAgent::Reached {
                    generation,
                    attempt,
                    by,
                });
            }
            Some(ToAgent::Start(_)) => {
                let welcomed = welcomed
                    .with_context(|| format!("{host} is to start, and was not welcomed"))?;
                let _ = told.send((welcomed, began.elapsed()));
            }
            Some(ToAgent::Exit { message, .. }) => {
                bail!("{host} was sent away: {}", message.unwrap_or_default())
            }
            Some(_) => {}
            None => bail!("{host} lost its coordinator"),
        }
    }
}
