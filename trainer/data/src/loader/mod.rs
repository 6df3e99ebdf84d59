//! Decoder threads and the batches they deliver, in order.
//!
//! A feeder thread pairs each planned batch with a free buffer and cuts it into slots; worker
//! threads take one sample each and fill its slot; [`Loader::next`] waits for the oldest batch.
//! What a batch holds depends on the specification alone, never on the threads.

mod batch;
mod spec;
#[cfg(test)]
mod tests;

pub use batch::{BadSample, Batch, Recycled};
pub use spec::LoaderSpec;

use crate::clip::ClipReader;
use crate::order::BatchPlan;
use crate::slab::{self, Owner, Slot};
use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tsm_job::config::OnError;
use tsm_job::exit::{self, Coded};

/// A sample on its way to a worker.
struct Task<B> {
    position: usize,
    index: u64,
    slot: Slot<B>,
    report: Sender<Outcome>,
}

/// What became of it.
struct Outcome {
    position: usize,
    label: Result<u32, String>,
    time: Duration,
}

/// A batch whose samples are being read.
struct Pending<B> {
    plan: BatchPlan,
    owner: Owner<B>,
    outcomes: Receiver<Outcome>,
}

/// Delivers the batches of one epoch in order; dropping it ends its threads after the samples
/// they have in hand.
///
/// There are `prefetch + 2` buffers: whoever holds more than two batches waits for ever.
pub struct Loader<B> {
    spec: Arc<LoaderSpec>,
    pending: Receiver<Pending<B>>,
    free: Receiver<B>,
    home: Sender<B>,
    /// Dropped to wake the feeder; the flag tells the workers.
    stop: Option<Sender<Infallible>>,
    stopped: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    num_delivered: u64,
    num_bad: u64,
    failed: bool,
}

impl<B: AsMut<[u8]> + Send + 'static> Loader<B> {
    /// Starts the threads; `make_buffer` makes a buffer of at least as many bytes as it is given.
    ///
    /// # Errors
    /// If a thread cannot be started.
    ///
    /// # Panics
    /// If a buffer is too small.
    pub fn start(spec: LoaderSpec, mut make_buffer: impl FnMut(usize) -> B) -> Result<Loader<B>> {
        let (home, free) = unbounded();
        let num_buffers = (spec.prefetch as u64 + 2).min(spec.plan.num_batches());
        for _ in 0..num_buffers {
            let mut buffer = make_buffer(spec.batch_bytes());
            let len = buffer.as_mut().len();
            assert!(
                len >= spec.batch_bytes(),
                "a buffer of {len} bytes for {}",
                spec.batch_bytes()
            );
            let _ = home.send(buffer);
        }
        let spec = Arc::new(spec);
        let (stop, stop_signal) = bounded::<Infallible>(0);
        let (pending_sender, pending) = unbounded();
        // Bounded by the buffers. A shorter queue would make workers wait for the feeder to wake.
        let (task_sender, tasks) = unbounded();
        let mut loader = Loader {
            spec: Arc::clone(&spec),
            pending,
            free: free.clone(),
            home,
            stop: Some(stop),
            stopped: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
            num_delivered: 0,
            num_bad: 0,
            failed: false,
        };
        // From here on an early return drops the loader and thereby ends what was started.
        loader.spawn("data-feed".into(), {
            let spec = Arc::clone(&spec);
            move || feed(&spec, &free, &stop_signal, &pending_sender, &task_sender)
        })?;
        for n in 0..spec.threads {
            let (spec, tasks) = (Arc::clone(&spec), tasks.clone());
            let stopped = Arc::clone(&loader.stopped);
            loader.spawn(format!("data-{n}"), move || work(&spec, &tasks, &stopped))?;
        }
        Ok(loader)
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(body)
            .map_err(|e| {
                let message = format!(
                    "cannot start decoder thread {} of {}: {e}; lower data.workers",
                    self.threads.len(),
                    self.spec.threads
                );
                Coded::new(exit::PREFLIGHT, message)
            })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Batches of this rank, delivered ones included.
    pub fn num_batches(&self) -> u64 {
        self.spec.plan.num_batches()
    }

    /// Samples left out so far.
    pub fn num_bad(&self) -> u64 {
        self.num_bad
    }

    /// Ends the loader and gives its buffers to the next one, except those of batches still held.
    pub fn into_buffers(mut self) -> Vec<B> {
        self.shut_down();
        let waiting = self.pending.try_iter().filter_map(|p| p.owner.join());
        waiting.chain(self.free.try_iter()).collect()
    }

    fn collect(&mut self, pending: Pending<B>) -> Result<Batch<B>> {
        let Pending {
            plan,
            owner,
            outcomes,
        } = pending;
        let planned = plan.indices.len();
        let mut decode_time = Duration::ZERO;
        let mut labels: Vec<Option<Result<u32, String>>> = vec![None; planned];
        for Outcome {
            position,
            label,
            time,
        } in outcomes.iter().take(planned)
        {
            decode_time += time;
            labels[position] = Some(label);
        }
        let buffer = owner.join();
        let mut batch = Batch {
            // A slot outlives its answer only in a thread that panicked.
            buffer: Recycled::new(
                buffer.ok_or_else(|| self.no_answer(&plan, &labels))?,
                self.home.clone(),
            ),
            n: 0,
            labels: Vec::with_capacity(planned),
            indices: Vec::with_capacity(planned),
            skipped: Vec::new(),
            decode_time,
            step: plan.step,
            micro_step: plan.micro_step,
            micro_steps: plan.micro_steps,
            step_samples: plan.step_samples,
        };
        if labels.iter().any(Option::is_none) {
            return Err(self.no_answer(&plan, &labels));
        }
        let len = self.spec.clip.sample_bytes();
        for (position, label) in labels.into_iter().flatten().enumerate() {
            let index = plan.indices[position];
            match label {
                Ok(label) => {
                    // Later samples move up over those left out.
                    if batch.n < position {
                        let from = position * len..(position + 1) * len;
                        (*batch.buffer).as_mut().copy_within(from, batch.n * len);
                    }
                    batch.labels.push(i64::from(label));
                    batch.indices.push(index);
                    batch.n += 1;
                }
                Err(reason) => {
                    let bad = self.bad_sample(index, reason);
                    self.num_bad += 1;
                    self.check_bad(&bad)?;
                    batch.skipped.push(bad);
                }
            }
        }
        if batch.n == 0 {
            let message = format!(
                "all {planned} samples of batch {} of step {} are bad, no gradient can be made; the first: {}",
                plan.micro_step, plan.step, batch.skipped[0]
            );
            return Err(Coded::new(exit::DATA, message).into());
        }
        Ok(batch)
    }

    fn check_bad(&self, bad: &BadSample) -> Result<()> {
        let message = match self.spec.on_error {
            OnError::Fail => format!(
                "cannot read a sample: {bad}\n  hint: repair the file or remove its line from the \
                 list; data.on_error: skip leaves bad samples out"
            ),
            OnError::Skip if self.num_bad > self.spec.max_bad => format!(
                "{} samples could not be read, data.max_bad_videos is {}; the last: {bad}",
                self.num_bad, self.spec.max_bad
            ),
            OnError::Skip => return Ok(()),
        };
        Err(Coded::new(exit::DATA, message).into())
    }

    fn bad_sample(&self, index: u64, reason: String) -> BadSample {
        let list = &self.spec.dataset.list;
        let entry = &list.entries[index as usize];
        BadSample {
            index,
            path: entry.path.clone(),
            list: list.file.clone(),
            line: entry.line,
            reason,
        }
    }

    fn no_answer(&self, plan: &BatchPlan, labels: &[Option<Result<u32, String>>]) -> anyhow::Error {
        let position = labels.iter().position(Option::is_none).unwrap_or(0);
        let bad = self.bad_sample(
            plan.indices[position],
            "its decoder thread panicked, see the message above".into(),
        );
        Coded::new(exit::BUG, bad.to_string()).into()
    }
}

impl<B> Loader<B> {
    fn shut_down(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.stop = None;
        for thread in self.threads.drain(..) {
            // A panic was reported by its hook and by the batch it left unanswered.
            let _ = thread.join();
        }
    }
}

impl<B> Drop for Loader<B> {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// The batches in order; the first error is the last item.
impl<B: AsMut<[u8]> + Send + 'static> Iterator for Loader<B> {
    type Item = Result<Batch<B>>;

    fn next(&mut self) -> Option<Result<Batch<B>>> {
        if self.failed || self.num_delivered == self.num_batches() {
            return None;
        }
        let batch = match self.pending.recv() {
            Ok(pending) => self.collect(pending),
            Err(_) => {
                Err(Coded::new(exit::BUG, "the thread that plans batches ended early").into())
            }
        };
        self.num_delivered += 1;
        if batch.is_err() {
            self.failed = true;
            self.shut_down();
        }
        Some(batch)
    }
}

fn feed<B: AsMut<[u8]> + Send>(
    spec: &LoaderSpec,
    free: &Receiver<B>,
    stop: &Receiver<Infallible>,
    pending: &Sender<Pending<B>>,
    tasks: &Sender<Task<B>>,
) {
    for plan in (0..).map_while(|n| spec.plan.batch(n)) {
        let buffer = select! {
            recv(free) -> buffer => match buffer {
                Ok(buffer) => buffer,
                Err(_) => return,
            },
            recv(stop) -> _ => return,
        };
        let indices = plan.indices.clone();
        let (owner, slots) = slab::split(buffer, indices.len(), spec.clip.sample_bytes());
        let (report, outcomes) = bounded(indices.len());
        if pending
            .send(Pending {
                plan,
                owner,
                outcomes,
            })
            .is_err()
        {
            return;
        }
        for (position, (slot, index)) in slots.into_iter().zip(indices).enumerate() {
            let report = report.clone();
            if tasks
                .send(Task {
                    position,
                    index,
                    slot,
                    report,
                })
                .is_err()
            {
                return;
            }
        }
    }
}

fn work<B>(spec: &LoaderSpec, tasks: &Receiver<Task<B>>, stopped: &AtomicBool) {
    let mut reader = ClipReader::new(spec.clip.sampler);
    for Task {
        position,
        index,
        mut slot,
        report,
    } in tasks
    {
        if stopped.load(Ordering::Relaxed) {
            continue;
        }
        let start = Instant::now();
        let label = reader.read(&spec.dataset, &spec.clip, index, slot.bytes());
        // The batch takes its buffer back after the last answer.
        drop(slot);
        let _ = report.send(Outcome {
            position,
            label,
            time: start.elapsed(),
        });
    }
}
