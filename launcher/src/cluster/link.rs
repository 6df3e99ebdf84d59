//! Both ends of the connection between an agent and its coordinator, over a socket or within one process.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::TcpListener;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use super::fit;
use super::key::Key;
use super::message::{FromAgent, ToAgent};
use super::tls::Tls;
use super::topology::NodeId;
use super::wire::{self, Connection, Fault, Refusal, Why, WireError};

/// Proven connections that wait for the coordinator to look at them.
const ARRIVALS: usize = 256;

/// An agent's side of its connection.
pub struct Link {
    pub to: Outbox,
    /// Ends when the connection does.
    pub from: UnboundedReceiver<ToAgent>,
}

/// Where an agent's messages go. What cannot be sent any more is dropped: the end of [`Link::from`] tells.
#[derive(Clone)]
pub enum Outbox {
    Local {
        node: NodeId,
        events: UnboundedSender<Heard>,
    },
    Remote {
        messages: UnboundedSender<FromAgent>,
        /// Bytes of output on their way.
        waiting: Arc<AtomicUsize>,
    },
}

impl Outbox {
    pub fn send(&self, message: FromAgent) {
        match self {
            Outbox::Local { node, events } => {
                let (node, local) = (*node, true);
                let _ = events.send(Heard::Said {
                    node,
                    local,
                    message,
                });
            }
            Outbox::Remote { messages, waiting } => {
                if let FromAgent::Output { batch } = &message {
                    waiting.fetch_add(batch.bytes(), Ordering::Relaxed);
                }
                let _ = messages.send(message);
            }
        }
    }

    /// Bytes of output that were sent and are not through.
    pub fn waiting(&self) -> usize {
        match self {
            Outbox::Local { .. } => 0,
            Outbox::Remote { waiting, .. } => waiting.load(Ordering::Relaxed),
        }
    }
}

impl Link {
    /// The agent's end of a proven connection. Call inside the tokio runtime.
    pub fn over(connection: Connection) -> Link {
        let Connection {
            mut sender,
            mut receiver,
        } = connection;
        let (messages, mut queue) = unbounded_channel::<FromAgent>();
        let (told, from) = unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let through = waiting.clone();
        tokio::spawn(async move {
            while let Some(message) = queue.recv().await {
                let output = match &message {
                    FromAgent::Output { batch } => batch.bytes(),
                    _ => 0,
                };
                if ship(&mut sender, message).await.is_err() {
                    return;
                }
                through.fetch_sub(output, Ordering::Relaxed);
            }
            let _ = sender.close().await;
        });
        tokio::spawn(async move {
            while let Ok(Some(message)) = receiver.recv().await {
                if told.send(message).is_err() {
                    return;
                }
            }
        });
        Link {
            to: Outbox::Remote { messages, waiting },
            from,
        }
    }
}

/// Sends a message, in pieces where it is too long for a frame: a node is never lost by what it has to say.
async fn ship(sender: &mut wire::Sender, message: FromAgent) -> Result<(), WireError> {
    let unsent = match sender.send(&message).await {
        Err(e) if matches!(e.fault, Fault::TooLong { .. } | Fault::Unencodable(_)) => e,
        done => return done,
    };
    for part in fit::fit(message, wire::MAX_FROM_AGENT) {
        match sender.send(&part).await {
            Err(e) if matches!(e.fault, Fault::TooLong { .. } | Fault::Unencodable(_)) => {
                let text = format!("warning: a message is left out: {unsent}");
                sender.send(&FromAgent::Notice { text }).await?;
            }
            done => done?,
        }
    }
    Ok(())
}

/// What the coordinator hears.
#[derive(Debug)]
pub enum Heard {
    Said {
        node: NodeId,
        local: bool,
        message: FromAgent,
    },
    Lost {
        node: NodeId,
        how: String,
    },
    /// Somebody knocked and was sent away.
    Refused(Refusal),
}

/// Somebody who has proven to have the key, or why not.
pub type Arrival = Result<Connection, Refusal>;

/// A way into a [`Hub`] for connections that did not come through its listener.
#[derive(Clone)]
pub struct Door(mpsc::Sender<ThroughDoor>);

impl Door {
    /// Waits while many others are on their way in. What it returns ends when the hub has done with the connection.
    pub async fn enter(&self, arrival: Arrival) -> oneshot::Receiver<()> {
        let (held, done) = oneshot::channel();
        let _ = self.0.send((arrival, held)).await;
        done
    }
}

/// A node's connection, as long as the hub has not done with it.
struct Peer {
    to: UnboundedSender<ToAgent>,
    /// Dropped with this, which tells whoever keeps the connection: a stream that hangs may never end by itself.
    _held: Option<oneshot::Sender<()>>,
}

/// What came through a [`Door`], and what is dropped with the connection.
type ThroughDoor = (Arrival, oneshot::Sender<()>);

/// The coordinator's end of all connections.
pub struct Hub {
    /// From agents in this process.
    heard: UnboundedReceiver<Heard>,
    events: UnboundedSender<Heard>,
    /// From the others, who wait while it is full.
    remote: (mpsc::Sender<Heard>, mpsc::Receiver<Heard>),
    arrivals: (mpsc::Sender<Arrival>, mpsc::Receiver<Arrival>),
    /// As `arrivals`, through doors.
    doors: (mpsc::Sender<ThroughDoor>, mpsc::Receiver<ThroughDoor>),
    nodes: HashMap<NodeId, Peer>,
    next: NodeId,
}

impl Hub {
    pub fn new() -> Hub {
        let (events, heard) = unbounded_channel();
        Hub {
            heard,
            events,
            remote: mpsc::channel(ARRIVALS),
            arrivals: mpsc::channel(ARRIVALS),
            doors: mpsc::channel(ARRIVALS),
            nodes: HashMap::new(),
            next: 1,
        }
    }

    /// The link of an agent in this process.
    pub fn local(&mut self) -> Link {
        let (node, from) = self.new_node(None);
        let events = self.events.clone();
        Link {
            to: Outbox::Local { node, events },
            from,
        }
    }

    fn new_node(
        &mut self,
        held: Option<oneshot::Sender<()>>,
    ) -> (NodeId, UnboundedReceiver<ToAgent>) {
        let (to, from) = unbounded_channel();
        let node = self.next;
        self.next += 1;
        self.nodes.insert(node, Peer { to, _held: held });
        (node, from)
    }

    /// Takes in whoever connects and proves to have the key. Call inside the tokio runtime.
    pub fn listen(&self, listener: TcpListener, key: Key, tls: Option<Tls>) {
        tokio::spawn(wire::serve(listener, key, tls, self.arrivals.0.clone()));
    }

    /// Where agents come in over streams of their own, such as the stdin and stdout of ssh.
    pub fn door(&self) -> Door {
        Door(self.doors.0.clone())
    }

    fn attach(&mut self, connection: Connection, held: Option<oneshot::Sender<()>>) {
        let (node, mut from) = self.new_node(held);
        let Connection {
            mut sender,
            mut receiver,
        } = connection;
        let events = self.remote.0.clone();
        tokio::spawn(async move {
            while let Some(message) = from.recv().await {
                // Several messages to one node often come together: one write for all.
                let mut queued = sender.queue(&message);
                while queued.is_ok()
                    && let Ok(message) = from.try_recv()
                {
                    queued = sender.queue(&message);
                }
                if let Err(e) = queued {
                    // The job was found to fit before it began.
                    let how = format!("a message to its agent is not sent: {e}");
                    let _ = events.send(Heard::Lost { node, how }).await;
                    return;
                }
                if sender.flush().await.is_err() {
                    return;
                }
            }
            let _ = sender.close().await;
        });
        let events = self.remote.0.clone();
        tokio::spawn(async move {
            let mut has_joined = false;
            let last = loop {
                match receiver.recv().await {
                    Ok(Some(message)) => {
                        if let FromAgent::Join(_) = &message
                            && !std::mem::replace(&mut has_joined, true)
                        {
                            // Who says what follows is known by its host.
                            let name = format!("its agent at {}", receiver.peer());
                            receiver.name_peer(&name);
                        }
                        let local = false;
                        let said = Heard::Said {
                            node,
                            local,
                            message,
                        };
                        if events.send(said).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => break Ok("its agent left".to_string()),
                    Err(e) => break Err(e),
                }
            };
            let (how, fault) = match last {
                Ok(how) => (how, None),
                Err(e) => (e.to_string(), Some(e)),
            };
            let _ = events.send(Heard::Lost { node, how }).await;
            // It has the key, so somebody may wait in vain for it to join.
            if let Some(WireError { peer, fault }) = fault
                && !has_joined
                && matches!(fault, Fault::Malformed { .. } | Fault::TooLong { .. })
            {
                let refusal = Refusal::new(&peer, Why::Misspoke(fault));
                let _ = events.send(Heard::Refused(refusal)).await;
            }
        });
    }

    /// The next thing heard. May be dropped while it waits.
    pub async fn next(&mut self) -> Heard {
        loop {
            let (arrival, held) = tokio::select! {
                biased;
                Some(heard) = self.heard.recv() => return self.noted(heard),
                Some(heard) = self.remote.1.recv() => return self.noted(heard),
                Some((arrival, held)) = self.doors.1.recv() => (arrival, Some(held)),
                Some(arrival) = self.arrivals.1.recv() => (arrival, None),
            };
            match arrival {
                Ok(connection) => self.attach(connection, held),
                Err(refusal) => return Heard::Refused(refusal),
            }
        }
    }

    fn noted(&mut self, heard: Heard) -> Heard {
        if let Heard::Lost { node, .. } = &heard {
            self.drop(*node);
        }
        heard
    }

    /// To a node that is gone: nowhere.
    pub fn send(&self, node: NodeId, message: ToAgent) {
        if let Some(peer) = self.nodes.get(&node) {
            let _ = peer.to.send(message);
        }
    }

    /// Closes a connection once all that was sent is through.
    pub fn drop(&mut self, node: NodeId) {
        self.nodes.remove(&node);
    }
}

impl Default for Hub {
    fn default() -> Hub {
        Hub::new()
    }
}

#[cfg(test)]
mod tests;
