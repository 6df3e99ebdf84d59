//! Who has sent a signal to the job, and what is meant by it: SLURM has one for many things, and is asked.

use tokio::sync::oneshot;

use crate::cluster::coordinator::{Event, Reason};
use crate::cluster::message::FromAgent;
use crate::limits;
use crate::signals::Caught;
use crate::start::slurm::{StopCause, Turn, step};

#[derive(Default)]
pub(super) struct Senders {
    /// The last signal to this process that another one sent, and which.
    last: Option<(i32, String)>,
    /// SLURM is being asked why it stops the job.
    asking: Option<oneshot::Receiver<StopCause>>,
    stopped: Option<StopCause>,
}

impl Senders {
    /// A signal to this process.
    pub fn caught(&mut self, caught: Caught) -> Event {
        let Caught { signal, sender } = caught;
        self.last = caught.by().map(|by| (signal, by));
        match step::is_sent_to_all(sender) {
            true => Event::StepSignal(signal),
            false => Event::Signal(signal),
        }
    }

    /// Whether `event` is a SIGTERM of which SLURM has to say the meaning: then [`Senders::answer`] has it.
    pub fn ask_about(&mut self, event: &Event, turn: &Turn) -> bool {
        let is_term = match event {
            Event::Signal(signal) | Event::StepSignal(signal) => *signal == libc::SIGTERM,
            Event::Said {
                message: FromAgent::Signal { signal } | FromAgent::StepSignal { signal },
                ..
            } => *signal == libc::SIGTERM,
            _ => false,
        };
        if !is_term || self.stopped.is_some() {
            return false;
        }
        if self.asking.is_none() {
            let (answer, asking) = oneshot::channel();
            let ask = turn.asker();
            limits::beside("ask", move || {
                let _ = answer.send(ask());
            });
            self.asking = Some(asking);
        }
        true
    }

    /// Waits for what SLURM says. May be dropped and called again.
    pub async fn answer(&mut self) -> StopCause {
        let cause = match &mut self.asking {
            Some(asking) => asking.await.unwrap_or(StopCause::Other),
            None => std::future::pending().await,
        };
        self.asking = None;
        self.stopped = Some(cause);
        cause
    }

    /// Why SLURM stopped the job, where it did.
    pub fn stopped(&self) -> Option<StopCause> {
        self.stopped
    }

    /// Who is behind the end of a job, where it was a signal.
    pub fn behind(&self, reason: &Reason) -> Option<String> {
        match (reason, &self.last, self.stopped) {
            (Reason::Signal { .. }, _, Some(cause)) => cause.describe().map(String::from),
            (Reason::Signal { signal, place }, Some((sent, by)), _)
                if signal == sent && place.is_empty() =>
            {
                Some(by.clone())
            }
            _ => None,
        }
    }
}

/// The signal to the job that SLURM's SIGTERM stands for.
pub(super) fn meaning(cause: StopCause) -> Event {
    match cause {
        // The job is to go on later.
        StopCause::Preempted { .. } | StopCause::TimeLimit | StopCause::Requeued => {
            Event::Signal(libc::SIGUSR2)
        }
        StopCause::Cancelled | StopCause::Other => Event::Signal(libc::SIGTERM),
    }
}
