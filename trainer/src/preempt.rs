//! The request to save and leave: SIGUSR2.
//!
//! Nothing happens in the signal itself. Ranks hear of it at different times, each at its next step
//! votes to stop (see [`crate::ddp::Ddp::vote`]), and the first vote stops all of them at one step.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Whether this rank was asked to save and leave, by a signal or by another rank that was.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Asks this rank; asking twice changes nothing.
pub fn ask() {
    ASKED.store(true, Ordering::Relaxed);
}

/// Takes SIGUSR2 from now on. A thread waits for it and every other thread blocks it, so that it
/// interrupts no system call of libtorch, NCCL or a driver. Call before any other thread starts:
/// they inherit the block. A signal that came earlier to a process started with SIGUSR2 blocked is
/// not lost.
///
/// # Errors
/// The thread cannot be started.
#[expect(unsafe_code, reason = "std has no signal masks")]
pub fn listen() -> std::io::Result<()> {
    // SAFETY: a set of signals is plain memory that `sigemptyset` fills; both calls only read or
    // write it and this thread's mask.
    let usr2 = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGUSR2);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    };
    let wait = move || {
        loop {
            let mut signal = 0;
            // SAFETY: both point to this thread's own memory.
            if unsafe { libc::sigwait(&usr2, &mut signal) } == 0 {
                ask();
            }
        }
    };
    std::thread::Builder::new()
        .name("tsm-signals".into())
        .spawn(wait)?;
    Ok(())
}
