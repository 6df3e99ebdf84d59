//! Keeps `manifest.json` up to date on a thread of its own: a slow disk must not hold up the job.

use std::io::Result;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tsm_job::RunDir;

use super::Manifest;
use super::description::Description;

/// After a write comes a pause of this length, or so many times as long as the write took: a job that starts again
/// and again, or a slow disk, then costs little.
const PAUSE: Duration = Duration::from_millis(100);
const REST: u32 = 10;
/// How long the end of a short run waits for the description.
const DESCRIBE: Duration = Duration::from_secs(2);

/// Writes one manifest after the other, so that the last one stays. The description is added when it is found.
pub struct Writer {
    jobs: Option<Sender<Job>>,
    results: UnboundedReceiver<Result<()>>,
    is_ready: bool,
    dir: RunDir,
}

enum Job {
    Write(Box<Manifest>),
    Described(Box<Description>),
    /// The last one.
    End(Box<Manifest>, Sender<Result<()>>),
}

impl Writer {
    /// Where no thread can be started, only the last manifest is written.
    pub fn start(dir: RunDir) -> Writer {
        Writer::with_pause(dir, PAUSE)
    }

    fn with_pause(dir: RunDir, pause: Duration) -> Writer {
        let (jobs, to_do) = channel();
        let (to, results) = unbounded_channel();
        let thread = Thread {
            dir: dir.clone(),
            pause,
            newest: None,
            description: None,
        };
        let builder = std::thread::Builder::new().name("manifest".into());
        let started = builder.spawn(move || thread.run(&to_do, &to));
        Writer {
            jobs: Some(jobs),
            results,
            is_ready: started.is_ok(),
            dir,
        }
    }

    /// Whether [`Self::write`] takes a manifest now.
    pub fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Never waits; what came of it is [`Self::written`].
    pub fn write(&mut self, manifest: Manifest) {
        self.is_ready = false;
        self.say(Job::Write(Box::new(manifest)));
    }

    /// Waits until a manifest was written, and another one may be. May be dropped and called again.
    pub async fn written(&mut self) -> Result<()> {
        match self.results.recv().await {
            Some(result) => {
                self.is_ready = true;
                result
            }
            None => std::future::pending().await,
        }
    }

    /// Calls `find` on a thread of its own; see [`Description::find`].
    pub fn describe(&self, find: impl FnOnce() -> Description + Send + 'static) {
        let jobs = self.jobs.clone();
        let describe = move || {
            let found = Box::new(find());
            // It may come too late.
            let _ = jobs.map(|jobs| jobs.send(Job::Described(found)));
        };
        let thread = std::thread::Builder::new().name("description".into());
        // Without the thread nothing is found out.
        let _ = thread.spawn(describe);
    }

    /// Waits until `manifest` is written; nothing is afterwards.
    ///
    /// # Errors
    /// When the disk is full or the folder is gone.
    pub fn end(&mut self, mut manifest: Manifest) -> Result<()> {
        let (done, result) = channel();
        self.say(Job::End(Box::new(manifest.clone()), done));
        // The thread sees that nobody describes any more.
        self.jobs = None;
        result.recv().unwrap_or_else(|_| manifest.write(&self.dir))
    }

    fn say(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }
}

struct Thread {
    dir: RunDir,
    pause: Duration,
    newest: Option<Box<Manifest>>,
    description: Option<Box<Description>>,
}

impl Thread {
    fn run(mut self, jobs: &Receiver<Job>, results: &UnboundedSender<Result<()>>) {
        // What the last write came to, to be told after the pause.
        let mut resting: Option<(Instant, Result<()>)> = None;
        loop {
            let job = match &resting {
                Some((until, _)) => {
                    jobs.recv_timeout(until.saturating_duration_since(Instant::now()))
                }
                None => jobs.recv().map_err(RecvTimeoutError::from),
            };
            match job {
                Ok(Job::Write(manifest)) => {
                    self.newest = Some(manifest);
                    let before = Instant::now();
                    let result = self.save();
                    let pause = self.pause.max(before.elapsed() * REST);
                    resting = Some((Instant::now() + pause, result));
                }
                Ok(Job::Described(description)) => {
                    self.description = Some(description);
                    // What goes wrong here goes wrong again, and is said, with the next one.
                    let _ = self.save();
                }
                Ok(Job::End(manifest, done)) => {
                    if self.description.is_none()
                        && let Ok(Job::Described(found)) = jobs.recv_timeout(DESCRIBE)
                    {
                        self.description = Some(found);
                    }
                    self.newest = Some(manifest);
                    let _ = done.send(self.save());
                    return;
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some((_, result)) = resting.take() {
                        let _ = results.send(result);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn save(&mut self) -> Result<()> {
        let Some(manifest) = &mut self.newest else {
            return Ok(());
        };
        if let Some(description) = &self.description {
            description.write_into(manifest);
        }
        manifest.write(&self.dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::scene::until;
    use crate::manifest::description::Machine;
    use serde_json::Value;
    use std::collections::BTreeMap;

    fn manifest(outcome: &'static str) -> Manifest {
        Manifest {
            outcome,
            ..Manifest::default()
        }
    }

    /// At once, however long this machine would take.
    fn find() -> Description {
        let machine = Machine {
            cpu: "EPYC".into(),
            num_cpus: 96,
            mem_bytes: 512 << 30,
            kernel: "6.1".into(),
        };
        Description {
            machine,
            commit: None,
            binaries: Vec::new(),
            versions: BTreeMap::new(),
        }
    }

    struct Scene {
        root: tempfile::TempDir,
        writer: Writer,
    }

    impl Scene {
        fn new(pause: Duration) -> Scene {
            let root = tempfile::tempdir().unwrap();
            let writer = Writer::with_pause(RunDir::new(root.path()), pause);
            Scene { root, writer }
        }

        fn file(&self) -> Value {
            let text = fs_err::read_to_string(self.root.path().join("manifest.json")).unwrap();
            serde_json::from_str(&text).unwrap()
        }
    }

    #[tokio::test]
    async fn a_manifest_is_written_and_then_the_next_one() {
        let mut scene = Scene::new(Duration::ZERO);
        for outcome in ["running", "failed"] {
            assert!(scene.writer.is_ready());
            scene.writer.write(manifest(outcome));
            assert!(!scene.writer.is_ready());
            scene.writer.written().await.unwrap();
            assert_eq!(scene.file()["outcome"], outcome);
        }
        fs_err::remove_dir_all(scene.root.path()).unwrap();
        scene.writer.write(manifest("running"));
        assert!(scene.writer.written().await.is_err());
        assert!(scene.writer.end(manifest("failed")).is_err());
    }

    #[tokio::test]
    async fn the_pause_after_a_write_delays_the_next_one_but_not_the_end() {
        let mut scene = Scene::new(Duration::from_secs(3600));
        scene.writer.write(manifest("running"));
        let little = Duration::from_millis(50);
        let early = tokio::time::timeout(little, scene.writer.written()).await;
        assert!(early.is_err(), "{early:?}");
        scene.writer.end(manifest("succeeded")).unwrap();
        assert_eq!(scene.file()["outcome"], "succeeded");
    }

    #[test]
    fn the_end_waits_for_the_description() {
        let mut scene = Scene::new(Duration::ZERO);
        scene.writer.describe(find);
        scene.writer.end(manifest("succeeded")).unwrap();
        assert!(scene.file()["machine"].is_object(), "{}", scene.file());
    }

    #[tokio::test]
    async fn what_was_found_stands_in_every_later_manifest() {
        let mut scene = Scene::new(Duration::ZERO);
        scene.writer.write(manifest("running"));
        scene.writer.written().await.unwrap();
        scene.writer.describe(find);
        until(|| (!scene.file()["machine"].is_null()).then_some(()));
        scene.writer.write(manifest("running"));
        scene.writer.written().await.unwrap();
        assert!(scene.file()["machine"].is_object(), "{}", scene.file());
    }

    #[test]
    fn what_is_found_too_late_does_not_replace_the_end() {
        let mut scene = Scene::new(Duration::ZERO);
        let (go_on, is_told) = channel::<()>();
        let (tell, is_over) = channel::<()>();
        scene.writer.describe(move || {
            // Told by its end, after this function.
            let _tell = tell;
            let _ = is_told.recv();
            find()
        });
        scene.writer.write(manifest("running"));
        scene.writer.end(manifest("succeeded")).unwrap();
        drop(go_on);
        assert!(is_over.recv().is_err());
        assert_eq!(scene.file()["outcome"], "succeeded");
        assert!(scene.file()["machine"].is_null());
    }
}
