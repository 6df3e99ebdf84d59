//! What a job does next. Pure: no clock, no socket, no process.
//!
//! ```text
//! Gather --enough nodes--> Form --addresses known--> Run --a rank or node failed, a signal--> Stop
//!   ^ ^                     \--full preflight--> Measure --all is well--> Run
//!   | \--without the bad node--------------------/    \--all ended well--> Leave --> Finished
//!   \--start again (after a pause: Pause)-- what became of it <-- all nodes clean, or lost and fenced
//! ```
//!
//! A **generation** is one start of all ranks. The next one starts only when every node of the last has
//! said that it is clean, or is lost and its lease has run out: its agent, or the guard beside it, has then
//! killed its ranks. So no two generations ever run at once; and the coordinator finishes no sooner, so that a
//! job which is queued again does not find ranks of this one.

mod comparing;
mod ending;
mod forming;
mod hearing;
mod joining;
mod left_out;
mod losing;
mod measuring;
mod member;
mod passing;
mod phases;
mod reason;
mod rounds;
mod running;
mod stopping;
mod surface;
mod telling;
mod trying;
mod view;
mod waiting;

pub use ending::Ending;
pub use left_out::Excluded;
pub use losing::NOT_RUNNING;
pub use member::{Clock, Node};
pub use phases::Phase;
pub use reason::Reason;
pub use rounds::Report;
pub use surface::{Action, Event, Job, Launched, Settings, Spawned};

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::message::{Join, NodeReport};
use super::policy;
pub use super::topology::Member;
use super::topology::NodeId;
use crate::doctor::preflight::OwnNode;
use crate::hang::progress::Tracker;
use crate::report::Place;
use crate::status::Restart;
use crate::supervisor::Rank;
use losing::LostNode;
use stopping::Cause;
use surface::{dismiss, record, send};

/// An agent that reserves a port and probes has done so within this time.
const FORM: Duration = Duration::from_secs(10);
/// Agents that were told to leave are gone within this time.
const LEAVE: Duration = Duration::from_secs(3);
/// After its lease a lost node's ranks are gone: its agent kills them, or the guard does a little later.
pub const FENCE: Duration = Duration::from_millis(500);
/// A wait at the end that is longer is explained.
const MOMENT: Duration = Duration::from_millis(500);
/// Time beyond two graces in which an agent must report: the kernel ends processes in 5 s, or they are named, and a slow
/// disk takes the rest of the output in 15 s, or it is lost.
const REPORT: Duration = Duration::from_secs(30);
/// Between two looks for hangs and stragglers.
const LOOK: Duration = Duration::from_secs(1);
/// How long ranks may take to tell what they hang in.
const INSPECT: Duration = Duration::from_secs(20);

/// Everything the coordinator knows.
#[derive(Clone, Debug)]
pub struct State {
    pub settings: Settings,
    pub phase: Phase,
    /// Those that have joined, and are connected.
    nodes: BTreeMap<NodeId, Node>,
    /// Nodes of the current generation that are not connected any more.
    gone: BTreeMap<NodeId, Node>,
    /// Nodes of the current generation, in order of node rank.
    pub members: Vec<Member>,
    /// Node ids by node rank of the last generation.
    places: Vec<NodeId>,
    /// Number of the current start, or of the next one.
    pub generation: u32,
    /// How often nodes were chosen.
    attempt: u32,
    pub started_at: Duration,
    cause: Option<Cause>,
    /// Who wants the job, or this generation, to end.
    asked: Option<Reason>,
    passing: passing::Passing,
    /// Where Ctrl-C was pressed in this generation.
    interrupted: Vec<String>,
    /// Before the next start.
    pause: Duration,
    reports: BTreeMap<NodeId, NodeReport>,
    /// The first ranks of reports that come in several messages.
    parts: BTreeMap<NodeId, Vec<(Rank, Place)>>,
    lost: Vec<LostNode>,
    /// Until when the ranks of lost nodes may still run.
    fence: Duration,
    /// Whom it waits for, and what is known of them.
    waiting: waiting::Waiting,
    /// What each node reached of the first node, by (first, other).
    reach: BTreeMap<(NodeId, NodeId), Vec<(IpAddr, String)>>,
    /// What ended the earlier starts.
    incidents: Vec<policy::Incident>,
    /// Hosts that get no ranks for what happened in earlier starts.
    left_out: Vec<policy::LeftOut>,
    /// Likewise, for what was measured.
    convicted: Vec<policy::LeftOut>,
    /// Nodes that got ranks together, which later ones are compared with.
    compared: Vec<Join>,
    /// Nodes that were measured and are well.
    measured: BTreeMap<NodeId, OwnNode>,
    trying: trying::Trying,
    /// The spares are measured too, to tell who is to blame; once in a generation.
    is_wide: bool,
    was_wide: bool,
    /// Warnings that were said.
    warned: BTreeSet<String>,
    pub restarts: Vec<Restart>,
    progress: BTreeMap<u32, view::Rank>,
    metrics: BTreeMap<String, f64>,
    /// Nothing is started after this generation.
    last: bool,
    /// Exit code for workers that could not be started, and why they could not.
    refusal: Option<(i32, String)>,
    /// Rank 0's step at its last checkpoint in this generation.
    checkpoint_step: Option<u64>,
    /// The newest checkpoint of the generations before, until this one has shown that it goes on from there.
    goes_on_from: Option<u64>,
    /// First and last step of this generation.
    steps: Option<(u64, u64)>,
    /// Answers about what hanging ranks do, and how many are still to come.
    inspection: Option<Inspection>,
    /// No lease runs out before this. It is not moved by every beat: with thousands of nodes that would be all the
    /// coordinator does.
    next_lease: Option<Duration>,
    /// Progress of the ranks of this generation.
    watch: Tracker,
    next_look: Duration,
    /// The last time that the coordinator was found not to have run.
    stalled: Option<losing::Stall>,
}

#[derive(Clone, Debug, Default)]
struct Inspection {
    late: Vec<u32>,
    looks: Vec<crate::hang::report::Inspection>,
    ras: Option<crate::hang::ras::Answer>,
    waiting: Vec<NodeId>,
    found: Duration,
    deadline: Duration,
}

impl State {
    pub fn new(settings: Settings, now: Duration) -> State {
        let deadline = now + settings.join;
        State {
            watch: Tracker::new(0, settings.hang.clone(), now),
            next_look: Duration::ZERO,
            settings,
            phase: Phase::Gather {
                deadline,
                last_call: None,
            },
            nodes: BTreeMap::new(),
            gone: BTreeMap::new(),
            members: Vec::new(),
            places: Vec::new(),
            generation: 0,
            attempt: 0,
            started_at: now,
            cause: None,
            asked: None,
            passing: passing::Passing::default(),
            interrupted: Vec::new(),
            pause: Duration::ZERO,
            reports: BTreeMap::new(),
            parts: BTreeMap::new(),
            lost: Vec::new(),
            fence: Duration::ZERO,
            waiting: waiting::Waiting::begin(now),
            reach: BTreeMap::new(),
            incidents: Vec::new(),
            left_out: Vec::new(),
            convicted: Vec::new(),
            compared: Vec::new(),
            measured: BTreeMap::new(),
            trying: trying::Trying::default(),
            is_wide: false,
            was_wide: false,
            warned: BTreeSet::new(),
            restarts: Vec::new(),
            progress: BTreeMap::new(),
            metrics: BTreeMap::new(),
            last: false,
            refusal: None,
            checkpoint_step: None,
            goes_on_from: None,
            steps: None,
            inspection: None,
            stalled: None,
            next_lease: None,
        }
    }

    /// First and last finished step of this generation.
    pub fn steps(&self) -> Option<(u64, u64)> {
        self.steps
    }

    pub fn world_size(&self) -> u32 {
        self.members.last().map_or(0, |m| m.ranks.end)
    }
}

/// Takes in one event and says what to do about it. `now` counts from the start of the launcher and never goes back.
pub fn decide(state: &mut State, event: Event, now: Duration) -> Vec<Action> {
    let mut actions = Vec::new();
    if state.finished().is_some() {
        return actions;
    }
    match event {
        Event::Said {
            node,
            local,
            message,
        } => state.said(node, local, message, now, &mut actions),
        Event::Lost { node, how } => state.lost_connection(node, &how, now, &mut actions),
        Event::Starter { host, line } => state.waiting.heard(host, &line),
        Event::StarterKilled { host, killed } => state.starter_killed(host, killed, now),
        Event::Signal(signal) => state.signal(signal, "", now, &mut actions),
        Event::StepSignal(signal) => state.step_signal(signal, "", now, &mut actions),
        Event::Stalled { host, time } => state.stalled(&host, time, now, &mut actions),
        Event::Deadline => state.expired(now, &mut actions),
    }
    state.advance(now, &mut actions);
    actions
}

impl State {
    /// A node that is connected, or was when this generation started.
    fn known(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id).or_else(|| self.gone.get(&id))
    }

    #[cfg(test)]
    pub(in crate::cluster) fn is_connected(&self, id: NodeId) -> bool {
        self.nodes.contains_key(&id)
    }

    fn member(&self, id: NodeId) -> Option<&Member> {
        self.members.iter().find(|m| m.id == id)
    }

    /// The host that has this address, where it has joined. `peer` may have a port.
    pub fn host_at(&self, peer: &str) -> Option<&str> {
        let ip = match peer.parse::<SocketAddr>() {
            Ok(address) => address.ip(),
            Err(_) => peer.parse::<IpAddr>().ok()?,
        };
        let ip = ip.to_canonical();
        let has = |node: &&Node| node.join.addresses.iter().any(|(own, _)| *own == ip);
        let mut here = self.nodes.values().chain(self.gone.values()).filter(has);
        here.next().map(|node| node.join.host.as_str())
    }

    fn host(&self, id: NodeId) -> &str {
        self.known(id).map_or("a lost node", |n| &n.join.host)
    }
}

/// `1 node`, `2 nodes`.
fn nodes(number: usize) -> String {
    crate::text::count(number, "node")
}

#[cfg(test)]
pub(crate) mod tests;
