//! The training loop: the only module that knows all the others.

mod feed;
mod interfaces;
mod log;
pub mod origin;
mod outputs;
mod pace;
mod place;
mod position;
mod rendezvous;
mod step;
mod surroundings;
mod validate;

pub use place::Place;
pub use step::{MicroStep, Stepper};

use crate::checkpoint::Checkpoints;
use crate::meter::Best;
use crate::model::Network;
use crate::optim::lr_at;
use crate::{checkpoint, failure, preempt, report, weights};
use anyhow::{Context, Result};
use feed::Feed;
use log::{StepFacts, StepLog};
use outputs::Outputs;
use pace::Pace;
use position::{Position, Shape};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tch::{Kind, Tensor};
use tsm_data::clip::Dataset;
use tsm_data::list::Split;
use tsm_data::loader::{BadSample, LoaderSpec};
use tsm_data::order::{Share, SplitMix64};
use tsm_job::message::{AgentLink, WorkerMessage};
use tsm_job::{Config, RunDir, WorkerEnv};
use tsm_torch_ext::dist::ReduceOp;

/// How a training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All epochs are done.
    Finished,
    /// It was asked to save and leave (see [`preempt`]), and a checkpoint holds this many steps.
    Saved { step: u64 },
}

/// Trains this rank to the end of the job, or until all ranks are asked to save and leave.
///
/// # Errors
/// Everything else that ends a training, with its exit code (see [`tsm_job::exit`]).
pub fn run(config: Config, env: &WorkerEnv, link: &AgentLink) -> Result<Ended> {
    link.send(&WorkerMessage::Hello {
        rank: env.rank,
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
    });
    link.send(&WorkerMessage::Versions {
        versions: surroundings::versions(),
    });
    Training::new(config, env, link)?.run()
}

struct Training<'a> {
    config: Config,
    env: &'a WorkerEnv,
    link: &'a AgentLink,
    place: Place,
    stepper: Stepper,
    feed: Feed,
    train_set: Arc<Dataset>,
    val_set: Arc<Dataset>,
    shape: Shape,
    base_lr: f64,
    at: Position,
    /// Where the last checkpoint of this process was made.
    saved: Option<Position>,
    /// The ranks have the same BatchNorm buffers.
    buffers_agree: bool,
    num_bad: u64,
    /// Rank 0 alone writes.
    writer: Option<Writer<'a>>,
}

struct Writer<'a> {
    run_dir: RunDir,
    checkpoints: Checkpoints,
    out: Outputs<'a>,
}

impl<'a> Training<'a> {
    fn new(config: Config, env: &'a WorkerEnv, link: &'a AgentLink) -> Result<Training<'a>> {
        link.send(&WorkerMessage::Section {
            name: "load".into(),
        });
        // Lists first: a wrong path must not cost a rendezvous.
        let train_set = Arc::new(Dataset::open(&config, Split::Train)?);
        let val_set = Arc::new(Dataset::open(&config, Split::Val)?);
        let own = origin::look(env)?;
        let run_dir = match env.rank {
            0 => Some(surroundings::run_dir(&config, env)?),
            _ => None,
        };
        let place = Place::new(&config, env)?;
        if place.device.is_cuda() {
            let versions = surroundings::cuda_versions();
            link.send(&WorkerMessage::Versions { versions });
        }
        let (found, mut notes) = origin::agree(own, &place.peers, place.device)?;
        let network = Network::new(&config.model, place.device, config.run.seed)?;
        if let (Some(file), None) = (&config.model.weights, &found) {
            let loaded =
                weights::load_pretrained(&network, file, config.model.weights_min_coverage)
                    .with_context(|| format!("model.weights {}", file.display()))?;
            notes.push(format!("{}: {loaded}", file.display()));
        }
        let mut stepper = Stepper::new(&config, &place, network)?;
        let (mut at, mut buffers_agree) = (Position::default(), true);
        if let Some(found) = found {
            let (path, step) = (found.path.clone(), found.snapshot.meta.step);
            let resumed = position::resume(&mut stepper, &config, env, train_set.len(), found)?;
            (at, buffers_agree) = (resumed.at, resumed.buffers_agree);
            notes.extend(resumed.notes);
            link.send(&WorkerMessage::Resumed { path, step });
        }
        // The same for every epoch.
        let first_epoch = position::rest(&config, env, train_set.len(), &Position::default());
        let shape = Shape {
            num_epochs: config.train.epochs,
            steps_per_epoch: first_epoch.num_steps(),
            global_batch: config.global_batch(env.world_size),
            num_clips: train_set.len(),
        };
        let base_lr = config.scaled_lr(env.world_size);
        let writer = match run_dir {
            Some(run_dir) => Some(Writer {
                checkpoints: Checkpoints::open(&run_dir.checkpoints(), config.train.keep_last)?,
                out: Outputs::new(
                    &run_dir,
                    link,
                    shape,
                    &at,
                    env.world_size,
                    config.model.num_segments,
                    place.cuda_index(),
                ),
                run_dir,
            }),
            None => None,
        };
        let feed = Feed::new(&config, &place);
        let mut training = Training {
            config,
            env,
            link,
            place,
            stepper,
            feed,
            train_set,
            val_set,
            shape,
            base_lr,
            at,
            saved: None,
            buffers_agree,
            num_bad: 0,
            writer,
        };
        training.introduce(notes, first_epoch.num_left_out())?;
        Ok(training)
    }

    /// Says on rank 0 what will be trained, and how the learning rate came about.
    fn introduce(&mut self, notes: Vec<String>, left_out: u64) -> Result<()> {
        let config = &self.config;
        let summary = self
            .stepper
            .network
            .summary(config.data.val.size)
            .to_string();
        let summary = summary.trim_end();
        let world = self.env.world_size;
        let global = config.global_batch(world);
        let rule = if config.optim.scale_lr {
            format!(
                "linear scaling rule: lr {} x ({world} ranks x {} clips x {} micro steps) / base batch {} = {}",
                config.optim.lr,
                config.train.batch_per_rank,
                config.train.accumulation,
                config.optim.base_batch,
                self.base_lr
            )
        } else {
            format!(
                "lr {} as configured (optim.scale_lr is off; a step has {global} clips)",
                self.base_lr
            )
        };
        let groups: Vec<String> = self
            .stepper
            .sgd
            .groups()
            .map(|(g, n)| {
                format!(
                    "{} {n} (lr x{}, weight decay {})",
                    g.name,
                    g.lr_mult,
                    g.decay.resolve(config.optim.weight_decay)
                )
            })
            .collect();
        let data = format!(
            "{} training clips ({left_out} left out of each epoch), {} validation clips; {} steps of {global} clips an epoch, {} epochs",
            self.train_set.len(),
            self.val_set.len(),
            self.shape.steps_per_epoch,
            self.shape.num_epochs
        );
        let place = format!(
            "rank 0 of {world} on {:?}, {} threads; precision {:?}, channels-last {}",
            self.place.device,
            self.place.threads,
            config.train.precision.mode,
            config.train.channels_last
        );
        let yaml = config.to_yaml();
        if let Some(Writer { out, .. }) = &mut self.writer {
            out.line(summary);
            for line in [&place, &data, &rule] {
                out.line(line);
            }
            out.line(&format!("parameter groups: {}", groups.join(", ")));
            for note in &notes {
                out.line(note);
            }
            out.text("model", &format!("```\n{summary}\n```"));
            out.text("config", &format!("```yaml\n{yaml}\n```"));
            out.text("learning rate", &rule);
            if !notes.is_empty() {
                out.text("start", &notes.join("\n\n"));
            }
        }
        Ok(())
    }

    fn run(mut self) -> Result<Ended> {
        let asked = preempt::asked();
        let mut stop = position::agree(&self.stepper, self.place.device, &self.at, asked)?;
        while self.at.epoch < self.config.train.epochs {
            if stop {
                return self.leave();
            }
            stop = self.epoch()?;
        }
        let bad = Tensor::from(self.num_bad as f64)
            .to_kind(Kind::Double)
            .to_device(self.place.device);
        self.place.peers.all_reduce(
            &bad,
            ReduceOp::Sum,
            "all-reduce of the count of bad samples",
        )?;
        if let Some(Writer { out, run_dir, .. }) = self.writer.take() {
            out.finish();
            let end = report::RunEnd {
                world_size: self.env.world_size,
                final_step: self.at.step,
                bad_videos: bad.double_value(&[]) as u64,
                environment: surroundings::environment(&self.place),
            };
            report::write(&run_dir, &self.config, end)?;
            let best = self.at.best_top1.map_or("no validation".into(), |b| {
                format!("best top1 {b:.2} at epoch {}", self.at.best_epoch)
            });
            println!("{best}; report in {}", run_dir.report().display());
        }
        self.part()?;
        Ok(Ended::Finished)
    }

    /// Rank 0 holds the store that the others need until here.
    fn part(&self) -> Result<()> {
        let timeout = self.config.launch.collective_timeout;
        self.place.peers.barrier(timeout, "barrier at the end")?;
        self.place.peers.leave();
        Ok(())
    }

    /// Saves at exactly this step, as all ranks have agreed, and parts from the others once the
    /// checkpoint has been read back.
    fn leave(mut self) -> Result<Ended> {
        self.section("checkpoint");
        if self.saved != Some(self.at) {
            let own_buffers = if self.buffers_agree {
                None
            } else {
                position::gather_buffers(&self.stepper, &self.config)?
            };
            self.sync_buffers()?;
            self.save(false, own_buffers.as_ref())?;
        }
        let step = self.at.step;
        if let Some(Writer { out, run_dir, .. }) = self.writer.take() {
            let file = format!("step-{step:08}.safetensors");
            let file = run_dir.checkpoints().join(file);
            checkpoint::find(&file).context("the checkpoint just written cannot be read back")?;
            out.finish();
        }
        self.part()?;
        Ok(Ended::Saved { step })
    }

    /// Trains the rest of the current epoch, validates and saves where it is due. Returns whether
    /// all ranks have agreed to stop at the position reached.
    fn epoch(&mut self) -> Result<bool> {
        self.section("train");
        let num_clips = self.shape.num_clips;
        let rest = position::rest(&self.config, self.env, num_clips, &self.at);
        if self.at.clips_in_epoch == 0 || rest.num_steps() > 0 {
            let spec = LoaderSpec::train(
                &self.config,
                self.train_set.clone(),
                Share::new(self.env.rank, self.env.world_size),
                u64::from(self.at.epoch),
                self.at.clips_in_epoch,
            )?;
            self.feed.start(spec)?;
            let last_step = self.at.step + rest.num_steps();
            let stop = self.steps(last_step)?;
            self.num_bad += self.feed.end()?;
            if self.at.step == last_step
                && let Some(Writer { out, .. }) = &mut self.writer
            {
                out.epoch(&self.at);
            }
            if stop {
                return Ok(true);
            }
        }
        let number = self.at.epoch + 1;
        let last = number == self.config.train.epochs;
        let due = |every: u32| last || (every > 0 && number.is_multiple_of(every));
        let (mut improved, mut stop) = (false, false);
        let (eval, save) = (
            due(self.config.train.eval_every),
            due(self.config.train.checkpoint_every),
        );
        if eval || save {
            self.sync_buffers()?;
        }
        if eval {
            match self.validate()? {
                Some(outcome) => (improved, stop) = outcome,
                // What was trained is kept; the next start begins with this validation.
                None => return Ok(true),
            }
        }
        self.at.epoch = number;
        self.at.step_in_epoch = 0;
        self.at.clips_in_epoch = 0;
        if save || improved {
            self.save(improved, None)?;
        }
        Ok(stop)
    }

    /// Trains until `last_step` steps are finished, or all ranks have agreed to stop: returns whether
    /// they have.
    fn steps(&mut self, last_step: u64) -> Result<bool> {
        let steps_in_epoch = self.at.step_in_epoch + (last_step - self.at.step);
        let mut log = StepLog::new(self.env.rank);
        let mut pace = Pace::new(self.place.device);
        let mut ended = Instant::now();
        let mut data_time = Duration::ZERO;
        loop {
            let started = Instant::now();
            pace.begin()?;
            let Some(first) = self.feed.next()? else {
                break;
            };
            self.place.peers.take_waited();
            data_time += started.elapsed();
            let (step_samples, micro_steps) = (first.step_samples, first.micro_steps);
            self.stepper.begin()?;
            if preempt::asked() {
                self.stepper.vote()?;
            }
            let mut loss = Tensor::zeros([], (Kind::Float, self.place.device));
            let mut hits = Tensor::zeros([2], (Kind::Float, self.place.device));
            let mut batch = first;
            let gradients = loop {
                complain(&batch.skipped);
                let micro_step = batch.micro_step;
                let last = micro_step + 1 == micro_steps;
                let (frames, labels_n) = self.feed.input(&batch, 1, self.config.data.train.size)?;
                // Here, so that the buffer is free once it is copied, not once the step is done.
                self.feed.hold(batch)?;
                self.seed(micro_step);
                let out = self
                    .stepper
                    .micro_step(&frames, &labels_n, step_samples, last)?;
                loss += &out.loss;
                hits += log::hits(&out.logits_nk, &labels_n);
                if last {
                    break out.gradients;
                }
                let waiting = Instant::now();
                batch = self
                    .feed
                    .next()?
                    .context("the loader ended in the middle of a step")?;
                data_time += waiting.elapsed();
            };
            let optim = &self.config.optim;
            let lr = lr_at(
                &optim.schedule,
                optim.warmup.as_ref(),
                self.base_lr,
                self.config.train.epochs,
                self.shape.steps_per_epoch,
                self.shape.schedule_step(&self.at),
            );
            let scale = self.stepper.precision.scale().map(|s| s.value());
            let done = self.stepper.update(lr)?;
            let finished = pace.end(gradients, self.stepper.votes()?)?;
            let mut stop = finished.stop;

            self.at.step += 1;
            self.at.step_in_epoch += 1;
            self.at.clips_in_epoch += step_samples;
            self.at.samples_seen += step_samples;
            self.buffers_agree = false;
            failure::at_step(self.at.step);
            let host_work = || {
                let waited = self.place.peers.take_waited();
                started.elapsed().saturating_sub(waited)
            };
            let work = match self.place.cuda_index() {
                Some(_) => finished.work,
                None => Some(host_work()),
            };
            self.link.send(&WorkerMessage::Step {
                step: self.at.step,
                epoch: self.at.epoch + 1,
                work_ms: work.map(|w| w.as_secs_f64() * 1e3),
            });
            let step_time = ended.elapsed();
            ended = Instant::now();
            let facts = StepFacts {
                step: self.at.step,
                lr,
                num_clips: step_samples,
                data_time: std::mem::take(&mut data_time),
                step_time,
                ended: SystemTime::now(),
            };
            log.push(facts, &loss, &hits, &done.grad_norm, scale.as_ref());
            if let Some(Writer { out, .. }) = &mut self.writer {
                out.meter.step(step_samples, facts.data_time, step_time);
                out.moved(&self.at);
            }
            let due = self
                .config
                .train
                .checkpoint_steps
                .is_some_and(|n| self.at.step.is_multiple_of(n));
            let inside = self.at.step < last_step;
            if !inside {
                stop |= pace.drain()?;
                // What no step took is behind as well, for whoever goes on with another batch.
                self.at.clips_in_epoch = self.shape.num_clips;
            }
            if self
                .at
                .step_in_epoch
                .is_multiple_of(u64::from(self.config.train.log_every))
                || !inside
                || due
                || stop
            {
                let numbers = log.flush(&self.place.peers)?;
                if let Some(Writer { out, .. }) = &mut self.writer {
                    out.steps(&numbers, &self.at, steps_in_epoch);
                }
            }
            // At an epoch's end the save follows the validation.
            if due && inside {
                self.sync_buffers()?;
                self.save(false, None)?;
                if !stop {
                    self.section("train");
                }
            }
            if stop {
                return Ok(true);
            }
        }
        debug_assert!(
            log.is_empty(),
            "the last step of an epoch reads the log back"
        );
        Ok(false)
    }

    fn section(&self, name: &str) {
        self.link
            .send(&WorkerMessage::Section { name: name.into() });
    }

    /// Dropout draws from (seed, step, micro step, rank) alone, so that a resumed run repeats it.
    fn seed(&self, micro_step: u32) {
        let step =
            SplitMix64::for_sample(self.config.run.seed, self.at.step, u64::from(micro_step))
                .next_u64();
        let seed = SplitMix64::for_sample(step, u64::from(self.env.rank), 1).next_u64();
        tch::manual_seed((seed >> 1) as i64);
    }

    fn sync_buffers(&mut self) -> Result<()> {
        // The mean of equal numbers may differ from them in the last bit.
        if !self.buffers_agree {
            let buffers = self.stepper.network.buffers().iter().map(|b| &b.tensor);
            self.place
                .peers
                .sync_buffers(buffers, self.config.train.bn_buffers)?;
            self.buffers_agree = true;
        }
        Ok(())
    }

    /// Returns whether this is the best validation so far, and whether all ranks are to stop behind
    /// it; `None` if it was abandoned for that.
    fn validate(&mut self) -> Result<Option<(bool, bool)>> {
        self.section("validate");
        let started = Instant::now();
        let done = validate::validate(
            &self.config,
            &self.place,
            &self.stepper,
            &mut self.feed,
            &self.val_set,
        )?;
        complain(&done.bad);
        self.num_bad += done.bad.len() as u64;
        let Some(result) = done.accuracy else {
            return Ok(None);
        };
        let improved =
            result.num_clips > 0 && self.at.best_top1.is_none_or(|best| result.top1 > best);
        if improved {
            self.at.best_top1 = Some(result.top1);
            self.at.best_epoch = self.at.epoch + 1;
        }
        if let Some(Writer { out, .. }) = &mut self.writer {
            let best = Best {
                top1: self.at.best_top1.unwrap_or(f64::NAN),
                epoch: self.at.best_epoch,
            };
            out.validation(&self.at, &result, started.elapsed(), best);
        }
        Ok(Some((improved, done.stop)))
    }

    fn save(&mut self, best: bool, own_buffers: Option<&Tensor>) -> Result<()> {
        self.saved = Some(self.at);
        let Some(Writer { out, .. }) = &mut self.writer else {
            return Ok(());
        };
        // Whoever goes on from the checkpoint, also after a SIGKILL, finds the curves up to it.
        out.flush();
        self.section("checkpoint");
        let snapshot = position::snapshot(
            &self.stepper,
            &self.config,
            self.env,
            &self.train_set.class_names,
            self.shape.num_clips,
            &self.at,
            own_buffers,
        )?;
        if let Some(Writer { checkpoints, .. }) = &self.writer {
            checkpoints.save(&snapshot, best)?;
        }
        Ok(())
    }
}

/// Names every sample that was left out.
fn complain(skipped: &[BadSample]) {
    for bad in skipped {
        eprintln!("warning: left out: {bad}");
    }
}
