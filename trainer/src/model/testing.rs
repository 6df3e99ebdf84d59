//! What tests of this crate share.

use tsm_job::config::{Arch, Head, HeadOrder, Model, Shift, ShiftDirection, ShiftMode, ShiftPlace};

/// The published network for 8 segments and 10 classes, without dropout.
pub(crate) fn config(arch: Arch, mode: ShiftMode) -> Model {
    Model {
        arch,
        width: 1.0,
        num_classes: 10,
        num_segments: 8,
        shift: Shift {
            mode,
            direction: ShiftDirection::Mit,
            div: 8,
            place: ShiftPlace::Blockres,
            n_round: None,
        },
        temporal_pool: false,
        head: Head {
            order: HeadOrder::DropoutFcMean,
            dropout: 0.0,
            init_std: 0.001,
        },
        partial_bn: false,
        weights: None,
        weights_min_coverage: 0.9,
    }
}
