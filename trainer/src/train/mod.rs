//! The training loop: the only module that knows all the others.

mod feed;
mod log;
mod outputs;
mod pace;
mod place;
mod position;
mod step;
mod surroundings;
mod validate;

pub use place::Place;
pub use step::{MicroStep, Stepper};

use crate::checkpoint::Checkpoints;
use crate::meter::Best;
use crate::model::Network;
use crate::optim::lr_at;
use crate::{failure, report, weights};
use anyhow::{Context, Result};
use feed::Feed;
use log::{StepFacts, StepLog};
use outputs::{Outputs, Shape};
use pace::Pace;
use position::Position;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tch::{Kind, Tensor};
use tsm_data::clip::Dataset;
use tsm_data::list::Split;
use tsm_data::loader::{BadSample, LoaderSpec};
use tsm_data::order::{Cut, Share, SplitMix64, TrainOrder};
use tsm_job::message::{AgentLink, WorkerMessage};
use tsm_job::{Config, RunDir, WorkerEnv};
use tsm_torch_ext::dist::ReduceOp;

/// Trains this rank to the end of the job.
///
/// # Errors
/// Everything that ends a training, with its exit code (see [`tsm_job::exit`]).
pub fn run(config: Config, env: &WorkerEnv, link: &AgentLink) -> Result<()> {
    link.send(&WorkerMessage::Hello {
        rank: env.rank,
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
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
    num_bad: u64,
    run_dir: RunDir,
    /// Rank 0 alone writes.
    writer: Option<(Checkpoints, Outputs)>,
}

impl<'a> Training<'a> {
    fn new(config: Config, env: &'a WorkerEnv, link: &'a AgentLink) -> Result<Training<'a>> {
        link.send(&WorkerMessage::Section {
            name: "load".into(),
        });
        // Lists first: a wrong path must not cost a rendezvous.
        let train_set = Arc::new(Dataset::open(&config, Split::Train)?);
        let val_set = Arc::new(Dataset::open(&config, Split::Val)?);
        let run_dir = surroundings::run_dir(&config, env)?;
        let place = Place::new(&config, env)?;
        let network = Network::new(&config.model, place.device, config.run.seed)?;
        let mut notes = Vec::new();
        if let (Some(file), None) = (&config.model.weights, &env.resume_from) {
            let loaded =
                weights::load_pretrained(&network, file, config.model.weights_min_coverage)
                    .with_context(|| format!("model.weights {}", file.display()))?;
            notes.push(format!("{}: {loaded}", file.display()));
        }
        let mut stepper = Stepper::new(&config, &place, network)?;
        let mut at = Position::default();
        if let Some(from) = &env.resume_from {
            let (position, said) = position::resume(&mut stepper, &config, env, from)?;
            at = position;
            notes.extend(said);
        }
        // The same for every epoch.
        let first_epoch = order(&config, env, &train_set);
        let shape = Shape {
            num_epochs: config.train.epochs,
            steps_per_epoch: first_epoch.num_steps(),
        };
        let base_lr = config.scaled_lr(env.world_size);
        let writer = match env.rank {
            0 => {
                let checkpoints =
                    Checkpoints::open(&run_dir.checkpoints(), config.train.keep_last)?;
                let outputs = Outputs::new(
                    &run_dir,
                    shape,
                    &at,
                    env.world_size,
                    config.model.num_segments,
                    place.cuda_index(),
                );
                Some((checkpoints, outputs))
            }
            _ => None,
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
            num_bad: 0,
            run_dir,
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
        if let Some((_, out)) = &mut self.writer {
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
        }
        Ok(())
    }

    fn run(mut self) -> Result<()> {
        while self.at.epoch < self.config.train.epochs {
            self.epoch()?;
        }
        let bad = Tensor::from(self.num_bad as f64)
            .to_kind(Kind::Double)
            .to_device(self.place.device);
        self.place.peers.all_reduce(
            &bad,
            ReduceOp::Sum,
            "all-reduce of the count of bad samples",
        )?;
        if let Some((_, out)) = self.writer.take() {
            out.finish();
            let end = report::RunEnd {
                world_size: self.env.world_size,
                final_step: self.at.step,
                bad_videos: bad.double_value(&[]) as u64,
                environment: surroundings::environment(&self.place),
            };
            report::write(&self.run_dir, &self.config, end)?;
            let best = self.at.best_top1.map_or("no validation".into(), |b| {
                format!("best top1 {b:.2} at epoch {}", self.at.best_epoch)
            });
            println!("{best}; report in {}", self.run_dir.report().display());
        }
        // Rank 0 holds the store that the others need until here.
        self.place
            .peers
            .barrier(self.config.launch.collective_timeout, "barrier at the end")?;
        self.place.peers.leave();
        Ok(())
    }

    /// Trains the rest of the current epoch, validates and saves where it is due.
    fn epoch(&mut self) -> Result<()> {
        self.link.send(&WorkerMessage::Section {
            name: "train".into(),
        });
        let epoch = u64::from(self.at.epoch);
        let share = Share::new(self.env.rank, self.env.world_size);
        if self.at.step_in_epoch < self.shape.steps_per_epoch {
            let spec = LoaderSpec::train(
                &self.config,
                self.train_set.clone(),
                share,
                epoch,
                self.at.step_in_epoch,
            )?;
            self.feed.start(spec)?;
            self.steps()?;
            self.num_bad += self.feed.end()?;
        }
        if let Some((_, out)) = &mut self.writer {
            out.epoch(&self.at);
        }
        let number = self.at.epoch + 1;
        let last = number == self.config.train.epochs;
        let due = |every: u32| last || (every > 0 && number.is_multiple_of(every));
        let mut improved = false;
        let (eval, save) = (
            due(self.config.train.eval_every),
            due(self.config.train.checkpoint_every),
        );
        if eval || save {
            self.sync_buffers()?;
        }
        if eval {
            improved = self.validate()?;
        }
        self.at.epoch = number;
        self.at.step_in_epoch = 0;
        if save || improved {
            self.save(improved)?;
        }
        Ok(())
    }

    fn steps(&mut self) -> Result<()> {
        let mut log = StepLog::new(self.env.rank);
        let mut pace = Pace::new(self.place.device);
        let mut ended = Instant::now();
        let mut data_time = Duration::ZERO;
        loop {
            let started = Instant::now();
            let Some(first) = self.feed.next()? else {
                break;
            };
            data_time += started.elapsed();
            let (step_samples, micro_steps) = (first.step_samples, first.micro_steps);
            self.stepper.begin()?;
            let mut loss = Tensor::zeros([], (Kind::Float, self.place.device));
            let mut hits = Tensor::zeros([2], (Kind::Float, self.place.device));
            let mut batch = first;
            loop {
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
                    break;
                }
                let waiting = Instant::now();
                batch = self
                    .feed
                    .next()?
                    .context("the loader ended in the middle of a step")?;
                data_time += waiting.elapsed();
            }
            let schedule_step = self.at.schedule_step(self.shape.steps_per_epoch);
            let optim = &self.config.optim;
            let lr = lr_at(
                &optim.schedule,
                optim.warmup.as_ref(),
                self.base_lr,
                self.config.train.epochs,
                self.shape.steps_per_epoch,
                schedule_step,
            );
            let scale = self.stepper.precision.scale().map(|s| s.value());
            let done = self.stepper.update(lr)?;
            pace.step()?;

            self.at.step += 1;
            self.at.step_in_epoch += 1;
            self.at.samples_seen += step_samples;
            failure::at_step(self.at.step);
            self.link.send(&WorkerMessage::Step {
                step: self.at.step,
                epoch: self.at.epoch,
                work_ms: None,
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
            if let Some((_, out)) = &mut self.writer {
                out.meter.step(step_samples, facts.data_time, step_time);
                out.moved(&self.at);
            }
            let due = self
                .config
                .train
                .checkpoint_steps
                .is_some_and(|n| self.at.step.is_multiple_of(n));
            let inside = self.at.step_in_epoch < self.shape.steps_per_epoch;
            if self
                .at
                .step_in_epoch
                .is_multiple_of(u64::from(self.config.train.log_every))
                || !inside
                || due
            {
                let numbers = log.flush(&self.place.peers)?;
                if let Some((_, out)) = &mut self.writer {
                    out.steps(&numbers, &self.at);
                }
            }
            // At an epoch's end the save follows the validation.
            if due && inside {
                self.sync_buffers()?;
                self.save(false)?;
            }
        }
        debug_assert!(
            log.is_empty(),
            "the last step of an epoch reads the log back"
        );
        Ok(())
    }

    /// Dropout draws from (seed, step, micro step, rank) alone, so that a resumed run repeats it.
    fn seed(&self, micro_step: u32) {
        let step =
            SplitMix64::for_sample(self.config.run.seed, self.at.step, u64::from(micro_step))
                .next_u64();
        let seed = SplitMix64::for_sample(step, u64::from(self.env.rank), 1).next_u64();
        tch::manual_seed((seed >> 1) as i64);
    }

    fn sync_buffers(&self) -> Result<()> {
        let buffers = self.stepper.network.buffers().iter().map(|b| &b.tensor);
        self.place
            .peers
            .sync_buffers(buffers, self.config.train.bn_buffers)
    }

    /// Returns whether this is the best validation so far.
    fn validate(&mut self) -> Result<bool> {
        self.link.send(&WorkerMessage::Section {
            name: "validate".into(),
        });
        let started = Instant::now();
        let (result, bad) = validate::validate(
            &self.config,
            &self.place,
            &self.stepper,
            &mut self.feed,
            &self.val_set,
        )?;
        complain(&bad);
        self.num_bad += bad.len() as u64;
        let improved =
            result.num_clips > 0 && self.at.best_top1.is_none_or(|best| result.top1 > best);
        if improved {
            self.at.best_top1 = Some(result.top1);
            self.at.best_epoch = self.at.epoch + 1;
        }
        if let Some((_, out)) = &mut self.writer {
            let best = Best {
                top1: self.at.best_top1.unwrap_or(f64::NAN),
                epoch: self.at.best_epoch,
            };
            out.validation(&self.at, &result, started.elapsed(), best);
        }
        Ok(improved)
    }

    fn save(&mut self, best: bool) -> Result<()> {
        let Some((checkpoints, _)) = &self.writer else {
            return Ok(());
        };
        self.link.send(&WorkerMessage::Section {
            name: "checkpoint".into(),
        });
        let snapshot = position::snapshot(
            &self.stepper,
            &self.config,
            self.env,
            &self.train_set.class_names,
            &self.at,
        )?;
        checkpoints.save(&snapshot, best)?;
        self.link.send(&WorkerMessage::Section {
            name: "train".into(),
        });
        Ok(())
    }
}

/// The samples and steps of the first epoch.
fn order(config: &Config, env: &WorkerEnv, dataset: &Dataset) -> TrainOrder {
    let cut = Cut {
        batch_per_rank: config.train.batch_per_rank,
        accumulation: config.train.accumulation,
        drop_last: config.train.drop_last,
    };
    TrainOrder::new(
        dataset.len(),
        config.run.seed,
        0,
        Share::new(env.rank, env.world_size),
        cut,
        0,
    )
}

/// Names every sample that was left out.
fn complain(skipped: &[BadSample]) {
    for bad in skipped {
        eprintln!("warning: left out: {bad}");
    }
}
