//! Accuracy of a whole validation: exact counts, summed over batches and ranks, divided once.

use tch::{Device, Kind, Reduction, Tensor};

/// Slots in front of the per-class counts: clips, top-1 hits, top-5 hits, non-finite rows, loss sum.
const HEAD: i64 = 5;

/// Counts of a validation, kept on the device as one flat `f64` vector (exact up to 2^53), so that
/// an update never waits for the device and one all-reduce sums all ranks.
///
/// **Ties.** The classes of a clip are ordered by logit, equal logits by class index: of all sets
/// `torch.topk` may return, the one that is the same on every device, with exactly k classes a clip.
///
/// **Non-finite logits.** A clip with a NaN or an infinity among its logits is counted as wrong, is
/// left out of the loss, and is counted apart ([`AccuracyResult::num_non_finite`]).
#[derive(Debug)]
pub struct Accuracy {
    /// `[HEAD + 2 k]` f64: the head, the hits per class, the clips per class.
    counts: Tensor,
    num_classes: i64,
}

/// The outcome of a validation. Percentages are NaN when no clip was seen.
#[derive(Clone, Debug, PartialEq)]
pub struct AccuracyResult {
    pub num_clips: u64,
    /// Percent of clips whose label has the largest logit.
    pub top1: f64,
    /// Percent of clips whose label is among the 5 largest logits; 100 with 5 classes or fewer.
    pub top5: f64,
    /// Mean, over the classes that occur among the labels, of the percentage of their clips that
    /// are right. MMAction2 also counts a class that is only ever predicted, as 0 percent
    /// (`mmaction/evaluation/functional/accuracy.py`, `mean_class_accuracy`); the two agree when every
    /// class has a clip.
    pub mean_class: f64,
    /// Mean cross entropy of the clips with finite logits, without label smoothing.
    pub loss: f64,
    /// Clips with a logit that is not finite; already counted as wrong.
    pub num_non_finite: u64,
    /// By class.
    pub per_class: Vec<ClassCount>,
}

/// How often a class was right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassCount {
    /// Clips of this class whose top-1 is right.
    pub hits: u64,
    /// Clips of this class.
    pub total: u64,
}

impl Accuracy {
    /// Nothing counted yet. `device` is where the logits will be.
    pub fn new(num_classes: i64, device: Device) -> Accuracy {
        Accuracy {
            counts: Tensor::zeros([HEAD + 2 * num_classes], (Kind::Double, device)),
            num_classes,
        }
    }

    /// Counts a batch: `logits_nk` is `[n, k]` of any float kind, `labels_n` `[n]` of any integer kind.
    /// Leave padding out before (`narrow`): every row counts. Does not wait for the device.
    ///
    /// # Panics
    /// If the shapes do not fit, or a label is not in `0..k` (on CUDA, at the next read-back).
    pub fn update(&mut self, logits_nk: &Tensor, labels_n: &Tensor) {
        let (logits_shape, labels_shape) = (logits_nk.size(), labels_n.size());
        assert!(
            logits_shape.len() == 2
                && logits_shape[1] == self.num_classes
                && labels_shape == logits_shape[..1],
            "accuracy over {} classes: logits are {logits_shape:?}, labels {labels_shape:?}",
            self.num_classes
        );
        let n = logits_shape[0];
        if n == 0 {
            return;
        }
        let _no_grad = tch::no_grad_guard();
        let device = self.counts.device();
        let logits = logits_nk.to_device(device).to_kind(Kind::Float);
        let labels = labels_n.to_device(device).to_kind(Kind::Int64);
        let label_n1 = labels.unsqueeze(1);

        let finite = logits.isfinite().all_dim(1, false);
        let own = logits.gather(1, &label_n1, false);
        let class_1k = Tensor::arange(self.num_classes, (Kind::Int64, device)).unsqueeze(0);
        let tied_before = logits
            .eq_tensor(&own)
            .logical_and(&class_1k.lt_tensor(&label_n1));
        let ahead = logits.gt_tensor(&own).logical_or(&tied_before);
        let place = ahead.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
        let top1 = place.lt(1).logical_and(&finite).to_kind(Kind::Double);
        let top5 = place.lt(5).logical_and(&finite);
        let loss = logits.cross_entropy_loss::<Tensor>(&labels, None, Reduction::None, -100, 0.0);
        let loss = loss.masked_fill(&finite.logical_not(), 0.0);

        let total = |x: &Tensor| x.sum(Kind::Double);
        let num_finite = total(&finite);
        let num_clips = Tensor::full_like(&num_finite, n as f64);
        let num_non_finite = &num_clips - &num_finite;
        let head = Tensor::stack(
            &[
                &num_clips,
                &total(&top1),
                &total(&top5),
                &num_non_finite,
                &total(&loss),
            ],
            0,
        );
        let _ = self.counts.narrow(0, 0, HEAD).g_add_(&head);
        let _ = self
            .counts
            .narrow(0, HEAD, self.num_classes)
            .index_add_(0, &labels, &top1);
        let ones = Tensor::ones_like(&top1);
        let _ = self
            .counts
            .narrow(0, HEAD + self.num_classes, self.num_classes)
            .index_add_(0, &labels, &ones);
    }

    /// The counts as one `[5 + 2 k]` f64 vector, a copy: all-reduce it with a sum and give it to
    /// [`Self::from_tensor`].
    pub fn to_tensor(&self) -> Tensor {
        self.counts.copy()
    }

    /// Counts from a vector of [`Self::to_tensor`].
    ///
    /// # Panics
    /// If the vector has another shape than [`Self::to_tensor`] gives.
    pub fn from_tensor(counts: &Tensor) -> Accuracy {
        let shape = counts.size();
        assert!(
            shape.len() == 1
                && shape[0] > HEAD
                && (shape[0] - HEAD) % 2 == 0
                && counts.kind() == Kind::Double,
            "accuracy counts are {shape:?} {:?}, expected [5 + 2 k] Double",
            counts.kind()
        );
        Accuracy {
            counts: counts.copy(),
            num_classes: (shape[0] - HEAD) / 2,
        }
    }

    /// Reads the counts back from the device and divides.
    ///
    /// # Panics
    /// If the device failed before.
    pub fn result(&self) -> AccuracyResult {
        let counts = Vec::<f64>::try_from(&self.counts.to_device(Device::Cpu))
            .expect("one-dimensional f64 counts");
        let (head, classes) = counts.split_at(HEAD as usize);
        let (hits, totals) = classes.split_at(self.num_classes as usize);
        let [n, top1, top5, non_finite, loss_sum] = head else {
            unreachable!("HEAD slots")
        };
        let per_class: Vec<ClassCount> = hits
            .iter()
            .zip(totals)
            .map(|(&h, &t)| ClassCount {
                hits: h as u64,
                total: t as u64,
            })
            .collect();
        let seen: Vec<f64> = per_class
            .iter()
            .filter(|c| c.total > 0)
            .map(|c| 100.0 * c.hits as f64 / c.total as f64)
            .collect();
        AccuracyResult {
            num_clips: *n as u64,
            top1: 100.0 * top1 / n,
            top5: 100.0 * top5 / n,
            mean_class: seen.iter().sum::<f64>() / seen.len() as f64,
            loss: loss_sum / (n - non_finite),
            num_non_finite: *non_finite as u64,
            per_class,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(rows: &[&[f32]]) -> Tensor {
        Tensor::from_slice(&rows.concat()).view([rows.len() as i64, -1])
    }

    fn result_of(rows: &[&[f32]], labels: &[i64]) -> AccuracyResult {
        let mut accuracy = Accuracy::new(rows[0].len() as i64, Device::Cpu);
        accuracy.update(&logits(rows), &Tensor::from_slice(labels));
        accuracy.result()
    }

    #[test]
    fn counts_top1_top5_and_classes() {
        // Six classes, so that top-5 can miss; class 3 never occurs.
        let falling = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0];
        let r = result_of(&[&falling, &falling, &falling, &falling], &[0, 0, 4, 5]);
        assert_eq!((r.num_clips, r.num_non_finite), (4, 0));
        assert_eq!((r.top1, r.top5), (50.0, 75.0));
        // Classes 0, 4, 5 occur: 100, 0, 0 percent.
        assert!((r.mean_class - 100.0 / 3.0).abs() < 1e-12);
        assert_eq!(r.per_class[0], ClassCount { hits: 2, total: 2 });
        assert_eq!(r.per_class[3], ClassCount::default());
    }

    #[test]
    fn loss_is_the_mean_cross_entropy() {
        let r = result_of(&[&[0.0, 0.0], &[2.0, 0.0]], &[1, 0]);
        let expected = (2f64.ln() + (1.0 + (-2f64).exp()).ln()) / 2.0;
        assert!(
            (r.loss - expected).abs() < 1e-6,
            "{} against {expected}",
            r.loss
        );
    }

    #[test]
    fn top5_of_two_classes_is_everything() {
        let r = result_of(&[&[1.0, 0.0], &[1.0, 0.0]], &[1, 0]);
        assert_eq!((r.top1, r.top5), (50.0, 100.0));
    }

    #[test]
    fn ties_go_to_the_lower_class_so_a_constant_output_is_no_better_than_chance() {
        let same: &[f32] = &[1.0; 8];
        let r = result_of(&[same; 8], &[0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!((r.top1, r.top5), (12.5, 62.5));
    }

    #[test]
    fn top_k_without_ties_is_torch_topk() {
        let logits_nk = Tensor::arange(700, (Kind::Float, Device::Cpu))
            .view([70, 10])
            .sin();
        let labels: Vec<i64> = (0..70).map(|i| (i * 7) % 10).collect();
        let mut accuracy = Accuracy::new(10, Device::Cpu);
        accuracy.update(&logits_nk, &Tensor::from_slice(&labels));
        let (_, top) = logits_nk.topk(5, 1, true, true);
        let hits = top
            .eq_tensor(&Tensor::from_slice(&labels).unsqueeze(1))
            .sum(Kind::Int64)
            .int64_value(&[]);
        assert!(hits > 0 && hits < 70);
        assert_eq!(accuracy.result().top5, 100.0 * hits as f64 / 70.0);
    }

    #[test]
    fn non_finite_rows_are_wrong_and_reported() {
        // Each would be right by its label's logit alone.
        let rows: [&[f32]; 4] = [
            &[5.0, f32::NAN],
            &[f32::INFINITY, 0.0],
            &[f32::NAN, 0.0],
            &[3.0, 0.0],
        ];
        let r = result_of(&rows, &[0, 0, 0, 0]);
        assert_eq!((r.num_clips, r.num_non_finite), (4, 3));
        assert_eq!((r.top1, r.top5), (25.0, 25.0));
        assert!(
            (r.loss - (1.0 + (-3f64).exp()).ln()).abs() < 1e-6,
            "finite rows alone: {}",
            r.loss
        );
    }

    #[test]
    fn summed_vectors_of_ranks_equal_one_rank() {
        let logits_nk = Tensor::arange(60, (Kind::Float, Device::Cpu))
            .view([10, 6])
            .cos();
        let labels_n = Tensor::from_slice(&[0i64, 1, 2, 3, 4, 5, 0, 1, 2, 3]);
        let mut whole = Accuracy::new(6, Device::Cpu);
        whole.update(&logits_nk, &labels_n);
        let mut ranks = [Accuracy::new(6, Device::Cpu), Accuracy::new(6, Device::Cpu)];
        ranks[0].update(&logits_nk.narrow(0, 0, 7), &labels_n.narrow(0, 0, 7));
        ranks[1].update(&logits_nk.narrow(0, 7, 3), &labels_n.narrow(0, 7, 3));
        let sum = Accuracy::from_tensor(&(ranks[0].to_tensor() + ranks[1].to_tensor())).result();
        let whole = whole.result();
        assert_eq!(
            (sum.top1, sum.top5, &sum.per_class),
            (whole.top1, whole.top5, &whole.per_class)
        );
        assert!((sum.loss - whole.loss).abs() < 1e-9);
    }

    #[test]
    fn nothing_seen_is_not_a_number() {
        let r = Accuracy::new(3, Device::Cpu).result();
        assert!(r.top1.is_nan() && r.mean_class.is_nan() && r.loss.is_nan());
        assert_eq!(r.num_clips, 0);
    }

    #[test]
    #[should_panic(expected = "logits are [1, 2], labels [1]")]
    fn another_class_count_panics_with_both_shapes() {
        Accuracy::new(3, Device::Cpu).update(&logits(&[&[0.0, 1.0]]), &Tensor::from_slice(&[0i64]));
    }
}
