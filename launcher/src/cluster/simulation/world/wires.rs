//! Messages on their way between the coordinator and the agents.

use super::*;

impl World {
    pub(super) fn send_down(&mut self, n: usize, packet: Packet<ToAgent>) {
        let at = self.nodes[n].down.send(packet, self.now, &mut self.random);
        if let Some(at) = at {
            self.at(at, What::Down(n));
        }
    }

    pub(super) fn send_up(&mut self, n: usize, packet: Packet<FromAgent>) {
        let at = self.nodes[n].up.send(packet, self.now, &mut self.random);
        if let Some(at) = at {
            self.at(at, What::Up(n));
        }
    }

    pub(super) fn arrives_up(&mut self, n: usize) {
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

    pub(super) fn arrives_down(&mut self, n: usize) {
        match self.nodes[n].down.arrive(self.now) {
            Ok(Packet::Message(message)) => self.wake(n, Input::Message(*message)),
            Ok(Packet::Closed) => self.wake(n, Input::Closed),
            Err(Some(again)) => self.at(again, What::Down(n)),
            Err(None) => {}
        }
    }
}
