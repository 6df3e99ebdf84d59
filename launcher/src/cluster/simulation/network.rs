//! One direction of a connection: bytes come in order or not at all, and an end is seen after what was sent before it.

use std::collections::VecDeque;
use std::time::Duration;

use super::random::Random;

#[derive(Debug)]
pub struct Pipe<T> {
    sent: VecDeque<T>,
    /// When the last message that was sent is there.
    pub last_arrival: Duration,
    /// The shortest and the longest way of a message.
    pub delay: (Duration, Duration),
    /// Nothing gets through until then; it is sent again afterwards.
    pub blocked_until: Duration,
    /// Nothing more can be sent or received.
    pub closed: bool,
}

impl<T> Pipe<T> {
    pub fn new(delay: (Duration, Duration)) -> Pipe<T> {
        Pipe {
            sent: VecDeque::new(),
            last_arrival: Duration::ZERO,
            delay,
            blocked_until: Duration::ZERO,
            closed: false,
        }
    }

    /// Takes in a message; when to call [`Pipe::arrive`] for it.
    pub fn send(&mut self, message: T, now: Duration, random: &mut Random) -> Option<Duration> {
        if self.closed {
            return None;
        }
        self.sent.push_back(message);
        let way = random.between(self.delay.0, self.delay.1);
        let at = now.max(self.blocked_until).saturating_add(way);
        self.last_arrival = self.last_arrival.max(at);
        (self.last_arrival < Duration::MAX).then_some(self.last_arrival)
    }

    /// The next message, or when to ask again.
    pub fn arrive(&mut self, now: Duration) -> Result<T, Option<Duration>> {
        if now < self.blocked_until {
            let again = (self.blocked_until < Duration::MAX && !self.sent.is_empty())
                .then_some(self.blocked_until);
            return Err(again);
        }
        self.sent.pop_front().ok_or(None)
    }

    /// What is on its way is lost.
    pub fn cut(&mut self) {
        self.sent.clear();
        self.closed = true;
    }
}
