//! What a job leaves in its run folder beside the logs: `manifest.json`, `events.jsonl` and `failure.json`.

use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tsm_job::RunDir;

use super::Voice;
use crate::clock::Utc;
use crate::cluster::coordinator::Launched;
use crate::logs::keep::remedy;
use crate::manifest::description::Description;
use crate::manifest::events::Events;
use crate::manifest::writer::Writer;
use crate::manifest::{Manifest, write_json};
use crate::report::Failure;

/// The manifest is written so often though nothing but steps and checkpoints is new in it.
const REFRESH: Duration = Duration::from_secs(60);

pub(super) struct Record {
    dir: RunDir,
    manifest: Manifest,
    events: Events,
    writer: Writer,
    /// Hears of a file that cannot be written.
    voice: Voice,
    /// The manifest says more than its file.
    changed: bool,
    /// When the manifest was last given to the writer.
    kept_at: Duration,
    described: bool,
    /// The user knows that files of the run folder cannot be written.
    unwritten: bool,
}

impl Record {
    /// `start`: of the launcher, from which `now` counts.
    pub fn begin(
        dir: &RunDir,
        manifest: Manifest,
        voice: Voice,
        start: Instant,
        now: Duration,
    ) -> Record {
        Record {
            dir: dir.clone(),
            manifest,
            events: Events::open(dir, start),
            writer: Writer::start(dir.clone()),
            voice,
            changed: true,
            kept_at: now,
            described: false,
            unwritten: false,
        }
    }

    /// To be changed.
    pub fn manifest(&mut self) -> &mut Manifest {
        self.changed = true;
        &mut self.manifest
    }

    /// Has the manifest written where it is time.
    pub fn keep(&mut self, now: Duration) {
        let is_due = self.changed || now >= self.kept_at + REFRESH;
        if is_due && self.writer.is_ready() {
            (self.changed, self.kept_at) = (false, now);
            self.manifest.goodput = self.manifest.generations.goodput(now);
            self.writer.write(self.manifest.clone());
        }
    }

    /// Waits until a manifest was written, and another one may be. May be dropped and called again.
    pub async fn written(&mut self) {
        let written = self.writer.written().await;
        self.noted(written);
    }

    /// Takes in first and last step of this generation, and says what goodput that makes.
    pub fn progress(&mut self, steps: Option<(u64, u64)>, now: Duration) -> Option<f64> {
        let generations = &mut self.manifest.generations;
        if let Some(steps) = steps {
            generations.step(now, steps);
        }
        generations.goodput(now)
    }

    pub fn started(&mut self, launched: &Launched, now: Duration) {
        self.manifest().started(launched, now, Utc::now());
        if !std::mem::replace(&mut self.described, true) {
            let command = self.manifest.command.clone();
            self.writer.describe(move || Description::find(&command));
        }
    }

    pub fn failure(&mut self, failure: &Failure) {
        let written = write_json(&self.dir.failure(), failure);
        self.noted(written);
    }

    /// A line of events.jsonl.
    pub fn event(&mut self, kind: &str, fields: Value) {
        let written = self.events.write(kind, fields);
        self.noted(written);
    }

    /// Says it once where something cannot be written into the run folder.
    fn noted(&mut self, written: std::io::Result<()>) {
        if let Err(e) = written
            && !std::mem::replace(&mut self.unwritten, true)
        {
            let hint = remedy(e.kind());
            self.voice.notice(&format!(
                "warning: events.jsonl, failure.json or manifest.json is not complete: {e}\n  hint: {hint}"
            ));
        }
    }

    /// Writes everything down; how the job ended, as in the manifest.
    pub fn end(&mut self, code: i32, now: Duration) -> &'static str {
        let manifest = &mut self.manifest;
        if manifest.outcome == "running" {
            manifest.outcome = "failed";
        }
        let outcome = manifest.outcome;
        self.event("end", json!({"outcome": outcome, "exit_code": code}));
        let manifest = self.manifest();
        manifest.goodput = manifest.generations.goodput(now);
        (manifest.ended, manifest.exit_code) = (Some(Utc::now().rfc3339()), Some(code));
        let written = self.writer.end(self.manifest.clone());
        self.noted(written);
        outcome
    }
}
