//! Both ends of the connection between an agent and its coordinator, over a socket or within one process.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::TcpListener;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::key::Key;
use super::message::{FromAgent, ToAgent};
use super::tls::Tls;
use super::topology::NodeId;
use super::wire::{self, Connection, Refusal};

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
                if sender.send(&message).await.is_err() {
                    return;
                }
                if let FromAgent::Output { batch } = &message {
                    through.fetch_sub(batch.bytes(), Ordering::Relaxed);
                }
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

type Arrival = Result<Connection, Refusal>;

/// A way into a [`Hub`] for connections that did not come through its listener.
#[derive(Clone)]
pub struct Door(mpsc::Sender<Arrival>);

impl Door {
    /// Waits while many others are on their way in.
    pub async fn enter(&self, arrival: Arrival) {
        let _ = self.0.send(arrival).await;
    }
}

/// The coordinator's end of all connections.
pub struct Hub {
    heard: UnboundedReceiver<Heard>,
    events: UnboundedSender<Heard>,
    arrivals: (mpsc::Sender<Arrival>, mpsc::Receiver<Arrival>),
    nodes: HashMap<NodeId, UnboundedSender<ToAgent>>,
    next: NodeId,
}

impl Hub {
    pub fn new() -> Hub {
        let (events, heard) = unbounded_channel();
        Hub {
            heard,
            events,
            arrivals: mpsc::channel(ARRIVALS),
            nodes: HashMap::new(),
            next: 1,
        }
    }

    /// The link of an agent in this process.
    pub fn local(&mut self) -> Link {
        let (node, from) = self.new_node();
        let events = self.events.clone();
        Link {
            to: Outbox::Local { node, events },
            from,
        }
    }

    fn new_node(&mut self) -> (NodeId, UnboundedReceiver<ToAgent>) {
        let (to, from) = unbounded_channel();
        let node = self.next;
        self.next += 1;
        self.nodes.insert(node, to);
        (node, from)
    }

    /// Takes in whoever connects and proves to have the key. Call inside the tokio runtime.
    pub fn listen(&self, listener: TcpListener, key: Key, tls: Option<Tls>) {
        tokio::spawn(wire::serve(listener, key, tls, self.arrivals.0.clone()));
    }

    /// Where agents come in over streams of their own, such as the stdin and stdout of ssh.
    pub fn door(&self) -> Door {
        Door(self.arrivals.0.clone())
    }

    fn attach(&mut self, connection: Connection) {
        let (node, mut from) = self.new_node();
        let Connection {
            mut sender,
            mut receiver,
        } = connection;
        tokio::spawn(async move {
            while let Some(message) = from.recv().await {
                // Several messages to one node often come together: one write for all.
                let mut ok = sender.queue(&message).is_ok();
                while ok && let Ok(message) = from.try_recv() {
                    ok = sender.queue(&message).is_ok();
                }
                if !ok || sender.flush().await.is_err() {
                    return;
                }
            }
            let _ = sender.close().await;
        });
        let events = self.events.clone();
        tokio::spawn(async move {
            let how = loop {
                match receiver.recv().await {
                    Ok(Some(message)) => {
                        let local = false;
                        if events
                            .send(Heard::Said {
                                node,
                                local,
                                message,
                            })
                            .is_err()
                        {
                            return;
                        }
                    }
                    Ok(None) => break "its agent left".to_string(),
                    Err(e) => break e.to_string(),
                }
            };
            let _ = events.send(Heard::Lost { node, how });
        });
    }

    /// The next thing heard. May be dropped while it waits.
    pub async fn next(&mut self) -> Heard {
        loop {
            tokio::select! {
                biased;
                Some(heard) = self.heard.recv() => return heard,
                Some(arrival) = self.arrivals.1.recv() => match arrival {
                    Ok(connection) => self.attach(connection),
                    Err(refusal) => return Heard::Refused(refusal),
                },
            }
        }
    }

    /// To a node that is gone: nowhere.
    pub fn send(&self, node: NodeId, message: ToAgent) {
        if let Some(to) = self.nodes.get(&node) {
            let _ = to.send(message);
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
