//! The numbers of the steps: kept on the device, read back together every few steps.

use crate::ddp::Peers;
use anyhow::Result;
use std::time::{Duration, SystemTime};
use tch::{Device, Kind, Tensor};
use tsm_job::exit::{self, Coded};
use tsm_torch_ext::dist::ReduceOp;

/// Columns of a row: loss part, top-1 hits, top-5 hits, gradient norm, loss scale, whether this
/// rank's loss is not finite, and its number + 1 if so.
const COLUMNS: i64 = 7;

/// Numbers of one step that this rank knows without asking the device.
#[derive(Clone, Copy, Debug)]
pub struct StepFacts {
    /// Optimizer steps finished, this one included.
    pub step: u64,
    pub lr: f64,
    /// Over all ranks.
    pub num_clips: u64,
    pub data_time: Duration,
    pub step_time: Duration,
    pub ended: SystemTime,
}

/// One step, the same on all ranks.
#[derive(Clone, Copy, Debug)]
pub struct StepNumbers {
    pub facts: StepFacts,
    /// Mean over the clips of all ranks.
    pub loss: f64,
    /// Percent of the step's clips.
    pub top1: f64,
    pub top5: f64,
    pub grad_norm: f64,
    /// Only in fp16 and o2.
    pub loss_scale: Option<f64>,
}

/// Steps since the last read-back.
pub struct StepLog {
    rank: u32,
    rows: Vec<Tensor>,
    facts: Vec<StepFacts>,
}

/// Top-1 and top-5 hits of a batch, float32 `[2]` on the device.
pub fn hits(logits_nk: &Tensor, labels_n: &Tensor) -> Tensor {
    let k = logits_nk.size()[1].min(5);
    let (_, best) = logits_nk.topk(k, 1, true, true);
    let hit = best.eq_tensor(&labels_n.unsqueeze(1)).to_kind(Kind::Float);
    Tensor::stack(
        &[hit.narrow(1, 0, 1).sum(Kind::Float), hit.sum(Kind::Float)],
        0,
    )
}

impl StepLog {
    pub fn new(rank: u32) -> StepLog {
        StepLog {
            rank,
            rows: Vec::new(),
            facts: Vec::new(),
        }
    }

    /// Keeps a step: `loss` is this rank's part (see [`super::step::MicroStep`]), `hits` of
    /// [`hits`], all on the device. Does not wait for it.
    pub fn push(
        &mut self,
        facts: StepFacts,
        loss: &Tensor,
        hits: &Tensor,
        grad_norm: &Tensor,
        loss_scale: Option<&Tensor>,
    ) {
        let bad = loss.isfinite().logical_not().to_kind(Kind::Float);
        let scale = loss_scale.map_or_else(|| loss.zeros_like(), |s| s.view([] as [i64; 0]));
        let row = [
            &loss.view([1]),
            hits,
            &grad_norm.view([1]),
            &scale.view([1]),
            &bad.view([1]),
            &(&bad * f64::from(self.rank + 1)).view([1]),
        ];
        self.rows
            .push(Tensor::cat(&row.map(|t| t.to_kind(Kind::Double)), 0));
        self.facts.push(facts);
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Sums the steps kept over all ranks and reads them back: one small all-reduce, one wait.
    ///
    /// # Errors
    /// A loss that is not finite on some rank, or without a loss scale a gradient (no scale that
    /// falls would make the next one better): all ranks fail here together, with the step (exit
    /// code DIVERGED). A peer that is gone (exit code PEER).
    pub fn flush(&mut self, peers: &Peers) -> Result<Vec<StepNumbers>> {
        if self.rows.is_empty() {
            return Ok(Vec::new());
        }
        let table = Tensor::stack(&self.rows, 0);
        self.rows.clear();
        peers.all_reduce(&table, ReduceOp::Sum, "all-reduce of the step log")?;
        let values: Vec<f64> = Vec::try_from(table.to_device(Device::Cpu).view([-1]))?;
        let world = f64::from(peers.world_size());
        let mut numbers = Vec::with_capacity(self.facts.len());
        for (facts, row) in self
            .facts
            .drain(..)
            .zip(values.chunks_exact(COLUMNS as usize))
        {
            let (num_bad, rank_sum) = (row[5], row[6]);
            let (grad_norm, scaled) = (row[3] / world, row[4] > 0.0);
            if num_bad > 0.0 {
                let who = if num_bad == 1.0 {
                    format!("on rank {}", rank_sum - 1.0)
                } else {
                    format!("on {num_bad} ranks")
                };
                return Err(diverged(&facts, "loss", &who, grad_norm));
            }
            if !scaled && !grad_norm.is_finite() {
                return Err(diverged(
                    &facts,
                    "gradient",
                    "though the loss is",
                    grad_norm,
                ));
            }
            let clips = facts.num_clips.max(1) as f64;
            numbers.push(StepNumbers {
                facts,
                loss: row[0] / world,
                top1: 100.0 * row[1] / clips,
                top5: 100.0 * row[2] / clips,
                grad_norm,
                loss_scale: scaled.then_some(row[4] / world),
            });
        }
        Ok(numbers)
    }
}

/// `what` is not finite; `remark` says on which ranks, or how it can be.
fn diverged(facts: &StepFacts, what: &str, remark: &str, grad_norm: f64) -> anyhow::Error {
    let StepFacts { step, lr, .. } = facts;
    Coded::new(
        exit::DIVERGED,
        format!(
            "the {what} is not finite at step {step} {remark} (lr {lr}, gradient norm {grad_norm}); all ranks stop here, and checkpoints of earlier steps are kept\n  hint: lower optim.lr, set optim.max_grad_norm, add optim.warmup, or use precision bf16 or fp32"
        ),
    )
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the log says after one step on one rank.
    fn flush(loss: f32, grad_norm: f32, loss_scale: Option<f32>) -> Result<Vec<StepNumbers>> {
        let facts = StepFacts {
            step: 7,
            lr: 0.5,
            num_clips: 2,
            data_time: Duration::ZERO,
            step_time: Duration::ZERO,
            ended: SystemTime::UNIX_EPOCH,
        };
        let mut log = StepLog::new(0);
        let scale = loss_scale.map(|s| Tensor::from_slice(&[s]));
        log.push(
            facts,
            &Tensor::from(loss),
            &Tensor::from_slice(&[1f32, 2.0]),
            &Tensor::from(grad_norm),
            scale.as_ref(),
        );
        log.flush(&Peers::alone())
    }

    #[test]
    fn only_a_falling_loss_scale_outlives_a_gradient_that_is_not_finite() {
        let numbers = flush(0.25, 3.0, None).unwrap();
        assert_eq!(
            (numbers[0].loss, numbers[0].grad_norm, numbers[0].top1),
            (0.25, 3.0, 50.0)
        );
        assert_eq!(
            flush(0.25, f32::INFINITY, Some(1024.0)).unwrap()[0].loss_scale,
            Some(1024.0)
        );
        for (loss, norm, message) in [
            (
                0.25,
                f32::NAN,
                "the gradient is not finite at step 7 though the loss is (lr 0.5, gradient norm NaN)",
            ),
            (
                f32::NAN,
                f32::NAN,
                "the loss is not finite at step 7 on rank 0 (lr 0.5, gradient norm NaN)",
            ),
        ] {
            let e = flush(loss, norm, None).unwrap_err();
            assert!(e.to_string().starts_with(message), "{e}");
            assert_eq!(e.downcast_ref::<Coded>().unwrap().code, exit::DIVERGED);
        }
    }
}
