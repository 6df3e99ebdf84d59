//! Where the temporal shift acts, and by how much.

use tch::Tensor;
use tsm_job::config;
use tsm_torch_ext::ops::{self, ShiftPattern};

/// The shift of one layer's input `[n * num_segments, c, h, w]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shift {
    pub(super) num_segments: i64,
    /// Channels moved each way.
    pub(super) fold: i64,
    pub(super) pattern: ShiftPattern,
    /// Channels `[0, fold)` come from the previous segment instead of the next.
    pub(super) paddle: bool,
}

impl Shift {
    /// The shift for an input of `channels`; `None` for a TSN.
    ///
    /// # Errors
    /// When `shift.div` leaves no channel to shift, or asks for more than there are.
    pub(super) fn new(
        cfg: &config::Shift,
        num_segments: i64,
        channels: i64,
        layer: &str,
    ) -> Result<Option<Shift>, String> {
        let pattern = match cfg.mode {
            config::ShiftMode::None => return Ok(None),
            config::ShiftMode::Bi => ShiftPattern::Bi,
            config::ShiftMode::Uni => ShiftPattern::Uni,
        };
        let fold = channels.checked_div(i64::from(cfg.div)).unwrap_or(0);
        if fold == 0 || 2 * fold > channels {
            return Err(format!(
                "model.shift.div is {}, but {layer} has {channels} channels: the shift would move {fold} of them \
                 each way; set it between 2 and {channels}",
                cfg.div
            ));
        }
        let paddle = cfg.direction == config::ShiftDirection::Paddle;
        Ok(Some(Shift {
            num_segments,
            fold,
            pattern,
            paddle,
        }))
    }

    /// # Panics
    /// If the first dimension is not a multiple of `num_segments`.
    pub(super) fn apply(&self, x: &Tensor) -> Tensor {
        ops::temporal_shift(x, self.num_segments, self.fold, self.pattern, self.paddle)
            .unwrap_or_else(|e| {
                panic!(
                    "temporal shift of {:?} in {} segments, fold {}: {e}",
                    x.size(),
                    self.num_segments,
                    self.fold
                )
            })
    }
}

/// Halves the segments of `[n * num_segments, c, h, w]`: a max pool over time of kernel 3,
/// stride 2, padding 1. The memory format stays.
///
/// # Panics
/// If the first dimension is not a multiple of `num_segments`.
pub(super) fn temporal_max_pool(x: &Tensor, num_segments: i64) -> Tensor {
    let (nt, c, h, w) = x.size4().expect("activations have four dimensions");
    // A frame is one row of an image whose height is time, whatever the order within the frame:
    // the pool then never has to leave channels_last.
    let pool = |frames: &Tensor| {
        frames
            .view([nt / num_segments, 1, num_segments, c * h * w])
            .max_pool2d([3, 1], [2, 1], [1, 0], [1, 1], false)
    };
    if ops::is_channels_last(x) {
        pool(&x.permute([0, 2, 3, 1]))
            .view([-1, h, w, c])
            .permute([0, 3, 1, 2])
    } else {
        pool(&x.contiguous()).view([-1, c, h, w])
    }
}
