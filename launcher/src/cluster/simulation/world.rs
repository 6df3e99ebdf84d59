//! The machines, their processes and the network between them, on a clock of their own.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::agent::{Agent, Effect, Input};
use super::network::Pipe;
use super::plan::{Expected, Fault, How, Plan};
use super::random::Random;
use crate::blame::LOST_PEER;
use crate::cluster::coordinator::{self, Action, Ending, Event, FENCE, State};
use crate::cluster::message::{FromAgent, LEASE, ToAgent};
use crate::end::End;
use crate::supervisor;
use tsm_job::exit;
use tsm_job::message::FailureRecord;

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
    endings: Vec<Ending>,
    starts: u32,
    pub code: Option<i32>,
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
            endings: Vec::new(),
            starts: 0,
            code: None,
            broken: Vec::new(),
            story: VecDeque::new(),
            plan,
        };
        for i in 0..world.plan.num_nodes {
            let local = i == 0 && world.plan.local;
            let at = if local { ZERO } else { world.random.ms(0, 30) };
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
        let preempts = self.plan.saves && self.state.phase == coordinator::Phase::Run;
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
        let actions = coordinator::decide(&mut self.state, event, self.now);
        for action in actions {
            self.act(action);
        }
        if let Some(code) = self.state.finished() {
            self.tell(format!("the coordinator ends with {code}"));
            self.code = Some(code);
            self.stop_coordinator();
        }
        self.arm_coordinator();
    }

    fn stop_coordinator(&mut self) {
        self.coordinator_up = false;
        for n in 0..self.nodes.len() {
            if self.nodes[n].local {
                if self.code.is_some() && self.nodes[n].ranks.iter().any(|&r| self.ranks[r].alive) {
                    self.fault("the launcher ends before ranks of its own".into());
                }
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
                self.endings.push(*ending);
            }
            Action::Notice(text) => self.tell(format!("notice: {text}")),
            Action::Record { .. } | Action::Show(_) | Action::Environment(_) => {}
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

    // The ranks.

    fn rank_of(&self, n: usize, local: usize) -> Option<usize> {
        self.nodes[n]
            .ranks
            .iter()
            .copied()
            .find(|&r| self.ranks[r].local == local)
    }

    fn spawn(&mut self, n: usize, start: &crate::cluster::message::Start) {
        let generation = start.generation;
        let other = self
            .ranks
            .iter()
            .find(|r| r.alive && !r.dying && r.generation != generation);
        if let Some(other) = other {
            let text = format!(
                "rank {} of generation {} runs on node {} when generation {generation} starts on node {n}",
                other.number, other.generation, other.node
            );
            self.fault(text);
        }
        self.tell(format!("node {n} starts ranks of generation {generation}"));
        self.nodes[n].ranks.clear();
        for local in 0..start.num_ranks as usize {
            let r = self.ranks.len();
            let grace = self.plan.grace;
            let stubborn = self.plan.stubborn && self.random.chance(20);
            let in_time = |random: &mut Random| random.between(ZERO, grace.mul_f32(0.9));
            let (ends_in, saves_in) = (in_time(&mut self.random), in_time(&mut self.random));
            self.ranks.push(Rank {
                node: n,
                local,
                number: start.first_rank + local as u32,
                generation,
                alive: true,
                hung: false,
                step: 0,
                ends_in: (!stubborn).then_some(ends_in),
                saves_in: (!stubborn).then_some(saves_in),
                failed: false,
                dying: false,
            });
            self.nodes[n].ranks.push(r);
            let at = self.now + self.random.ms(10, 200);
            self.at(at, What::Rank(r, Do::Step(1)));
        }
    }

    fn signal_rank(&mut self, n: usize, local: usize, signal: i32) {
        let Some(r) = self.rank_of(n, local) else {
            return;
        };
        let (rank, saves) = (&self.ranks[r], self.plan.saves);
        let (wait, end) = match signal {
            libc::SIGUSR1 => return,
            libc::SIGUSR2 if !saves => return,
            libc::SIGUSR2 => (rank.saves_in, End::Code(exit::REQUEUE)),
            _ => (rank.ends_in, End::Signal(signal)),
        };
        // One that hangs does not get to its next step, where it would save.
        let wait = wait.filter(|_| signal != libc::SIGUSR2 || !rank.hung);
        if let Some(wait) = wait {
            self.at(self.now + wait, What::Rank(r, Do::End(end)));
        }
    }

    fn rank_does(&mut self, r: usize, what: Do) {
        if !self.ranks[r].alive {
            return;
        }
        let (n, local, generation) = (
            self.ranks[r].node,
            self.ranks[r].local,
            self.ranks[r].generation,
        );
        match what {
            Do::Step(step) => self.step(r, step),
            Do::Leave => self.wake(n, Input::Ranks(supervisor::Event::Left { rank: local })),
            Do::Announce(code) => {
                let record = FailureRecord {
                    rank: local as u32,
                    step: None,
                    code,
                    cause: "error".into(),
                    message: "no such file".into(),
                    backtrace: None,
                };
                let rank = local;
                self.wake(n, Input::Ranks(supervisor::Event::Failing { rank, record }));
                self.ranks[r].failed = true;
                self.peers_notice(generation);
            }
            Do::Notice if self.ranks[r].failed => {}
            Do::End(_) if self.ranks[r].dying => {}
            Do::Gone(end) => self.end_rank(r, end),
            Do::Notice => {
                let words = LOST_PEER[self.random.below(LOST_PEER.len())];
                let end = match self.random.below(5) {
                    0 => {
                        let text = format!("[3] {words} 10.0.0.2");
                        self.wake(n, Input::Words { local, text });
                        End::Signal(libc::SIGABRT)
                    }
                    // Some programs tell nothing.
                    1 => End::Code(1),
                    _ => End::Code(exit::PEER),
                };
                self.end_rank(r, end);
            }
            Do::End(end) => self.end_rank(r, end),
        }
    }

    fn end_rank(&mut self, r: usize, end: End) {
        let rank = &mut self.ranks[r];
        rank.alive = false;
        rank.failed |= !end.is_success() && end != End::Code(exit::REQUEUE);
        let (n, local, generation, failed) = (rank.node, rank.local, rank.generation, rank.failed);
        self.tell(format!("rank {} on node {n}: {end}", self.ranks[r].number));
        if failed {
            self.peers_notice(generation);
        }
        // Its sockets are closed before its end can be seen.
        if !self.ranks[r].dying {
            self.wake(n, Input::Ranks(supervisor::Event::Left { rank: local }));
        }
        let ended = supervisor::Event::Ended { rank: local, end };
        let at = self.now + self.random.ms(0, 5);
        self.at(at, What::Input(n, Input::Ranks(ended)));
    }

    /// Others lose a connection to it, if they happen to use it.
    fn peers_notice(&mut self, generation: u32) {
        for r in 0..self.ranks.len() {
            if self.ranks[r].generation == generation && self.ranks[r].alive && !self.ranks[r].hung
            {
                let at = self.now + self.random.ms(40, 400);
                if self.random.chance(50) {
                    self.at(at, What::Rank(r, Do::Notice));
                }
            }
        }
    }

    fn step(&mut self, r: usize, step: u64) {
        let (generation, n) = (self.ranks[r].generation, self.ranks[r].node);
        let world_size = self.state.world_size() as usize;
        let of = || self.ranks.iter().filter(|x| x.generation == generation);
        // Data parallel: nobody is more than a step ahead.
        let together = of().count() >= world_size
            && of().all(|x| !x.failed && (x.step + 1 >= step || !x.alive));
        let waits = self.ranks[r].hung || self.ranks[r].dying;
        if waits || !together {
            let at = self.now + MS(50);
            // A rank that is alone waits until it is told to end.
            if at < END {
                self.at(at, What::Rank(r, Do::Step(step)));
            }
            return;
        }
        self.ranks[r].step = step;
        let saved = self.ranks[r].number == 0 && step.is_multiple_of(10);
        let local = self.ranks[r].local;
        // Every start goes on where the last one stopped.
        let step = step + 1000 * u64::from(generation);
        self.wake(n, Input::Stepped { local, step, saved });
        let next = self.ranks[r].step + 1;
        if next > self.plan.steps {
            let at = self.now + self.random.ms(0, 30);
            self.at(at, What::Rank(r, Do::End(End::Code(0))));
        } else {
            let at = self.now + self.random.between(self.plan.period / 2, self.plan.period);
            self.at(at, What::Rank(r, Do::Step(next)));
        }
    }

    // What goes wrong.

    fn pick_node(&self, pick: usize) -> Option<usize> {
        let here = |n: &usize| self.nodes[*n].agent.is_some() && !self.nodes[*n].local;
        let nodes: Vec<usize> = (0..self.nodes.len()).filter(here).collect();
        (!nodes.is_empty()).then(|| nodes[pick % nodes.len()])
    }

    fn pick_rank(&self, pick: usize) -> Option<usize> {
        let ranks: Vec<usize> = (0..self.ranks.len())
            .filter(|&r| self.ranks[r].alive)
            .collect();
        (!ranks.is_empty()).then(|| ranks[pick % ranks.len()])
    }

    fn expect(&mut self, expected: Expected) {
        let running = self.state.phase == coordinator::Phase::Run;
        let whole = self.ranks.iter().filter(|r| r.alive).count() as u32;
        if running && self.expected.is_none() && whole == self.state.world_size() {
            self.expected = Some(expected);
        }
    }

    fn expect_node(&mut self, n: usize) {
        if self.nodes[n].ranks.iter().any(|&r| self.ranks[r].alive) {
            let host = self.nodes[n].host.clone();
            self.expect(Expected::Node(host));
        }
    }

    fn inject(&mut self, fault: Fault) {
        if !self.coordinator_up {
            return;
        }
        self.tell(format!("FAULT {fault:?}"));
        match fault {
            Fault::RankEnds(pick, how) => {
                let Some(r) = self.pick_rank(pick) else {
                    return;
                };
                let number = self.ranks[r].number;
                let code = match how {
                    How::Plain(end) | How::Left(_, end) => end.exit_code(),
                    How::Announced(code, ..) => code,
                };
                self.expect(Expected::Rank(number, code));
                match how {
                    How::Plain(end) => self.rank_does(r, Do::End(end)),
                    How::Announced(code, end) => {
                        self.rank_does(r, Do::Announce(code));
                        match end {
                            Some(after) => {
                                let end = End::Code(code);
                                self.at(self.now + after, What::Rank(r, Do::End(end)));
                            }
                            None => self.ranks[r].hung = true,
                        }
                    }
                    How::Left(after, end) => {
                        self.ranks[r].failed = true;
                        self.rank_does(r, Do::Leave);
                        let generation = self.ranks[r].generation;
                        self.ranks[r].dying = true;
                        self.peers_notice(generation);
                        self.at(self.now + after, What::Rank(r, Do::Gone(end)));
                    }
                }
            }
            Fault::RankHangs(pick) => {
                if let Some(r) = self.pick_rank(pick) {
                    let (number, step) = (self.ranks[r].number, self.ranks[r].step);
                    // Before its first step nobody can tell.
                    self.ranks[r].hung = step > 0;
                    // At its very end nobody waits for it any more.
                    if step > 0 && step + 3 < self.plan.steps {
                        self.expect(Expected::Late(number));
                    }
                }
            }
            Fault::AgentKilled(pick) => {
                if let Some(n) = self.pick_node(pick) {
                    self.expect_node(n);
                    self.end_agent(n);
                    self.will_notice(n);
                }
            }
            Fault::MachineDown(pick) => {
                if let Some(n) = self.pick_node(pick) {
                    self.expect_node(n);
                    self.nodes[n].agent = None;
                    self.kill_all(n);
                    self.nodes[n].up.cut();
                    self.nodes[n].down.cut();
                    self.will_notice(n);
                }
            }
            Fault::AgentStopped(pick, time) => {
                if let Some(n) = self.pick_node(pick) {
                    self.nodes[n].stopped_until = self.now + time;
                    self.at(self.now + time, What::AgentContinues(n));
                    if time > LEASE + MARGIN {
                        self.expect_node(n);
                        self.will_notice(n);
                    }
                }
            }
            Fault::Partition {
                node,
                up,
                down,
                time,
            } => {
                if let Some(n) = self.pick_node(node) {
                    let until = time.map_or(Duration::MAX, |t| self.now + t);
                    if up {
                        self.nodes[n].up.blocked_until = until;
                    }
                    if down {
                        self.nodes[n].down.blocked_until = until;
                    }
                    if time.is_none() && (up || down) {
                        self.expect_node(n);
                    }
                    if up && time.is_none_or(|t| t > LEASE + MARGIN) {
                        self.will_notice(n);
                    }
                }
            }
            Fault::Cut(pick) => {
                if let Some(n) = self.pick_node(pick) {
                    self.expect_node(n);
                    let node = n as u64 + 1;
                    self.nodes[n].up.cut();
                    self.nodes[n].down.cut();
                    let how = "connection reset".into();
                    self.coordinator(Event::Lost { node, how });
                    let at = self.now + self.random.ms(0, 10);
                    self.at(at, What::Input(n, Input::Closed));
                }
            }
            Fault::Slow(pick, delay) => {
                if let Some(n) = self.pick_node(pick) {
                    self.nodes[n].up.delay = (ZERO, delay);
                    self.nodes[n].down.delay = (ZERO, delay);
                }
            }
            Fault::CoordinatorStopped(time) => {
                self.coordinator_stopped_until = self.now + time;
                self.at(self.now + time, What::CoordinatorContinues);
                for n in 0..self.nodes.len() {
                    if self.nodes[n].local {
                        self.at(self.now + time, What::AgentContinues(n));
                    }
                }
            }
            Fault::CoordinatorKilled => self.stop_coordinator(),
            Fault::Signal(signal) => self.coordinator(Event::Signal(signal)),
            Fault::NodeSignal(pick, signal) => {
                if let Some(n) = self.pick_node(pick) {
                    self.wake(n, Input::Signal(signal));
                }
            }
            Fault::Arrives(again) => {
                let host = match again {
                    Some(pick) => self.nodes[pick % self.nodes.len()].host.clone(),
                    None => format!("n{}", self.nodes.len()),
                };
                self.add_node(&host, false, self.now);
            }
            Fault::Broken(pick) => {
                let n = pick % self.nodes.len();
                self.nodes[n].broken = true;
                if let Some(agent) = &mut self.nodes[n].agent {
                    agent.broken = true;
                }
            }
            Fault::Mute(pick) => {
                let n = pick % self.nodes.len();
                self.nodes[n].mute = true;
                if let Some(agent) = &mut self.nodes[n].agent {
                    agent.mute = true;
                }
            }
        }
    }

    fn will_notice(&mut self, n: usize) {
        let way = self.nodes[n].up.delay.1;
        self.at(self.now + LEASE + MARGIN + way, What::Noticed(n));
    }

    // What must hold in the end.

    fn check_end(&mut self) {
        let agents = (0..self.nodes.len()).find(|&n| self.nodes[n].agent.is_some());
        if let Some(n) = agents {
            self.fault(format!("the agent of node {n} does not end"));
        }
        if let Some(rank) = self.ranks.iter().find(|r| r.alive) {
            let text = format!("rank {} on node {} does not end", rank.number, rank.node);
            self.fault(text);
        }
        let Some(code) = self.code else {
            if self.coordinator_up {
                let text = format!("the coordinator does not finish: {:?}", self.state.phase);
                self.fault(text);
            }
            return;
        };
        self.check_code(code);
        self.check_restarts();
        self.check_blame(code);
    }

    fn check_code(&mut self, code: i32) {
        let signals = [1, 2, 15, libc::SIGUSR2].map(|s| exit::SIGNAL_BASE + s);
        let of_rank = |e: &Ending| e.ends.iter().flatten().any(|end| end.exit_code() == code);
        let known = [
            exit::OK,
            exit::PREFLIGHT,
            exit::REQUEUE,
            exit::PEER,
            exit::DO_NOT_REQUEUE,
        ];
        let announced = self.plan.announces(code);
        if !known.contains(&code)
            && !signals.contains(&code)
            && !announced
            && !self.endings.iter().any(of_rank)
        {
            self.fault(format!(
                "exit code {code} is none of a rank, and not documented"
            ));
        }
        if self.plan.faults.is_empty() && code != exit::OK {
            self.fault(format!("nothing went wrong, and the exit code is {code}"));
        }
        let succeeded = self
            .endings
            .last()
            .is_some_and(|e| e.ends.iter().all(|end| *end == Some(End::Code(0))));
        if code == exit::OK && !succeeded {
            self.fault("exit code 0 without success".into());
        }
    }

    fn check_restarts(&mut self) {
        let (mut left, mut newest) = (self.plan.restarts, 0);
        for ending in self.endings.clone() {
            if ending.checkpoint_step.is_some_and(|step| step > newest) {
                newest = ending.checkpoint_step.unwrap_or(0);
                left = self.plan.restarts;
            }
            if ending.again && ending.outcome == "failed" {
                match left.checked_sub(1) {
                    Some(less) => left = less,
                    None => return self.fault("more restarts than were allowed".into()),
                }
            }
        }
        if self.starts as usize != self.endings.len() {
            let text = format!("{} starts, {} ends", self.starts, self.endings.len());
            self.fault(text);
        }
    }

    /// Where only one thing went wrong, that is the first failure.
    fn check_blame(&mut self, code: i32) {
        let Some(expected) = self.expected.clone().filter(|_| self.plan.is_single()) else {
            return;
        };
        let failure = self
            .endings
            .first()
            .and_then(|e| e.failure.as_ref())
            .map(|f| (f.rank, f.host.clone(), f.late.clone()));
        let right = match (&expected, &failure) {
            (Expected::Rank(number, _), Some((rank, _, late))) => {
                *rank == Some(*number as usize) && late.is_empty()
            }
            (Expected::Node(host), Some((rank, named, _))) => rank.is_none() && named == host,
            (Expected::Late(number), Some((_, _, late))) => *late == [*number as usize],
            // The work was done before anybody had to notice.
            (Expected::Node(_) | Expected::Late(_), None) if code == exit::OK => return,
            (_, None) => false,
        };
        if !right {
            self.fault(format!(
                "{expected:?} was the first failure, {failure:?} is named"
            ));
        }
        let own = match expected {
            Expected::Rank(_, code) => code,
            Expected::Node(_) | Expected::Late(_) => exit::PEER,
        };
        if self.plan.restarts == 0 && code != own {
            self.fault(format!("the exit code is {code}, not {own}"));
        }
    }
}

fn short(text: &str) -> String {
    text.chars().take(160).collect()
}

/// Longer than any fence.
const _: () = assert!(END.as_secs() > (LEASE.as_secs() + FENCE.as_secs()) * 10);
