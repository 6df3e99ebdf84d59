//! Signalling many workers without being put off the core by the first of them.

use libc::{SCHED_FIFO, SCHED_OTHER, SCHED_RESET_ON_FORK, c_int, sched_param};

/// While it lives, this thread runs before all that are scheduled as usual. A worker that is woken by its signal
/// otherwise takes the core of the one who sends, and the last of 64 hears 3 to 7 ms later on two cores (0.3 ms this way).
///
/// Needs root, `CAP_SYS_NICE` or a limit of real-time priority (`ulimit -r`), and is without effect elsewhere.
/// Not for more than the sending: nobody else gets this core meanwhile.
pub struct Ahead(());

impl Ahead {
    pub fn new() -> Option<Ahead> {
        // A thread that somebody scheduled on purpose stays as it is.
        // Made only where it is so: its end is that of this way of scheduling.
        (policy() == SCHED_OTHER && schedule(SCHED_FIFO | SCHED_RESET_ON_FORK, 1))
            .then(|| Ahead(()))
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        schedule(SCHED_OTHER, 0);
    }
}

#[expect(unsafe_code, reason = "rustix has no scheduling policies")]
fn policy() -> c_int {
    // SAFETY: takes a number and gives one; 0 is the calling thread.
    unsafe { libc::sched_getscheduler(0) }
}

#[expect(unsafe_code, reason = "rustix has no scheduling policies")]
fn schedule(policy: c_int, sched_priority: c_int) -> bool {
    let param = sched_param { sched_priority };
    // SAFETY: 0 is the calling thread, and `param` lives through the call.
    unsafe { libc::sched_setscheduler(0, policy, &param) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_is_scheduled_as_before_afterwards() {
        let before = policy();
        let ahead = Ahead::new();
        match &ahead {
            Some(_) => assert_eq!(policy(), SCHED_FIFO | SCHED_RESET_ON_FORK),
            None => eprintln!("skipped: real-time scheduling is not allowed here"),
        }
        drop(ahead);
        assert_eq!(policy(), before);
    }

    #[test]
    fn a_thread_that_somebody_scheduled_on_purpose_stays_as_it_is() {
        assert!(schedule(libc::SCHED_BATCH, 0), "anybody may");
        drop(Ahead::new());
        assert_eq!(policy(), libc::SCHED_BATCH);
    }
}
