//! Pretrained weights: found by name and shape, and an error rather than a silent random start.
//!
//! A loader that skips what it does not know lets a training begin from noise without a word when
//! no name matches, so a file that covers too little of the backbone is refused.

mod names;
mod pickle;
mod read;
mod torch_file;
mod zip;

pub use names::original_name;

use crate::model::{Network, ParamRole};
use anyhow::Result;
use names::{Layout, canonical, is_counter};
use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use tch::Tensor;
use tsm_job::exit::{self, Coded};

/// What became of the tensors of a file and of the network.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadReport {
    /// Tensors copied, classifier included.
    pub loaded: usize,
    /// Tensors of the backbone (BatchNorm's statistics included) that were copied, and all of them.
    pub backbone: (usize, usize),
    /// Names in the file that were not used, each with the reason. Counters of BatchNorm's batches
    /// are not listed: no network of ours has them.
    pub skipped: Vec<(String, String)>,
    /// Names of the network that the file does not fill; they keep their values.
    pub missing: Vec<String>,
}

impl LoadReport {
    /// Share of the backbone's tensors that were found, 0 to 1.
    pub fn coverage(&self) -> f64 {
        self.backbone.0 as f64 / self.backbone.1 as f64
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        write!(
            f,
            "{} of {} backbone tensors loaded",
            self.backbone.0, self.backbone.1
        )?;
        let more = |f: &mut fmt::Formatter<'_>, count: usize| match count.checked_sub(SHOWN) {
            Some(rest) if rest > 0 => write!(f, "\n    and {rest} more"),
            _ => Ok(()),
        };
        if !self.missing.is_empty() {
            write!(f, "\n  not in the file: {}", self.missing.len())?;
            for name in self.missing.iter().take(SHOWN) {
                write!(f, "\n    {name}")?;
            }
            more(f, self.missing.len())?;
        }
        if !self.skipped.is_empty() {
            write!(f, "\n  in the file but not used: {}", self.skipped.len())?;
            let width = self
                .skipped
                .iter()
                .take(SHOWN)
                .map(|(name, _)| name.len())
                .max()
                .unwrap_or(0);
            for (name, why) in self.skipped.iter().take(SHOWN) {
                write!(f, "\n    {name:width$}  {why}")?;
            }
            more(f, self.skipped.len())?;
        }
        Ok(())
    }
}

/// Copies the tensors of `path` into `net` by name and shape.
///
/// The names may be torchvision's (ours too) or those of the original TSM code or MMAction2, for
/// whole models or backbones. The classifier is loaded when its shape fits, and stays as it is otherwise.
///
/// # Errors
/// With exit code [`exit::DATA`] when the file cannot be read or is of another format, and with
/// [`exit::CONFIG`] when it fills less than `min_coverage` (0 to 1) of the backbone's tensors;
/// `net` is then unchanged.
pub fn load_pretrained(net: &Network, path: &Path, min_coverage: f64) -> Result<LoadReport> {
    let file = read::read(path)
        .map_err(|e| Coded::new(exit::DATA, format!("cannot load weights: {e:#}")))?;
    let plan = Plan::new(net, &file);
    let report = plan.report;
    if report.backbone.0 == 0 || report.coverage() < min_coverage {
        return Err(Coded::new(
            exit::CONFIG,
            format!(
                "{} does not fit the network: {:.1} % of its backbone found, model.weights_min_coverage asks for \
                 {:.1} %\n  {report}\n  hint: check model.arch and model.width, or choose other model.weights",
                path.display(),
                100.0 * report.coverage(),
                100.0 * min_coverage
            ),
        )
        .into());
    }
    let _guard = tch::no_grad_guard();
    for (target, source) in plan.copies {
        target.shallow_clone().copy_(source);
    }
    Ok(report)
}

/// What to copy where, decided before anything is changed.
struct Plan<'a> {
    copies: Vec<(&'a Tensor, &'a Tensor)>,
    report: LoadReport,
}

impl<'a> Plan<'a> {
    fn new(net: &'a Network, file: &'a [(String, Tensor)]) -> Plan<'a> {
        let by_key: HashMap<String, usize> = file
            .iter()
            .enumerate()
            .map(|(i, (name, _))| (canonical(name), i))
            .collect();
        let params = net.params().iter().map(|p| {
            (
                &p.name,
                &p.tensor,
                matches!(p.role, ParamRole::FcWeight | ParamRole::FcBias),
            )
        });
        let targets: Vec<_> = params
            .chain(net.buffers().iter().map(|b| (&b.name, &b.tensor, false)))
            .collect();
        // Names of one layout can mean other tensors in another, so the file as a whole decides.
        let find = |layout: Layout, name: &str| {
            layout
                .keys(name)
                .iter()
                .find_map(|key| by_key.get(key.as_str()).copied())
        };
        let fits = |layout: &Layout| {
            let fitting = |(name, tensor, _): &&(&String, &Tensor, bool)| {
                find(*layout, name).is_some_and(|i| file[i].1.size() == tensor.size())
            };
            targets.iter().filter(fitting).count()
        };
        // The first of equals: torchvision and the original code name a ResNet alike.
        let layout = Layout::ALL
            .into_iter()
            .rev()
            .max_by_key(fits)
            .expect("there are layouts");

        let mut copies = Vec::new();
        let mut why_not: HashMap<usize, String> = HashMap::new();
        let mut used = vec![false; file.len()];
        let mut missing = Vec::new();
        let mut backbone = (0, 0);
        for (name, tensor, classifier) in targets {
            backbone.1 += usize::from(!classifier);
            match find(layout, name) {
                Some(i) if file[i].1.size() == tensor.size() => {
                    backbone.0 += usize::from(!classifier);
                    used[i] = true;
                    copies.push((tensor, &file[i].1));
                }
                Some(i) => {
                    let sizes = (file[i].1.size(), tensor.size());
                    why_not.insert(
                        i,
                        format!("is {:?}, the network's {name} is {:?}", sizes.0, sizes.1),
                    );
                    missing.push(name.clone());
                }
                None => missing.push(name.clone()),
            }
        }
        let skipped = file
            .iter()
            .enumerate()
            .filter(|(i, (name, _))| !used[*i] && !is_counter(name))
            .map(|(i, (name, _))| {
                let why = why_not
                    .remove(&i)
                    .unwrap_or_else(|| "the network has no such tensor".into());
                (name.clone(), why)
            })
            .collect();
        let report = LoadReport {
            loaded: copies.len(),
            backbone,
            skipped,
            missing,
        };
        Plan { copies, report }
    }
}

#[cfg(test)]
mod tests;
