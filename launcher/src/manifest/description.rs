//! The part of a manifest that takes a moment to find out, on a thread of its own while the job runs.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tsm_job::RunDir;

use super::Manifest;

/// A description under way. The thread writes the manifest when it is done, unless [`Description::end`] came first:
/// it must not replace what is written at the end of the job.
pub struct Description {
    done: Receiver<Manifest>,
    is_over: Arc<Mutex<bool>>,
}

impl Description {
    /// `complete`: [`Manifest::complete`]. Where no thread can be started, nothing is found out.
    pub fn begin(
        manifest: Manifest,
        dir: RunDir,
        complete: impl FnOnce(Manifest) -> Manifest + Send + 'static,
    ) -> Description {
        let (send, done) = channel();
        let is_over = Arc::new(Mutex::new(false));
        let over = Arc::clone(&is_over);
        let describe = move || {
            let mut manifest = complete(manifest);
            let over = lock(&over);
            if !*over {
                // What goes wrong here goes wrong again, and is said, at the end.
                let _ = manifest.write(&dir);
            }
            let _ = send.send(manifest);
        };
        let thread = std::thread::Builder::new().name("manifest".into());
        // Without the thread, its end of the channel is gone.
        let _ = thread.spawn(describe);
        Description { done, is_over }
    }

    /// What was found out, if it is within `wait`. From now on nobody but the caller writes the manifest.
    pub fn end(self, wait: Duration) -> Option<Manifest> {
        let found = self.done.recv_timeout(wait);
        *lock(&self.is_over) = true;
        found.ok()
    }
}

fn lock(is_over: &Mutex<bool>) -> MutexGuard<'_, bool> {
    is_over.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_that_comes_too_late_does_not_replace_the_end_of_the_job() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::new(root.path());
        let manifest = |outcome| Manifest {
            outcome,
            ..Manifest::default()
        };
        let written = || fs_err::read_to_string(dir.manifest()).unwrap();
        let (go_on, is_told) = channel::<()>();
        let complete = move |manifest| {
            is_told.recv().unwrap();
            manifest
        };
        let late = Description::begin(manifest("running"), dir.clone(), complete);
        let held = Arc::clone(&late.is_over);
        assert!(late.end(Duration::ZERO).is_none());
        manifest("succeeded").write(&dir).unwrap();
        go_on.send(()).unwrap();
        // The thread holds it to its end.
        while Arc::strong_count(&held) > 1 {
            std::thread::yield_now();
        }
        assert!(written().contains("succeeded"), "{}", written());

        let in_time = Description::begin(manifest("running"), dir.clone(), |manifest| manifest);
        assert!(in_time.end(Duration::from_secs(60)).is_some());
        assert!(written().contains("running"));
    }
}
