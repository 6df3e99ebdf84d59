//! The machines, their processes and the network between them, on a clock of their own.

mod check;
mod faults;
mod ranks;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::agent::{Agent, Effect, Input};
use super::network::Pipe;
use super::plan::{Expected, Fault, Plan};
use super::random::Random;
use crate::cluster::coordinator::{self, Action, Ending, Event, Launched, Phase, Report, State};
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
    /// It closes its agent socket.
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

    // The coordinator.

    fn arm_coordinator(&mut self) {
        if let Some(at) = self.state.deadline().filter(|_| self.coordinator_up) {
            self.at(at, What::CoordinatorTimer);
        }
    }

    fn coordinator(&mut self, event: Event) {
        if !self.coordinator_up {
            return;
        }
        if self.now < self.coordinator_stopped_until {
            self.inbox.push_back(event);
            return;
        }
        match &event {
            Event::Deadline if self.spins.0 == self.now => {
                self.spins.1 += 1;
                if self.spins.1 > SPINS {
                    self.fault(format!("the coordinator spins in {:?}", self.state.phase));
                }
            }
            Event::Deadline => self.spins = (self.now, 0),
            Event::Said {
                message: FromAgent::Beat(_),
                ..
            } => {}
            Event::Said { node, message, .. } => self.tell(format!("{node} says {message:?}")),
            other => self.tell(format!("coordinator: {other:?}")),
        }
        let preempts = self.plan.saves && self.state.phase == Phase::Run;
        let ends = |s: i32| {
            matches!(s, libc::SIGINT | libc::SIGTERM | libc::SIGHUP)
                || (preempts && s == libc::SIGUSR2)
        };
        match event {
            Event::Signal(signal)
            | Event::Said {
                message: FromAgent::Signal { signal },
                ..
            } if ends(signal) => {
                // Of a node that it does not know, it hears nothing.
                let known = match event {
                    Event::Said { node, .. } => self.state.is_connected(node),
                    _ => true,
                };
                self.told_to_end |= known;
            }
            _ => {}
        }
        self.hurried |= matches!(
            (&event, &self.state.phase),
            (Event::Signal(libc::SIGINT), Phase::Leave { .. })
        );
        let phase = name(&self.state.phase);
        let lost = match event {
            Event::Lost { node, .. } if self.state.is_connected(node) => Some("cut"),
            _ => None,
        };
        let actions = coordinator::decide(&mut self.state, event, self.now);
        let dropped = actions.iter().any(|a| matches!(a, Action::Drop { .. }));
        if let Some(how) = lost.or(dropped.then_some("silent")) {
            self.saw(&format!("{how} in {phase}"));
        }
        for action in actions {
            self.act(action);
        }
        if let Some(code) = self.state.finished() {
            self.saw(&format!("code {code}"));
            self.tell(format!("the coordinator ends with {code}"));
            self.code = Some(code);
            self.stop_coordinator();
        }
        self.arm_coordinator();
    }

    fn stop_coordinator(&mut self) {
        self.coordinator_up = false;
        let left = |r: &&Rank| match self.nodes[r.node].local {
            true => r.alive,
            false => r.alive && !r.dying && !self.hurried,
        };
        if let (Some(code), Some(rank)) = (self.code, self.ranks.iter().find(left)) {
            let (number, generation, n) = (rank.number, rank.generation, rank.node);
            self.fault(format!(
                "the launcher ends with {code} before rank {number} of generation {generation} on node {n}"
            ));
        }
        for n in 0..self.nodes.len() {
            if self.nodes[n].local {
                self.nodes[n].agent = None;
                self.kill_all(n);
            } else {
                self.send_down(n, Packet::Closed);
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send { node, message } => {
                if !matches!(message, ToAgent::Ack { .. }) {
                    self.tell(format!("to {node}: {}", short(&format!("{message:?}"))));
                }
                if let Some(n) = self.index(node) {
                    self.send_down(n, Packet::Message(Box::new(message)));
                }
            }
            Action::Drop { node } => {
                if let Some(n) = self.index(node) {
                    self.send_down(n, Packet::Closed);
                    self.nodes[n].down.closed = true;
                }
            }
            Action::Started(launched) => {
                self.starts += 1;
                self.tell(format!("generation {} starts", launched.generation));
                self.check_start(&launched);
                if self.told_to_end {
                    self.fault("started again after it was told to end".into());
                }
            }
            Action::Ended(ending) => {
                self.tell(format!(
                    "generation {} ended: {} {} {:?}",
                    ending.generation,
                    ending.outcome,
                    ending.code,
                    ending.failure.as_ref().map(|f| f.headline())
                ));
                self.saw(ending.outcome);
                if ending.again {
                    self.saw("again");
                }
                self.endings.push(*ending);
            }
            Action::Notice(text) => self.tell(format!("notice: {text}")),
            Action::Measured(report) => self.judged(&report),
            Action::Record { .. }
            | Action::Show(_)
            | Action::Environment(_)
            | Action::LeftOut(_)
            | Action::Told(_) => {}
        }
    }

    fn index(&self, node: u64) -> Option<usize> {
        let n = node.checked_sub(1)? as usize;
        (n < self.nodes.len()).then_some(n)
    }

    // The network.

    fn send_down(&mut self, n: usize, packet: Packet<ToAgent>) {
        let at = self.nodes[n].down.send(packet, self.now, &mut self.random);
        if let Some(at) = at {
            self.at(at, What::Down(n));
        }
    }

    fn send_up(&mut self, n: usize, packet: Packet<FromAgent>) {
        let at = self.nodes[n].up.send(packet, self.now, &mut self.random);
        if let Some(at) = at {
            self.at(at, What::Up(n));
        }
    }

    fn arrives_up(&mut self, n: usize) {
        let (node, local) = (n as u64 + 1, self.nodes[n].local);
        match self.nodes[n].up.arrive(self.now) {
            Ok(Packet::Message(message)) => self.coordinator(Event::Said {
                node,
                local,
                message: *message,
            }),
            Ok(Packet::Closed) => {
                let how = "its agent broke off the connection".into();
                self.coordinator(Event::Lost { node, how });
            }
            Err(Some(again)) => self.at(again, What::Up(n)),
            Err(None) => {}
        }
    }

    fn arrives_down(&mut self, n: usize) {
        match self.nodes[n].down.arrive(self.now) {
            Ok(Packet::Message(message)) => self.wake(n, Input::Message(*message)),
            Ok(Packet::Closed) => self.wake(n, Input::Closed),
            Err(Some(again)) => self.at(again, What::Down(n)),
            Err(None) => {}
        }
    }

    // The agents.

    fn start_agent(&mut self, n: usize) {
        let (host, local) = (self.nodes[n].host.clone(), self.nodes[n].local);
        let (mut agent, effects) = Agent::new(&host, local, self.plan.workers, ZERO);
        (agent.broken, agent.mute) = (self.nodes[n].broken, self.nodes[n].mute);
        agent.network = (n as u16, self.plan.measure.clone().unwrap_or_default());
        self.nodes[n].agent = Some(agent);
        self.effect(n, effects);
        self.wake(n, Input::Time);
    }

    fn wake(&mut self, n: usize, input: Input) {
        let node = &mut self.nodes[n];
        if node.agent.is_none() {
            return;
        }
        let process_stops = node.local && self.now < self.coordinator_stopped_until;
        if self.now < node.stopped_until || process_stops {
            if !matches!(input, Input::Time) {
                node.inbox.push_back(input);
            }
            return;
        }
        let now = self.now - node.born;
        let Some(agent) = &mut node.agent else {
            return;
        };
        let effects = agent.wake(input, now);
        self.effect(n, effects);
        let node = &self.nodes[n];
        if let Some(at) = node.agent.as_ref().and_then(Agent::deadline) {
            let at = node.born + at;
            self.at(at, What::AgentTimer(n));
        }
    }

    fn agent_continues(&mut self, n: usize) {
        if self.now < self.nodes[n].stopped_until {
            return;
        }
        let inbox = std::mem::take(&mut self.nodes[n].inbox);
        // As its loop does: first its ranks, then what it is told, then the time.
        let is_message = |i: &Input| matches!(i, Input::Message(_) | Input::Closed);
        let (messages, own): (Vec<Input>, Vec<Input>) = inbox.into_iter().partition(is_message);
        for input in own.into_iter().chain(messages).chain([Input::Time]) {
            self.wake(n, input);
        }
    }

    fn effect(&mut self, n: usize, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Say(message) => self.send_up(n, Packet::Message(Box::new(message))),
                Effect::Spawn(start) => self.spawn(n, &start),
                Effect::Signal { local, signal } => self.signal_rank(n, local, signal),
                Effect::Kill { local } => {
                    if self.plan.is_polite() {
                        self.fault(format!("node {n} kills a rank within its grace"));
                    }
                    if let Some(r) = self.rank_of(n, local) {
                        let at = self.now + self.random.ms(0, 1);
                        self.at(at, What::Rank(r, Do::End(End::Signal(libc::SIGKILL))));
                    }
                }
                Effect::Guard(time) => {
                    let at = self.now + time;
                    self.nodes[n].guard = Some(at);
                    // It is a process as others are.
                    let at = at + self.random.ms(0, 100);
                    self.at(at, What::GuardTimer(n));
                }
                Effect::Dismiss => self.nodes[n].guard = None,
                Effect::Drain => {
                    let at = self.now + self.random.ms(0, 20);
                    self.at(at, What::Input(n, Input::Drained));
                }
                Effect::Measure(result) => {
                    let at = self.now + self.random.ms(50, 2500);
                    self.at(at, What::Input(n, Input::Measured(result)));
                }
                Effect::Exit(code) => {
                    self.tell(format!("the agent of node {n} leaves with {code}"));
                    self.end_agent(n);
                }
            }
        }
    }

    fn end_agent(&mut self, n: usize) {
        self.nodes[n].agent = None;
        self.send_up(n, Packet::Closed);
        self.nodes[n].up.closed = true;
        // They die with the process that started them.
        self.kill_all(n);
    }

    fn kill_all(&mut self, n: usize) {
        self.nodes[n].guard = None;
        for r in self.nodes[n].ranks.clone() {
            self.rank_does(r, Do::End(End::Signal(libc::SIGKILL)));
        }
    }
}

fn name(phase: &Phase) -> &'static str {
    match phase {
        Phase::Gather { .. } => "Gather",
        Phase::Form { .. } => "Form",
        Phase::Measure { .. } => "Measure",
        Phase::Run => "Run",
        Phase::Stop { .. } => "Stop",
        Phase::Pause { .. } => "Pause",
        Phase::Leave { .. } => "Leave",
        Phase::Finished { .. } => "Finished",
    }
}

fn short(text: &str) -> String {
    text.chars().take(160).collect()
}
