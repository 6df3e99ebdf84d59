//! `tsm-trainer all-reduce`: how fast the ranks sum a tensor, and whether the sum is right.

mod pattern;

pub use pattern::Pattern;

use crate::ddp::Peers;
use crate::train::Place;
use anyhow::{Context, Result};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use tsm_job::WorkerEnv;
use tsm_job::all_reduce::{self, AllReduce, Rates};
use tsm_job::config::{Collectives, DeviceKind, Launch, duration};
use tsm_job::exit::{self, Coded};
use tsm_job::message::{AgentLink, WorkerMessage};
use tsm_torch_ext::cuda;

/// Rounds before the clock counts: NCCL makes its connections in the first.
const WARM_UP: u64 = 3;

/// Measures how fast the ranks sum a tensor, and checks every sum; start it as a worker of any launcher.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Size of the tensor on each rank, such as 4096, 512KiB, 64MiB or 1GiB.
    #[arg(long, value_name = "SIZE", value_parser = bytes, default_value = "64MiB")]
    pub bytes: u64,

    /// Go on for so many seconds after the warm-up.
    #[arg(long, value_name = "S", value_parser = seconds, default_value = "2")]
    pub seconds: Duration,

    /// Where the tensors are [default: gpu, or cpu where CUDA_VISIBLE_DEVICES is empty, as tsm-launch --cpus sets it].
    #[arg(long, value_enum)]
    pub device: Option<On>,

    /// The transport: NCCL on GPUs and Gloo on the CPU, or MPI.
    #[arg(long, value_enum, default_value = "auto")]
    pub transport: Transport,

    /// A sum or a meeting that takes longer than this has failed.
    #[arg(long, value_name = "TIME", value_parser = duration::parse, default_value = "2m")]
    pub timeout: Duration,

    /// Print one JSON object from every rank instead of a table from rank 0.
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum On {
    Cpu,
    #[value(alias = "cuda")]
    Gpu,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    Auto,
    Mpi,
}

fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text[digits.len()..].trim() {
        "" | "B" => Some(0),
        "KiB" => Some(10),
        "MiB" => Some(20),
        "GiB" => Some(30),
        _ => None,
    };
    let size = || digits.parse::<u64>().ok()?.checked_mul(1 << unit?);
    match size() {
        None => Err("write bytes, or KiB, MiB or GiB behind a whole number, such as 64MiB".into()),
        Some(size) if size < 4 || size % 4 > 0 || size > 1 << 40 => Err(
            "a tensor of float32 has at least 4 bytes, a multiple of 4, and here at most 1 TiB"
                .into(),
        ),
        Some(size) => Ok(size),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text
        .parse::<f64>()
        .ok()
        .filter(|s| (0.0..=86_400.0).contains(s));
    let seconds = seconds.ok_or("write seconds from 0 to 86400, such as 2 or 0.5")?;
    Ok(Duration::from_secs_f64(seconds))
}

/// Measures as one rank of `env`, and prints the result.
///
/// # Errors
/// A peer that is gone or stuck (exit code PEER), or a wrong sum on this rank (PREFLIGHT).
pub fn run(args: &Args, env: &WorkerEnv, link: &AgentLink) -> Result<()> {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let device = match (args.device, visible.as_deref()) {
        (Some(On::Cpu), _) | (None, Some("")) => DeviceKind::Cpu,
        (Some(On::Gpu), _) | (None, _) => DeviceKind::Gpu,
    };
    let launch = Launch {
        device,
        collective_timeout: args.timeout,
        collectives: match args.transport {
            Transport::Auto => Collectives::Auto,
            Transport::Mpi => Collectives::Mpi,
        },
        ..Launch::default()
    };
    let place = Place::meet(&launch, Path::new("runs"), env)?;
    link.send(&WorkerMessage::Section {
        name: "all-reduce".into(),
    });
    let measured = measure(&place.peers, place.device, args.bytes, args.seconds)?;
    let name = match place.device {
        Device::Cuda(index) => cuda::device(index)?.0,
        _ => "cpu".into(),
    };
    let line = measured.line(&place.peers, name, args.bytes);
    if args.json {
        let text = serde_json::to_string(&line)?;
        println!("{text}");
        if let Some(dir) = std::env::var_os(all_reduce::DIR_VARIABLE) {
            fs_err::write(all_reduce::file(Path::new(&dir), line.rank), text)
                .context(Coded::new(exit::CANNOT_WRITE, "cannot write the result"))?;
        }
    }
    let all = measured.of_all(&place.peers, place.device)?;
    if !args.json && env.rank == 0 {
        print!("{}", table(&line, &all));
    }
    std::io::stdout().flush()?;
    place.peers.leave();
    match &line.wrong {
        None => Ok(()),
        Some(wrong) => Err(Coded::new(
            exit::PREFLIGHT,
            format!(
                "rank {} on {} ({}): {wrong}\n  hint: this device, its memory or a link between the ranks computes wrong: measure fewer ranks at a time, and leave out what is wrong with every partner",
                line.rank, line.host, line.device
            ),
        )
        .into()),
    }
}

/// What one rank measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    pub rounds: u32,
    /// The median.
    pub seconds: f64,
    /// The first sum that differed from what it must be.
    pub wrong: Option<String>,
}

/// Sums `bytes` on each rank in rounds until `budget` of rank 0 is over, once at least.
///
/// # Errors
/// Exit code PEER, naming the rank that is gone or stuck.
pub fn measure(peers: &Peers, device: Device, bytes: u64, budget: Duration) -> Result<Measured> {
    let numel = (bytes / 4) as i64;
    let pattern = Pattern::new(peers.rank(), peers.world_size(), numel, device)?;
    let data = Tensor::f_empty([numel], (Kind::Float, device))?;
    let (mut seconds, mut wrong, mut start) = (Vec::new(), None, Instant::now());
    for round in 0.. {
        if round == WARM_UP {
            start = Instant::now();
        }
        let wanted = peers.rank() == 0 && (round <= WARM_UP || start.elapsed() < budget);
        pattern.fill(&data, round)?;
        // Rank 0 decides; and since all have their numbers then, only the sum is measured.
        let go_on = Tensor::from_slice(&[f32::from(u8::from(wanted))]).f_to_device(device)?;
        peers.sum_and_wait(&go_on, "agreement on the next round")?;
        if go_on.double_value(&[0]) == 0.0 {
            break;
        }
        let begun = Instant::now();
        peers.sum_and_wait(&data, "measured all-reduce")?;
        if round >= WARM_UP {
            seconds.push(begun.elapsed().as_secs_f64());
        }
        if wrong.is_none() {
            wrong = pattern.difference(&data, round)?;
        }
    }
    seconds.sort_by(f64::total_cmp);
    Ok(Measured {
        rounds: seconds.len() as u32,
        seconds: seconds[seconds.len() / 2],
        wrong,
    })
}

impl Measured {
    fn line(&self, peers: &Peers, device: String, bytes: u64) -> AllReduce {
        let rates = Rates::of(bytes, self.seconds, peers.world_size());
        let host = fs_err::read_to_string("/proc/sys/kernel/hostname");
        AllReduce {
            rank: peers.rank(),
            world_size: peers.world_size(),
            host: host.map_or("unknown".into(), |name| name.trim().into()),
            device,
            bytes,
            rounds: self.rounds,
            seconds: self.seconds,
            algbw_gb_s: rates.map(|r| r.algorithm),
            busbw_gb_s: rates.map(|r| r.bus),
            wrong: self.wrong.clone(),
        }
    }

    /// Seconds of every rank's median round, and whether its sums are right.
    fn of_all(&self, peers: &Peers, device: Device) -> Result<Vec<(f64, bool)>> {
        let wrong = f64::from(u8::from(self.wrong.is_some()));
        let own = Tensor::from_slice(&[self.seconds, wrong]).f_to_device(device)?;
        let all = peers.all_gather(&own, "exchange of the results")?;
        let each = |t: &Tensor| (t.double_value(&[0]), t.double_value(&[1]) == 0.0);
        Ok(all.iter().map(each).collect())
    }
}

/// A header and a line: the slowest rank's times.
fn table(own: &AllReduce, all: &[(f64, bool)]) -> String {
    let (slowest, seconds) = all
        .iter()
        .map(|(seconds, _)| *seconds)
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap_or((0, own.seconds));
    let wrong: Vec<String> = (0..all.len())
        .filter(|&rank| !all[rank].1)
        .map(|rank| rank.to_string())
        .collect();
    let sums = match &wrong[..] {
        [] => "right".into(),
        ranks => format!("wrong on rank {}", ranks.join(", ")),
    };
    let rates = Rates::of(own.bytes, seconds, own.world_size);
    let rate = |of: fn(Rates) -> f64| rates.map_or("-".into(), |r| format!("{:.2}", of(r)));
    let header = format!(
        "{:>6} {:>14} {:>7} {:>10} {:>11} {:>11} {:>13}  {:<7} device",
        "ranks", "bytes", "rounds", "median ms", "algbw GB/s", "busbw GB/s", "slowest rank", "sums"
    );
    format!(
        "{header}\n{:>6} {:>14} {:>7} {:>10.3} {:>11} {:>11} {:>13}  {:<7} {}\n",
        own.world_size,
        own.bytes,
        own.rounds,
        seconds * 1e3,
        rate(|r| r.algorithm),
        rate(|r| r.bus),
        slowest,
        sums,
        own.device
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_read() {
        for (text, size) in [
            ("4", 4),
            ("512KiB", 1 << 19),
            ("64MiB", 1 << 26),
            ("1GiB", 1 << 30),
        ] {
            assert_eq!(bytes(text), Ok(size));
        }
        for bad in [
            "",
            "0",
            "3",
            "6",
            "1.5MiB",
            "64MB",
            "-4",
            "2048GiB",
            "99999999999999999999",
        ] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["-1", "x", "inf", "NaN", "1e9"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_table_shows_the_slowest_rank_and_the_wrong_ones() {
        let own = AllReduce {
            rank: 0,
            world_size: 4,
            host: "gpu-01".into(),
            device: "NVIDIA H200".into(),
            bytes: 64 << 20,
            rounds: 9,
            seconds: 0.001,
            algbw_gb_s: None,
            busbw_gb_s: None,
            wrong: None,
        };
        let right = (0.001, true);
        let text = table(&own, &[right, right, (0.002, true), right]);
        let words: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(
            words,
            [
                "4", "67108864", "9", "2.000", "33.55", "50.33", "2", "right", "NVIDIA", "H200"
            ]
        );
        let text = table(&own, &[right, (0.001, false), right, (0.001, false)]);
        assert!(text.contains("wrong on rank 1, 3"), "{text}");
    }

    #[test]
    fn one_rank_has_no_rate() {
        let measured = measure(&Peers::alone(), Device::Cpu, 4096, Duration::ZERO).unwrap();
        assert_eq!((measured.rounds, measured.wrong.clone()), (1, None));
        let line = measured.line(&Peers::alone(), "cpu".into(), 4096);
        assert_eq!((line.algbw_gb_s, line.busbw_gb_s), (None, None));
        assert!(table(&line, &[(measured.seconds, true)]).contains(" - "));
    }
}
