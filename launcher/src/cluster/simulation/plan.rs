//! What a job is made of, and what goes wrong with it; all from one seed.

use std::time::Duration;

use super::agent::Network;
use super::random::Random;
use crate::cluster::coordinator::Settings;
use crate::cluster::coordinator::tests::settings;
use crate::doctor::preflight::Scale;
use crate::end::End;
use tsm_job::exit;

/// How a rank fails.
#[derive(Clone, Copy, Debug)]
pub enum How {
    Plain(End),
    /// It says so, and ends after some time, or never.
    Announced(i32, Option<Duration>),
    /// Its sockets close long before its end is seen.
    Left(Duration, End),
}

/// Numbers choose among whoever is there.
#[derive(Clone, Debug)]
pub enum Fault {
    RankEnds(usize, How),
    /// It saves by its own clock, and ends.
    RankSaves(usize),
    RankHangs(usize),
    AgentKilled(usize),
    /// SIGSTOP, and SIGCONT after this time.
    AgentStopped(usize, Duration),
    /// Nothing is sent any more.
    MachineDown(usize),
    /// `None`: for ever.
    Partition {
        node: usize,
        up: bool,
        down: bool,
        time: Option<Duration>,
    },
    Cut(usize),
    Slow(usize, Duration),
    CoordinatorStopped(Duration),
    CoordinatorKilled,
    Signal(i32),
    NodeSignal(usize, i32),
    /// Another agent, perhaps on a host that had one.
    Arrives(Option<usize>),
    /// Ranks cannot be started there.
    Broken(usize),
    /// It never says that it is clean.
    Mute(usize),
}

/// The first failure.
#[derive(Clone, Debug, PartialEq)]
pub enum Expected {
    /// And its exit code.
    Rank(u32, i32),
    Node(String),
    Late(u32),
    /// There is none: the job was saved.
    Saved,
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub min_nodes: u32,
    pub max_nodes: u32,
    pub num_nodes: usize,
    /// Some nodes come when the job runs.
    pub late: bool,
    pub workers: u32,
    /// The first node's agent lives in the coordinator's process.
    pub local: bool,
    pub open: bool,
    pub restarts: u32,
    pub saves: bool,
    pub grace: Duration,
    pub latency: Duration,
    pub steps: u64,
    pub period: Duration,
    /// Some ranks ignore what they are told.
    pub stubborn: bool,
    /// The nodes are measured; these are their networks.
    pub measure: Option<Vec<Network>>,
    pub faults: Vec<(Duration, Fault)>,
}

impl Plan {
    pub fn new(seed: u64) -> Plan {
        let mut random = Random(seed);
        let max_nodes = 1 + random.below(4) as u32;
        let min_nodes = 1 + random.below(max_nodes as usize) as u32;
        let min_nodes = random.pick(&[max_nodes, min_nodes]);
        let spares = random.pick(&[0, 0, 1, 2]);
        let mut plan = Plan {
            min_nodes,
            max_nodes,
            num_nodes: random.pick(&[max_nodes as usize, min_nodes as usize]) + spares,
            late: random.chance(30),
            workers: 1 + random.below(2) as u32,
            local: random.chance(50),
            open: random.chance(50),
            restarts: random.pick(&[0, 0, 1, 3]),
            saves: random.chance(60),
            grace: random.ms(200, 3000),
            latency: random.ms(1, 5),
            steps: 10 + random.below(40) as u64,
            period: random.ms(50, 300),
            stubborn: random.chance(40),
            measure: Plan::measure(seed, max_nodes as usize + spares),
            faults: Vec::new(),
        };
        match random.below(12) {
            0 => {
                plan.cancel(&mut random);
                return plan;
            }
            1 => {
                plan.tear(&mut random);
                return plan;
            }
            _ => {}
        }
        let num_faults = random.pick(&[0, 1, 1, 1, 1, 2, 3, 4, 6]);
        let mut last = Duration::ZERO;
        for _ in 0..num_faults {
            let at = match random.below(6) {
                0 => random.ms(0, 100),
                1 => random.ms(0, 12_000),
                // While the last one is being answered.
                2 | 3 => last + random.ms(0, 3000),
                _ => random.ms(300, 4000),
            };
            last = at;
            plan.faults.push((at, Fault::any(&mut random)));
        }
        plan
    }

    /// A quarter of the jobs measures its nodes, and in half of these some are bad.
    fn measure(seed: u64, num_nodes: usize) -> Option<Vec<Network>> {
        let mut random = Random(seed ^ 0x3ea5);
        if !random.chance(25) {
            return None;
        }
        let bad = if random.chance(50) {
            0
        } else {
            1 + random.below(2)
        };
        let mut networks = vec![Network::Good; num_nodes];
        for _ in 0..bad {
            networks[random.below(num_nodes)] = random.pick(&[Network::Slow, Network::Dead]);
        }
        Some(networks)
    }

    pub fn has_bad_network(&self) -> bool {
        let networks = self.measure.iter().flatten();
        networks.into_iter().any(|n| *n != Network::Good)
    }

    /// A scheduler sends SIGTERM to everybody, in any order.
    fn cancel(&mut self, random: &mut Random) {
        self.stubborn = false;
        self.grace += Duration::from_secs(3);
        let at = random.ms(500, 4000);
        let near = |random: &mut Random| at + random.ms(0, 60);
        self.faults = vec![(near(random), Fault::Signal(libc::SIGTERM))];
        for pick in 0..self.num_nodes {
            let signal = Fault::NodeSignal(pick, libc::SIGTERM);
            self.faults.push((near(random), signal));
        }
    }

    /// The way takes longer than a fence lasts beyond a lease, and nodes fall silent on it.
    fn tear(&mut self, random: &mut Random) {
        self.latency = random.ms(600, 1100);
        self.local = false;
        self.restarts = 3;
        self.max_nodes = random.pick(&[1, 1, 2]);
        self.min_nodes = self.max_nodes;
        self.num_nodes = self.max_nodes as usize + 1;
        self.steps = 60;
        for _ in 0..2 {
            let node = random.below(100);
            let fault = match random.below(2) {
                0 => Fault::AgentStopped(node, random.ms(2200, 6000)),
                _ => Fault::Partition {
                    node,
                    up: true,
                    down: false,
                    time: None,
                },
            };
            self.faults.push((random.ms(0, 5000), fault));
        }
    }

    /// Nobody has a reason to kill a rank.
    pub fn is_polite(&self) -> bool {
        let ends = |f: &Fault| {
            matches!(
                f,
                Fault::Signal(libc::SIGTERM) | Fault::NodeSignal(_, libc::SIGTERM)
            )
        };
        !self.stubborn && self.faults.iter().all(|(_, fault)| ends(fault))
    }

    pub fn settings(&self) -> Settings {
        let mut settings = settings(self.min_nodes, self.max_nodes);
        settings.job.grace = self.grace;
        settings.job.saves = self.saves;
        settings.open = self.open;
        settings.last_call = Duration::from_secs(1);
        settings.policy.max_restarts = self.restarts;
        settings.measure = self.measure.as_ref().map(|_| Scale {
            wait: Duration::from_secs(3),
            ..Scale::default()
        });
        settings.hang.hang_timeout = Some(Duration::from_secs(10));
        settings
    }

    /// One fault alone, that needs no other to be one.
    pub fn is_single(&self) -> bool {
        self.faults.len() == 1
    }

    pub fn announces(&self, code: i32) -> bool {
        let says = |f: &Fault| matches!(f, Fault::RankEnds(_, How::Announced(c, _)) if *c == code);
        self.faults.iter().any(|(_, fault)| says(fault))
    }
}

impl Fault {
    fn any(random: &mut Random) -> Fault {
        let pick = random.below(100);
        let time = random.pick(&[200, 1200, 1600, 2200, 5000, 9000]);
        let time = Duration::from_millis(time) + random.ms(0, 400);
        match random.below(21) {
            0..=3 => Fault::RankEnds(pick, How::any(random)),
            4 => Fault::RankHangs(pick),
            5 => Fault::AgentKilled(pick),
            6 | 7 => Fault::AgentStopped(pick, time),
            8 => Fault::MachineDown(pick),
            9 | 10 => {
                let (up, down) = random.pick(&[(true, true), (true, false), (false, true)]);
                Fault::Partition {
                    node: pick,
                    up,
                    down,
                    time: random.chance(60).then_some(time),
                }
            }
            11 => Fault::Cut(pick),
            12 => Fault::Slow(pick, random.ms(10, 1200)),
            13 => Fault::CoordinatorStopped(time / 2),
            14 => random
                .pick(&[Some(()), None])
                .map_or(Fault::CoordinatorStopped(time), |()| {
                    Fault::CoordinatorKilled
                }),
            15 => Fault::Signal(random.pick(&[2, 15, 10, 12])),
            16 => Fault::NodeSignal(pick, random.pick(&[2, 15, 10, 12])),
            17 => Fault::Arrives(random.chance(50).then_some(pick)),
            18 if random.chance(30) => Fault::Broken(pick),
            18 => Fault::Arrives(None),
            19 => Fault::RankSaves(pick),
            _ if random.chance(30) => Fault::Mute(pick),
            _ => Fault::RankEnds(pick, How::any(random)),
        }
    }
}

impl How {
    fn any(random: &mut Random) -> How {
        let code = random.pick(&[1, 17, exit::DATA, exit::DIVERGED, exit::CANNOT_WRITE]);
        let end = random.pick(&[
            End::Code(code),
            End::Code(code),
            End::Signal(libc::SIGKILL),
            End::Signal(libc::SIGSEGV),
        ]);
        let after = random.ms(0, 1000);
        match random.below(4) {
            0 | 1 => How::Plain(end),
            2 => How::Announced(code, random.chance(70).then_some(after)),
            // Ours would look like it.
            _ if end == End::Signal(libc::SIGKILL) => How::Left(after / 5, end),
            _ => How::Left(after, end),
        }
    }
}
