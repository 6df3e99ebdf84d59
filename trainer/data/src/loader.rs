//! Decoder threads and the batches they deliver, in order.
//!
//! A feeder thread pairs each planned batch with a free buffer and cuts it into slots; worker
//! threads take one sample each and fill its slot; [`Loader::next`] waits for the oldest batch.
//! What a batch holds depends on the specification alone, never on the threads.

use crate::clip::{ClipReader, ClipSpec, Crop, Dataset};
use crate::order::{BatchPlan, Cut, Plan, Share, TrainOrder, ValOrder};
use crate::sample::Mode;
use crate::slab::{self, Owner, Slot};
use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use std::convert::Infallible;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tsm_job::Config;
use tsm_job::config::OnError;
use tsm_job::exit::{self, Coded};

/// Everything that decides what a [`Loader`] delivers.
#[derive(Clone, Debug)]
pub struct LoaderSpec {
    pub dataset: Arc<Dataset>,
    pub clip: ClipSpec,
    pub plan: Plan,
    /// Decoder threads, at least 1.
    pub threads: usize,
    /// Batches decoded ahead of the one in use.
    pub prefetch: usize,
    pub on_error: OnError,
    /// Bad samples of this loader, one rank and epoch, that are borne with [`OnError::Skip`].
    pub max_bad: u64,
}

impl LoaderSpec {
    /// Training clips of `epoch`, from step `first_step` of it on.
    ///
    /// # Errors
    /// With exit code [`exit::CONFIG`] if the list is too short for one step.
    pub fn train(
        config: &Config,
        dataset: Arc<Dataset>,
        share: Share,
        epoch: u64,
        first_step: u64,
    ) -> Result<LoaderSpec> {
        let train = &config.train;
        let cut = Cut {
            batch_per_rank: train.batch_per_rank,
            accumulation: train.accumulation,
            drop_last: train.drop_last,
        };
        let seed = config.run.seed;
        let order = TrainOrder::new(dataset.len(), seed, epoch, share, cut, first_step);
        if order.num_steps() == 0 {
            let message = format!(
                "{} has {} samples, a step takes {} ({} ranks x batch_per_rank {} x accumulation {}); \
                 lower train.batch_per_rank or set train.drop_last: false",
                dataset.list.file.display(),
                dataset.len(),
                order.global_batch(),
                share.world_size,
                train.batch_per_rank,
                train.accumulation
            );
            return Err(Coded::new(exit::CONFIG, message).into());
        }
        let mode = if config.data.dense {
            Mode::DenseTrain
        } else {
            Mode::Train
        };
        let crop = Crop::Train(config.data.train.clone());
        Ok(Self::new(
            config,
            dataset,
            mode,
            crop,
            epoch,
            Plan::Train(order),
        ))
    }

    /// The validation clips of this rank. Random choices (`mit` dense starts) do not change with
    /// the epoch, so that validations can be compared.
    pub fn val(config: &Config, dataset: Arc<Dataset>, share: Share) -> LoaderSpec {
        let aug = &config.data.val;
        let batch = aug.batch_per_rank.unwrap_or(config.train.batch_per_rank);
        let plan = Plan::Val(ValOrder::new(dataset.len(), share, batch));
        let mode = if config.data.dense {
            Mode::DenseVal
        } else {
            Mode::Val
        };
        Self::new(config, dataset, mode, Crop::Val(aug.clone()), 0, plan)
    }

    fn new(
        config: &Config,
        dataset: Arc<Dataset>,
        mode: Mode,
        crop: Crop,
        epoch: u64,
        plan: Plan,
    ) -> LoaderSpec {
        let data = &config.data;
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        LoaderSpec {
            dataset,
            clip: ClipSpec {
                sampler: data.sampler,
                mode,
                num_segments: config.model.num_segments as usize,
                crop,
                seed: config.run.seed,
                epoch,
            },
            plan,
            threads: data.workers.map_or_else(cores, |n| n as usize).max(1),
            prefetch: data.prefetch as usize,
            on_error: data.on_error,
            max_bad: data.max_bad_videos,
        }
    }

    /// Bytes of a full batch: `[batch_per_rank, num_clips * T, size, size, 3]`.
    pub fn batch_bytes(&self) -> usize {
        self.plan.batch_per_rank() as usize * self.clip.sample_bytes()
    }
}

/// A sample that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSample {
    /// Position in the list, from 0.
    pub index: u64,
    /// Its folder or video file.
    pub path: PathBuf,
    /// The list and its line, from 1.
    pub list: PathBuf,
    pub line: usize,
    pub reason: String,
}

impl fmt::Display for BadSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display().to_string();
        if !self.reason.contains(&path) {
            write!(f, "{path}: ")?;
        }
        write!(f, "{} ({}:{})", self.reason, self.list.display(), self.line)
    }
}

/// Clips that go through the network together.
pub struct Batch<B> {
    /// u8 `[n, num_clips * T, size, size, 3]` at the front. Dropping it (or the batch) gives it
    /// back to the loader, so keep it until a copy that runs beside the program has ended.
    pub buffer: Recycled<B>,
    /// Samples, not counting those left out.
    pub n: usize,
    /// Labels, after a flip's change.
    pub labels: Vec<i64>,
    /// Positions in the list.
    pub indices: Vec<u64>,
    /// Samples left out because they could not be read.
    pub skipped: Vec<BadSample>,
    /// Time that threads spent on this batch, added up.
    pub decode_time: Duration,
    /// Optimizer step within the epoch; in validation the number of the batch.
    pub step: u64,
    /// Position within the step, below `micro_steps`.
    pub micro_step: u32,
    /// Batches of each rank in the step.
    pub micro_steps: u32,
    /// Samples planned for the step over all ranks and micro steps; those left out count.
    pub step_samples: u64,
}

/// A buffer that returns to its loader when dropped.
pub struct Recycled<B> {
    buffer: Option<B>,
    home: Sender<B>,
}

const TAKEN: &str = "only drop takes the buffer";

impl<B> Deref for Recycled<B> {
    type Target = B;
    fn deref(&self) -> &B {
        self.buffer.as_ref().expect(TAKEN)
    }
}

impl<B> DerefMut for Recycled<B> {
    fn deref_mut(&mut self) -> &mut B {
        self.buffer.as_mut().expect(TAKEN)
    }
}

impl<B> Drop for Recycled<B> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            // The loader may be gone; then the buffer goes too.
            let _ = self.home.send(buffer);
        }
    }
}

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
        let (task_sender, tasks) = bounded(spec.threads);
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
            buffer: Recycled {
                buffer: Some(buffer.ok_or_else(|| self.no_answer(&plan, &labels))?),
                home: self.home.clone(),
            },
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::list::Split;
    use crate::testing;
    use std::collections::BTreeMap;
    use std::path::Path;

    type Sample = (i64, Vec<u8>);

    fn open(config: &Config) -> Arc<Dataset> {
        Arc::new(Dataset::open(config, Split::Train).unwrap())
    }

    fn train(config: &Config, rank: u32, world_size: u32) -> LoaderSpec {
        LoaderSpec::train(config, open(config), Share::new(rank, world_size), 5, 0).unwrap()
    }

    fn start(spec: &LoaderSpec) -> Loader<Vec<u8>> {
        Loader::start(spec.clone(), |len| vec![0xAA; len]).unwrap()
    }

    /// All samples by (step, index), with their order checked against the plan.
    fn samples(spec: &LoaderSpec) -> BTreeMap<(u64, u64), Sample> {
        let len = spec.clip.sample_bytes();
        let mut all = BTreeMap::new();
        let mut num = 0;
        for (n, batch) in start(spec).enumerate() {
            let batch = batch.unwrap();
            let plan = spec.plan.batch(n as u64).unwrap();
            assert_eq!((&batch.indices, batch.step), (&plan.indices, plan.step));
            assert_eq!(
                (batch.n, batch.labels.len()),
                (plan.indices.len(), plan.indices.len())
            );
            for (k, &index) in batch.indices.iter().enumerate() {
                let bytes = batch.buffer[k * len..(k + 1) * len].to_vec();
                assert!(
                    all.insert((batch.step, index), (batch.labels[k], bytes))
                        .is_none()
                );
            }
            num += 1;
        }
        assert_eq!(num, spec.plan.num_batches());
        all
    }

    fn error_of(spec: &LoaderSpec) -> (usize, anyhow::Error) {
        let mut loader = start(spec);
        let mut good = 0;
        loop {
            match loader.next().expect("an error") {
                Ok(_) => good += 1,
                Err(error) => {
                    assert!(loader.next().is_none(), "an error ends the stream");
                    return (good, error);
                }
            }
        }
    }

    fn break_file(root: &Path, video: u32, frame: u32) {
        fs_err::write(testing::frame_path(root, video, frame), "no picture").unwrap();
    }

    #[test]
    fn content_does_not_depend_on_threads_or_ranks() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 19, 5);
        let mut config = testing::config(dir.path());
        config.train.drop_last = false;
        let mut spec = train(&config, 0, 1);
        spec.threads = 1;
        let one = samples(&spec);
        assert_eq!(one.len(), 19);
        spec.threads = 4;
        assert_eq!(one, samples(&spec));
        config.train.batch_per_rank = 2;
        let mut two = samples(&train(&config, 0, 2));
        two.extend(samples(&train(&config, 1, 2)));
        assert_eq!(one, two);
        // Another epoch crops otherwise.
        let other = LoaderSpec::train(&config, open(&config), Share::new(0, 1), 6, 0).unwrap();
        assert_ne!(one, samples(&other));
    }

    #[test]
    fn starting_in_mid_epoch_continues_it() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 12, 3);
        let mut config = testing::config(dir.path());
        config.train.batch_per_rank = 2;
        config.train.accumulation = 2;
        let mut whole = samples(&train(&config, 0, 1));
        whole.retain(|(step, _), _| *step >= 1);
        let rest = LoaderSpec::train(&config, open(&config), Share::new(0, 1), 5, 1).unwrap();
        assert_eq!(whole, samples(&rest));
    }

    #[test]
    fn validation_shows_the_centre_of_the_middle_frames() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 5, 10);
        let mut config = testing::config(dir.path());
        // No resize: the short side is 40 already.
        config.data.val.short_side = 40;
        let mut seen = Vec::new();
        for rank in 0..2 {
            let spec = LoaderSpec::val(&config, open(&config), Share::new(rank, 2));
            for ((_, index), (label, bytes)) in samples(&spec) {
                assert_eq!(label, index as i64 % 4);
                // T = 2 of 10 frames: 2 and 7; 48x40 to 32x32 starts at (8, 4).
                for (t, frame) in [2, 7].into_iter().enumerate() {
                    for (x, y) in [(0, 0), (31, 0), (0, 31), (17, 5)] {
                        let at = ((t * 32 + y) * 32 + x) * 3;
                        let expected =
                            testing::pixel(index as u32, frame, x as u32 + 8, y as u32 + 4);
                        assert_eq!(
                            bytes[at..at + 3],
                            expected,
                            "sample {index} frame {frame} at {x},{y}"
                        );
                    }
                }
                seen.push(index);
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_rank_without_validation_samples_ends_at_once() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 2, 2);
        let config = testing::config(dir.path());
        let spec = LoaderSpec::val(&config, open(&config), Share::new(2, 3));
        assert!(start(&spec).next().is_none());
    }

    #[test]
    fn dense_validation_delivers_the_clips_of_its_rules() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 1, 3);
        let mut config = testing::config(dir.path());
        config.data.dense = true;
        config.data.sampler = tsm_job::config::Sampler::Mm1;
        let spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
        assert_eq!(
            (spec.clip.num_clips(), spec.clip.sample_bytes()),
            (10, 10 * 2 * 32 * 32 * 3)
        );
        assert_eq!(samples(&spec).len(), 1);
    }

    #[test]
    fn a_flipped_clip_takes_the_label_of_its_mirror_image() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 8, 2);
        let mut config = testing::config(dir.path());
        let names = dir.path().join("classes.txt");
        fs_err::write(&names, "left\nright\nup\ndown\n").unwrap();
        config.data.class_names = Some(names);
        config.data.train.flip = 1.0;
        config.data.train.flip_swap = vec![("right".into(), "left".into())];
        for ((_, index), (label, bytes)) in samples(&train(&config, 0, 1)) {
            assert_eq!(label, [1, 0, 2, 3][index as usize % 4]);
            // Green grows with x in the stored frame.
            assert!(bytes[1] > bytes[31 * 3 + 1]);
        }
    }

    #[test]
    fn buffers_are_made_once_and_go_round() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 40, 1);
        let config = testing::config(dir.path());
        let spec = train(&config, 0, 1);
        let mut made = 0;
        let mut loader = Loader::start(spec.clone(), |len| {
            made += 1;
            vec![0u8; len]
        })
        .unwrap();
        assert_eq!(made, 4);
        let mut places = std::collections::BTreeSet::new();
        let mut held = None;
        for batch in &mut loader {
            let batch = batch.unwrap();
            places.insert(batch.buffer.as_ptr() as usize);
            held = Some(batch);
        }
        assert!(places.len() <= 4 && spec.plan.num_batches() == 10);
        drop(held);
        assert_eq!(loader.into_buffers().len(), 4);
        // Also those of batches nobody asked for.
        let mut loader = start(&spec);
        drop(loader.next());
        assert_eq!(loader.into_buffers().len(), 4);
    }

    #[test]
    fn dropping_a_loader_in_mid_epoch_ends_its_threads() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 40, 1);
        let spec = train(&testing::config(dir.path()), 0, 1);
        for taken in 0..5 {
            let mut loader = start(&spec);
            let held: Vec<_> = loader
                .by_ref()
                .take(taken.min(2))
                .map(Result::unwrap)
                .collect();
            let weak = Arc::downgrade(&loader.spec);
            // Joins; a thread still alive would hold the specification.
            drop(loader);
            assert_eq!(weak.strong_count(), 0);
            drop(held);
        }
    }

    #[test]
    fn the_first_bad_file_in_order_ends_the_stream() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 16, 3);
        let config = testing::config(dir.path());
        let mut spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
        break_file(dir.path(), 6, 0);
        fs_err::remove_file(testing::frame_path(dir.path(), 9, 2)).unwrap();
        for threads in [1, 4] {
            spec.threads = threads;
            let (good, error) = error_of(&spec);
            assert_eq!((good, exit::code_of(&error)), (1, exit::DATA));
            let text = error.to_string();
            assert!(
                text.contains("v6/001.png") && text.contains("train.txt:8)"),
                "{text}"
            );
            assert!(text.contains("data.on_error: skip"), "{text}");
        }
        testing::write_png(&testing::frame_path(dir.path(), 6, 0), 6, 0, 48, 40);
        let (good, error) = error_of(&spec);
        assert_eq!(good, 2);
        assert!(
            error.to_string().contains("v9/003.png does not exist"),
            "{error}"
        );
    }

    #[test]
    fn skipped_samples_are_named_and_the_rest_moves_up() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 8, 2);
        let mut config = testing::config(dir.path());
        config.data.on_error = OnError::Skip;
        config.data.max_bad_videos = 3;
        let spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
        let whole = samples(&spec);
        for video in [0, 2, 7] {
            break_file(dir.path(), video, 0);
        }
        let mut loader = start(&spec);
        let first = loader.next().unwrap().unwrap();
        assert_eq!(
            (first.n, &first.indices[..], &first.labels[..]),
            (2, &[1, 3][..], &[1, 3][..])
        );
        let skipped: Vec<_> = first.skipped.iter().map(|b| (b.index, b.line)).collect();
        assert_eq!(skipped, [(0, 2), (2, 4)]);
        assert_eq!(first.skipped[0].path, dir.path().join("v0"));
        let len = spec.clip.sample_bytes();
        assert_eq!(first.buffer[..len], whole[&(0, 1)].1);
        assert_eq!(first.buffer[len..2 * len], whole[&(0, 3)].1);
        let second = loader.next().unwrap().unwrap();
        assert_eq!((second.n, loader.num_bad()), (3, 3));

        // One more than allowed.
        break_file(dir.path(), 5, 0);
        let (good, error) = error_of(&spec);
        let text = error.to_string();
        assert_eq!((good, exit::code_of(&error)), (1, exit::DATA));
        assert!(
            text.contains("4 samples could not be read, data.max_bad_videos is 3"),
            "{text}"
        );
        assert!(text.contains("v7"), "{text}");
    }

    #[test]
    fn a_batch_that_lost_every_sample_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 4, 1);
        let mut config = testing::config(dir.path());
        config.data.on_error = OnError::Skip;
        (0..4).for_each(|video| break_file(dir.path(), video, 0));
        let spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
        let text = error_of(&spec).1.to_string();
        assert!(
            text.contains("all 4 samples") && text.contains("v0/001.png"),
            "{text}"
        );
    }

    #[test]
    fn frames_of_two_sizes_are_an_error_that_names_both() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 1, 4);
        testing::write_png(&testing::frame_path(dir.path(), 0, 3), 0, 3, 40, 48);
        let config = testing::config(dir.path());
        let spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
        let text = error_of(&spec).1.to_string();
        assert!(
            text.contains("v0/004.png: is 40x48, the clip's first frame is 48x40"),
            "{text}"
        );
    }

    #[test]
    fn a_list_too_short_for_a_step_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 7, 1);
        let config = testing::config(dir.path());
        let result = LoaderSpec::train(&config, open(&config), Share::new(0, 2), 0, 0);
        let text = result.unwrap_err().to_string();
        assert!(
            text.contains("has 7 samples, a step takes 8 (2 ranks x batch_per_rank 4"),
            "{text}"
        );
    }

    #[test]
    fn jpeg_frames_are_read_by_content() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_videos(dir.path(), 4, 1);
        let pixels = vec![200u8; 48 * 40 * 3];
        let image = turbojpeg::Image {
            pixels: &pixels[..],
            width: 48,
            pitch: 48 * 3,
            height: 40,
            format: turbojpeg::PixelFormat::RGB,
        };
        let jpeg = turbojpeg::compress(image, 95, turbojpeg::Subsamp::Sub2x2).unwrap();
        fs_err::write(testing::frame_path(dir.path(), 1, 0), &jpeg).unwrap();
        let config = testing::config(dir.path());
        let spec = LoaderSpec::val(&config, open(&config), Share::new(0, 1));
        let (_, bytes) = &samples(&spec)[&(0, 1)];
        assert!(bytes.iter().all(|b| b.abs_diff(200) <= 1));
    }
}
