//! From pooled frames to the logits of a clip.

use super::layers::{Builder, Linear};
use tch::{Kind, Tensor};
use tsm_job::config;

/// Dropout, classifier and the mean over segments, in the order the configuration names.
pub(super) struct Head {
    classifier: Linear,
    order: config::HeadOrder,
    dropout: f64,
    /// Segments that reach the head: half of the clip's after a temporal pool.
    num_segments: i64,
}

impl Head {
    pub(super) fn new(
        b: &mut Builder,
        cfg: &config::Model,
        name: &str,
        features: i64,
        num_segments: i64,
    ) -> Head {
        Head {
            classifier: b.classifier(
                name,
                features,
                i64::from(cfg.num_classes),
                cfg.head.init_std,
            ),
            order: cfg.head.order,
            dropout: cfg.head.dropout,
            num_segments,
        }
    }

    /// `features_nc` is `[n * t, c]`; the logits are `[n, k]` in float32.
    pub(super) fn forward(&self, features_nc: &Tensor, train: bool) -> Tensor {
        let mean = |x: &Tensor, kind: Kind| {
            let channels = x.size()[1];
            x.view([-1, self.num_segments, channels])
                .mean_dim(1i64, false, kind)
        };
        match self.order {
            config::HeadOrder::DropoutFcMean => mean(
                &self
                    .classifier
                    .forward(&features_nc.dropout(self.dropout, train)),
                Kind::Float,
            ),
            config::HeadOrder::MeanDropoutFc => {
                let clip = mean(features_nc, features_nc.kind());
                self.classifier
                    .forward(&clip.dropout(self.dropout, train))
                    .to_kind(Kind::Float)
            }
        }
    }

    pub(super) fn macs(&self) -> u64 {
        match self.order {
            config::HeadOrder::DropoutFcMean => self.num_segments as u64 * self.classifier.macs(),
            config::HeadOrder::MeanDropoutFc => self.classifier.macs(),
        }
    }
}
