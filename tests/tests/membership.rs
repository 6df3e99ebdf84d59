//! Nodes leave a training and others come: the job goes on with the ranks that there are, and the learning rate
//! follows their number.

use crate::job::{DEADLINE, Outcome, Running, Scene, contains, events, history, json, survivors};
use crate::nodes::Nodes;
use crate::resume::tensors;
use crate::tensorboard;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tsm_job::{RunDir, exit};

/// Of [`Scene::overrides`].
const CLIPS_PER_RANK: u64 = 4;
const BASE_BATCH: f64 = 8.0;
const LR: f64 = 0.005;
const EPOCHS: u32 = 2;
/// They take longer than a node's news do, so that what does not wait for a checkpoint is seen to come before it.
const CHECKPOINT_STEPS: u64 = 24;
/// The first one of four ranks.
const CLIPS_TO_CHECKPOINT: u64 = CHECKPOINT_STEPS * 4 * CLIPS_PER_RANK;

const JOB: [&str; 8] = [
    "run.seed=5",
    "train.epochs=2",
    "train.checkpoint_steps=24",
    "train.keep_last=100",
    "train.log_every=1",
    "optim.lr=0.005",
    "optim.warmup=null",
    "optim.schedule={constant: {}}",
];

/// What a training must be, by hand.
#[derive(Debug, Default, PartialEq)]
struct Course {
    /// Epoch, from 1, and learning rate of every step.
    steps: Vec<(u32, f64)>,
    clips: u64,
    /// What each start but the first says of the epoch that it finds, where it is not at the beginning.
    rests: Vec<String>,
}

/// Of starts with so many ranks after so many steps: no clip comes twice in an epoch, and only what makes no whole
/// step at its end is left out.
fn course(num_clips: u64, starts: &[(u64, u64)]) -> Course {
    let mut course = Course::default();
    let mut coming = starts.iter().peekable();
    let (mut batch, mut epoch, mut behind) = (0, 1, 0);
    loop {
        let here = course.steps.len() as u64;
        if let Some((world_size, _)) = coming.next_if(|(_, after)| *after == here) {
            batch = world_size * CLIPS_PER_RANK;
            let left = num_clips - behind;
            let (steps, out) = (left / batch, left % batch);
            if 0 < behind && behind < num_clips {
                let steps = format!("{steps} step{}", if steps == 1 { "" } else { "s" });
                course.rests.push(format!(
                    "epoch {epoch}: {left} of its {num_clips} clips are left for {steps} of {batch}; {out} left out, none repeated"
                ));
            }
        }
        if behind + batch > num_clips {
            (epoch, behind) = (epoch + 1, 0);
        }
        if epoch > EPOCHS {
            assert_eq!(coming.next(), None);
            return course;
        }
        // The linear scaling rule.
        course.steps.push((epoch, LR * batch as f64 / BASE_BATCH));
        course.clips += batch;
        behind += batch;
        // The last step of an epoch leaves nothing behind for a larger batch.
        if behind + batch > num_clips {
            behind = num_clips;
        }
    }
}

/// World size and steps before, of every start that has come to train.
fn starts(run: &RunDir) -> Vec<(u64, u64)> {
    let number = |e: &Value, key: &str| e[key].as_u64().unwrap();
    let starts = events(&run.metrics(), "start");
    starts
        .iter()
        .map(|e| (number(e, "world_size"), number(e, "step")))
        .collect()
}

fn last_step(run: &RunDir) -> u64 {
    let steps = events(&run.metrics(), "step");
    steps.last().map_or(0, |e| e["step"].as_u64().unwrap())
}

/// A training on one or two nodes with two ranks each.
struct Training {
    nodes: Nodes,
    run: RunDir,
    words: Vec<String>,
    num_clips: u64,
}

impl Training {
    /// `None` where there can be no nodes.
    fn new(num_clips: u64) -> Option<Training> {
        let nodes = Nodes::new(Scene::new(), false)?;
        nodes.scene.motion_set(num_clips as usize, 8);
        let size = ["--cpus=2".to_string(), "--nodes=1:2".into()];
        Some(Training {
            run: nodes.run("node-a"),
            words: [&size[..], &nodes.job(&JOB)].concat(),
            nodes,
            num_clips,
        })
    }

    /// Starts both nodes, kills the launcher of `node-b` after the first checkpoint, and waits until the ranks of
    /// `node-a` train without it.
    fn lose_a_node(&self) -> Running {
        let [mut first, second] = self.nodes.start(&self.words);
        let saved = tensors(&self.run, CHECKPOINT_STEPS).with_extension("json");
        first.until("checkpoint", || saved.exists().then_some(()));
        kill_process(second.pid(), Signal::KILL).unwrap();
        let killed = second.finish(DEADLINE);
        assert_eq!(killed.code, exit::SIGNAL_BASE + libc::SIGKILL);
        let from = first.until("a start without node-b", || {
            starts(&self.run).get(1).copied()
        });
        assert_eq!(from.0, 2);
        first.until("a step without node-b", || {
            (last_step(&self.run) > from.1).then_some(())
        });
        first
    }

    /// Starts `node-c` while all ranks are held between two checkpoints, so that it cannot come after their end.
    fn gain_a_node(&self) -> Running {
        let [.., newest] = &events(&self.run.events(), "start")[..] else {
            panic!("nothing was started");
        };
        let generation = &newest["generation"];
        let ranks = events(&self.run.events(), "spawn").into_iter();
        let ranks = ranks.filter(|e| e["generation"] == *generation);
        let ranks: Vec<Pid> = ranks
            .map(|e| Pid::from_raw(e["pid"].as_i64().unwrap() as i32).unwrap())
            .collect();
        let signal = |signal| {
            for &rank in &ranks {
                kill_process(rank, signal).unwrap();
            }
        };
        signal(Signal::STOP);
        let mut third = self.nodes.start_one("node-c", &self.words);
        third.until("node-c", || {
            let joined = events(&self.run.events(), "join");
            joined.iter().any(|e| e["host"] == "node-c").then_some(())
        });
        signal(Signal::CONT);
        third
    }

    /// Compares what `first` said and what is in the run folder with what [`course`] says. `generations` are the
    /// world size, the nodes, and the beginning of the cause of the end.
    fn check(&self, first: &Outcome, generations: &[(u64, &[&str], &str)]) {
        let run = &self.run;
        assert_eq!(first.code, exit::OK, "{first:#?}");
        let starts = starts(run);
        let sizes: Vec<u64> = starts.iter().map(|s| s.0).collect();
        let expected: Vec<u64> = generations.iter().map(|g| g.0).collect();
        assert_eq!(sizes, expected);
        let course = course(self.num_clips, &starts);

        let history = history(run);
        let number = |step: u64| (1..=step).collect::<Vec<u64>>();
        let numbers: Vec<u64> = history.steps.iter().map(|s| s.step).collect();
        assert_eq!(numbers, number(course.steps.len() as u64), "{starts:?}");
        let steps: Vec<(u32, f64)> = history
            .steps
            .iter()
            .map(|s| (s.epoch, s.lr.unwrap()))
            .collect();
        assert_eq!(steps, course.steps, "{starts:?}");
        let last = json(&tensors(run, course.steps.len() as u64).with_extension("json"));
        assert_eq!(last["meta"]["samples_seen"], course.clips, "{starts:?}");
        assert_eq!(history.validations.len(), EPOCHS as usize);

        let rule = |(before, after): (u64, u64)| {
            let lr = |ranks: u64| LR * (ranks * CLIPS_PER_RANK) as f64 / BASE_BATCH;
            let (old, new) = (before * CLIPS_PER_RANK, after * CLIPS_PER_RANK);
            format!(
                "world size {before} -> {after}: lr {} -> {} (linear scaling rule; a step has {new} clips, before {old})",
                lr(before),
                lr(after)
            )
        };
        let changes = sizes.iter().zip(&sizes[1..]);
        let said: Vec<String> = changes
            .map(|(&a, &b)| rule((a, b)))
            .chain(course.rests)
            .collect();
        let said: Vec<&str> = said.iter().map(String::as_str).collect();
        contains(&first.out, &said);
        let pages = fs_err::read_dir(run.tb()).unwrap().flatten();
        let pages: Vec<u8> = pages
            .flat_map(|f| fs_err::read(f.path()).unwrap())
            .collect();
        contains(&String::from_utf8_lossy(&pages), &said);

        self.check_generations(&starts, generations);
        if let Some(scalars) = tensorboard::read(run) {
            let shown: Vec<(u64, f32)> = scalars["train/lr"]
                .iter()
                .map(|&(step, lr)| (step, lr as f32))
                .collect();
            let wanted: Vec<(u64, f32)> =
                (1..).zip(course.steps.iter().map(|s| s.1 as f32)).collect();
            assert_eq!(shown, wanted);
        }
        assert_eq!(survivors(&self.nodes.scene.path("")), Vec::<String>::new());
    }

    /// What the launcher wrote down.
    fn check_generations(&self, starts: &[(u64, u64)], generations: &[(u64, &[&str], &str)]) {
        let run = &self.run;
        let manifest = json(&run.manifest());
        assert_eq!(manifest["outcome"], "succeeded");
        let written = manifest["generations"].as_array().unwrap();
        assert_eq!(written.len(), generations.len(), "{written:#?}");
        let mut announced = events(&run.events(), "start").into_iter();
        for (i, (found, &(world_size, nodes, cause))) in written.iter().zip(generations).enumerate()
        {
            assert_eq!(found["world_size"], world_size, "{found:#}");
            assert_eq!(found["nodes"], Value::from(nodes), "{found:#}");
            assert!(
                found["cause"].as_str().unwrap().starts_with(cause),
                "{found:#}"
            );
            let before = starts[i].1;
            let file = match before {
                0 => Value::Null,
                _ => tensors(run, before).display().to_string().into(),
            };
            assert_eq!(found["resumed_from"], file, "{found:#}");
            assert_eq!(found["resumed_step"].as_u64().unwrap_or(0), before);
            assert_eq!(found["first_step"], before + 1, "{found:#}");
            let start = announced.next().unwrap();
            assert_eq!(
                (&start["world_size"], &start["hosts"]),
                (&found["world_size"], &found["nodes"])
            );
        }
        assert_eq!(announced.next(), None);
        let lost = events(&run.events(), "lost");
        let lost: Vec<&str> = lost.iter().map(|e| e["host"].as_str().unwrap()).collect();
        assert_eq!(lost, ["node-b"]);
    }
}

#[test]
fn a_training_goes_on_without_a_lost_node() {
    let Some(training) = Training::new(CLIPS_TO_CHECKPOINT * 5 / 4) else {
        return;
    };
    let first = training.lose_a_node().finish(DEADLINE);
    training.check(
        &first,
        &[
            (4, &["node-a", "node-b"], "node node-b was lost first"),
            (2, &["node-a"], "succeeded"),
        ],
    );
}

#[test]
fn a_training_takes_in_a_node_at_the_next_checkpoint() {
    let Some(training) = Training::new(CLIPS_TO_CHECKPOINT * 2) else {
        return;
    };
    let first = training.lose_a_node();
    let third = training.gain_a_node();
    let first = first.finish(DEADLINE);
    assert_eq!(third.finish(DEADLINE).code, exit::OK);
    training.check(
        &first,
        &[
            (4, &["node-a", "node-b"], "node node-b was lost first"),
            (2, &["node-a"], "grown"),
            (4, &["node-a", "node-c"], "succeeded"),
        ],
    );
    let [_, alone, together] = starts(&training.run)[..] else {
        unreachable!("checked above");
    };
    // Not at once: what a new start costs is little right after a checkpoint.
    assert!(
        together.1 >= alone.1 + CHECKPOINT_STEPS,
        "{alone:?} {together:?}"
    );
}
