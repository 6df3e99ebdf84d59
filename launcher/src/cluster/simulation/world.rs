//! The machines, their processes and the network between them, on a clock of their own.

mod agents;
mod check;
mod coordinator;
mod faults;
mod ranks;
mod wires;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::agent::{Agent, Effect, Input};
use super::network::Pipe;
use super::plan::{Expected, Fault, Plan};
use super::random::Random;
use crate::cluster::coordinator::{Action, Ending, Event, Launched, Phase, Report, State};
use crate::cluster::message::{FromAgent, LEASE, ToAgent};
use crate::end::End;
use tsm_job::exit;

const ZERO: Duration = Duration::ZERO;
const MS: fn(u64) -> Duration = Duration::from_millis;
/// A loss is noticed by then, beyond the lease: what was on its way still arrives.
const MARGIN: Duration = Duration::from_millis(600);
/// A job of this kind is over by then, whatever happens.
pub const END: Duration = Duration::from_secs(600);
/// Deadlines in a row that change nothing.
const SPINS: u32 = 100;

/// What an agent sends, or sees.
#[derive(Clone, Debug)]
enum Packet<T> {
    Message(Box<T>),
    Closed,
}

#[derive(Clone, Debug)]
enum What {
    AgentStarts(usize),
    /// To the coordinator, of this node.
    Up(usize),
    /// To this node.
    Down(usize),
    AgentTimer(usize),
    AgentContinues(usize),
    Input(usize, Input),
    GuardTimer(usize),
    Rank(usize, Do),
    CoordinatorTimer,
    CoordinatorContinues,
    Fault(usize),
    /// The coordinator knows by now that this node is gone.
    Noticed(usize),
}

/// What a rank does.
#[derive(Clone, Debug)]
enum Do {
    Step(u64),
    /// Its death closes its agent socket; the end shows later.
    Leave,
    Announce(i32),
    End(End),
    /// It notices that a peer is gone.
    Notice,
    /// The kernel is done with it.
    Gone(End),
}

struct Node {
    host: String,
    agent: Option<Agent>,
    local: bool,
    /// From when its agent's clock counts.
    born: Duration,
    stopped_until: Duration,
    inbox: VecDeque<Input>,
    up: Pipe<Packet<FromAgent>>,
    down: Pipe<Packet<ToAgent>>,
    /// When the guard kills, and which ranks.
    guard: Option<Duration>,
    ranks: Vec<usize>,
    broken: bool,
    mute: bool,
}

struct Rank {
    node: usize,
    local: usize,
    number: u32,
    generation: u32,
    alive: bool,
    hung: bool,
    step: u64,
    /// How long it takes to end when it is told to; `None`: it ignores that.
    ends_in: Option<Duration>,
    /// Likewise, to save.
    saves_in: Option<Duration>,
    failed: bool,
    /// It is inside the kernel, and no signal changes its end.
    dying: bool,
}

pub struct World {
    pub now: Duration,
    queue: BTreeMap<(Duration, u64), What>,
    count: u64,
    random: Random,
    plan: Plan,
    state: State,
    coordinator_up: bool,
    coordinator_stopped_until: Duration,
    inbox: VecDeque<Event>,
    spins: (Duration, u32),
    nodes: Vec<Node>,
    ranks: Vec<Rank>,
    /// What the coordinator was made to believe is the first failure.
    expected: Option<Expected>,
    /// Somebody asked for the end of the job, and the coordinator has heard it.
    told_to_end: bool,
    /// Somebody did not wait for the end of a lost node's ranks.
    hurried: bool,
    endings: Vec<Ending>,
    /// Hosts that were measured and found bad.
    convicted: Vec<String>,
    starts: u32,
    pub code: Option<i32>,
    /// What came to pass, so that a test can tell that it does.
    pub seen: BTreeSet<String>,
    /// Rules that were broken.
    pub broken: Vec<String>,
    /// The last things that happened, for people.
    pub story: VecDeque<String>,
}

impl World {
    pub fn new(plan: Plan, seed: u64) -> World {
        let settings = plan.settings();
        let mut world = World {
            now: ZERO,
            queue: BTreeMap::new(),
            count: 0,
            random: Random(seed ^ 0x5eed),
            state: State::new(settings, ZERO),
            coordinator_up: true,
            coordinator_stopped_until: ZERO,
            inbox: VecDeque::new(),
            spins: (ZERO, 0),
            nodes: Vec::new(),
            ranks: Vec::new(),
            expected: None,
            told_to_end: false,
            hurried: false,
            endings: Vec::new(),
            convicted: Vec::new(),
            starts: 0,
            code: None,
            seen: BTreeSet::new(),
            broken: Vec::new(),
            story: VecDeque::new(),
            plan,
        };
        for i in 0..world.plan.num_nodes {
            let local = i == 0 && world.plan.local;
            let late = world.plan.late && i >= world.plan.min_nodes as usize;
            let at = match (local, late) {
                (true, _) => ZERO,
                (_, true) => world.random.ms(0, 6000),
                (_, false) => world.random.ms(0, 30),
            };
            world.add_node(&format!("n{i}"), local, at);
        }
        for (i, (at, _)) in world.plan.faults.clone().into_iter().enumerate() {
            world.at(at, What::Fault(i));
        }
        world.arm_coordinator();
        world
    }

    fn add_node(&mut self, host: &str, local: bool, at: Duration) {
        let delay = if local {
            (ZERO, ZERO)
        } else {
            (Duration::from_micros(50), self.plan.latency)
        };
        self.nodes.push(Node {
            host: host.into(),
            agent: None,
            local,
            born: at,
            stopped_until: ZERO,
            inbox: VecDeque::new(),
            up: Pipe::new(delay),
            down: Pipe::new(delay),
            guard: None,
            ranks: Vec::new(),
            broken: false,
            mute: false,
        });
        self.at(at, What::AgentStarts(self.nodes.len() - 1));
    }

    fn at(&mut self, at: Duration, what: What) {
        self.count += 1;
        self.queue.insert((at.max(self.now), self.count), what);
    }

    fn tell(&mut self, text: String) {
        if self.story.len() == 400 {
            self.story.pop_front();
        }
        self.story
            .push_back(format!("{:9.3} {text}", self.now.as_secs_f64()));
    }

    fn saw(&mut self, what: &str) {
        self.seen.insert(what.into());
    }

    fn fault(&mut self, text: String) {
        self.tell(format!("BROKEN {text}"));
        self.broken.push(text);
    }

    /// To the end of everything; then what was left is checked.
    pub fn run(&mut self) {
        while let Some(((at, _), what)) = self.queue.pop_first() {
            if at > END || !self.broken.is_empty() {
                break;
            }
            self.now = at;
            self.happen(what);
        }
        if self.broken.is_empty() {
            self.check_end();
        }
    }

    fn happen(&mut self, what: What) {
        match what {
            What::AgentStarts(n) => self.start_agent(n),
            What::Up(n) => self.arrives_up(n),
            What::Down(n) => self.arrives_down(n),
            What::AgentTimer(n) => {
                let due = self.nodes[n].agent.as_ref().and_then(Agent::deadline);
                if due.is_some_and(|at| self.nodes[n].born + at <= self.now) {
                    self.wake(n, Input::Time);
                }
            }
            What::AgentContinues(n) => self.agent_continues(n),
            What::Input(n, input) => self.wake(n, input),
            What::GuardTimer(n) => {
                if self.nodes[n].guard.is_some_and(|at| at <= self.now) {
                    self.saw("the guard kills");
                    self.tell(format!("the guard of node {n} kills"));
                    self.kill_all(n);
                }
            }
            What::Rank(r, what) => self.rank_does(r, what),
            What::CoordinatorTimer => {
                let due = self.state.deadline().is_some_and(|at| at <= self.now);
                if due && self.now >= self.coordinator_stopped_until {
                    self.coordinator(Event::Deadline);
                }
            }
            What::CoordinatorContinues => {
                if self.now >= self.coordinator_stopped_until {
                    // What was heard meanwhile comes before what is due.
                    for event in std::mem::take(&mut self.inbox) {
                        self.coordinator(event);
                    }
                    self.arm_coordinator();
                }
            }
            What::Fault(i) => self.inject(self.plan.faults[i].1.clone()),
            What::Noticed(n) => {
                let since = self.now.saturating_sub(LEASE + MARGIN);
                let paused = self.coordinator_stopped_until > since;
                let id = n as u64 + 1;
                if self.coordinator_up && !paused && self.state.is_connected(id) {
                    let phase = format!("{:?}", self.state.phase);
                    self.fault(format!("the loss of node {n} was not noticed in {phase}"));
                }
            }
        }
    }
}
