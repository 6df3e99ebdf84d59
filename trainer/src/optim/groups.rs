//! Which learning rate and weight decay a parameter gets: a pure map from its role.

use crate::model::ParamRole;
use tsm_job::config::Groups;

/// Weight decay of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decay {
    /// A multiple of `optim.weight_decay`.
    Times(f64),
    /// This value, whatever `optim.weight_decay` is.
    Fixed(f64),
}

impl Decay {
    /// The decay used, given `optim.weight_decay`.
    pub fn resolve(self, weight_decay: f64) -> f64 {
        match self {
            Decay::Times(factor) => factor * weight_decay,
            Decay::Fixed(value) => value,
        }
    }
}

/// Parameters that share a learning rate and a weight decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// The original code's name of the group, for the report.
    pub name: &'static str,
    /// Multiplies the scheduled learning rate.
    pub lr_mult: f64,
    pub decay: Decay,
}

const fn group(name: &'static str, lr_mult: f64, decay: f64) -> Group {
    Group {
        name,
        lr_mult,
        decay: Decay::Times(decay),
    }
}

/// The group of a parameter.
///
/// `TsmFcLr5` and `Tsm` are the original code's policies with and without `fc_lr5`
/// (mit-han-lab/temporal-shift-module, `ops/models.py`); `Paddle` is PaddleVideo's
/// `resnet_tsm.py` and `tsm_head.py`, where the classifier's decay is 1e-4 whatever the others'
/// is; `Flat` puts everything, BatchNorm included, into one group (MMAction2's TSN).
pub fn group_of(groups: Groups, role: ParamRole) -> Group {
    use ParamRole::*;
    const ALL: Group = group("all", 1.0, 1.0);
    const FIRST_WEIGHT: Group = group("first_conv_weight", 1.0, 1.0);
    const FIRST_BIAS: Group = group("first_conv_bias", 2.0, 0.0);
    const WEIGHT: Group = group("normal_weight", 1.0, 1.0);
    const BIAS: Group = group("normal_bias", 2.0, 0.0);
    const BN: Group = group("BN scale/shift", 1.0, 0.0);
    const FC_BIAS_LR10: Group = group("lr10_bias", 10.0, 0.0);
    match (groups, role) {
        (Groups::Flat, _) => ALL,
        (_, FirstConvWeight) => FIRST_WEIGHT,
        (_, Weight) => WEIGHT,
        (_, BnWeight | BnBias) => BN,
        (Groups::Paddle, FirstConvBias | Bias) => group("conv_bias", 1.0, 1.0),
        (_, FirstConvBias) => FIRST_BIAS,
        (_, Bias) => BIAS,
        (Groups::Tsm, FcWeight) => WEIGHT,
        (Groups::Tsm, FcBias) => BIAS,
        (Groups::TsmFcLr5, FcWeight) => group("lr5_weight", 5.0, 1.0),
        (Groups::Paddle, FcWeight) => Group {
            name: "fc_weight",
            lr_mult: 5.0,
            decay: Decay::Fixed(1e-4),
        },
        (Groups::TsmFcLr5 | Groups::Paddle, FcBias) => FC_BIAS_LR10,
    }
}

/// The groups in use, in order of first appearance, each with the indices of its parameters.
pub fn split(
    groups: Groups,
    roles: impl IntoIterator<Item = ParamRole>,
) -> Vec<(Group, Vec<usize>)> {
    let mut out: Vec<(Group, Vec<usize>)> = Vec::new();
    for (i, role) in roles.into_iter().enumerate() {
        let group = group_of(groups, role);
        match out.iter_mut().find(|(g, _)| *g == group) {
            Some((_, members)) => members.push(i),
            None => out.push((group, vec![i])),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use ParamRole::*;

    /// Role counts of ResNet-18 with a classifier: 20 convolutions, 20 BatchNorms.
    fn resnet18() -> Vec<ParamRole> {
        let mut roles = vec![FirstConvWeight, BnWeight, BnBias];
        for _ in 0..19 {
            roles.extend([Weight, BnWeight, BnBias]);
        }
        roles.extend([FcWeight, FcBias]);
        roles
    }

    fn summary(groups: Groups) -> Vec<(&'static str, f64, f64, usize)> {
        split(groups, resnet18())
            .into_iter()
            .map(|(g, members)| (g.name, g.lr_mult, g.decay.resolve(5e-4), members.len()))
            .collect()
    }

    #[test]
    fn tsm_groups_have_the_original_codes_sizes() {
        // ResNet-18 in the original code: 1 first weight, 20 weights, 1 bias, 40 BatchNorm tensors.
        assert_eq!(
            summary(Groups::Tsm),
            [
                ("first_conv_weight", 1.0, 5e-4, 1),
                ("BN scale/shift", 1.0, 0.0, 40),
                ("normal_weight", 1.0, 5e-4, 20),
                ("normal_bias", 2.0, 0.0, 1),
            ]
        );
        assert_eq!(
            summary(Groups::TsmFcLr5),
            [
                ("first_conv_weight", 1.0, 5e-4, 1),
                ("BN scale/shift", 1.0, 0.0, 40),
                ("normal_weight", 1.0, 5e-4, 19),
                ("lr5_weight", 5.0, 5e-4, 1),
                ("lr10_bias", 10.0, 0.0, 1),
            ]
        );
    }

    #[test]
    fn paddle_fixes_the_classifiers_decay() {
        let rows = summary(Groups::Paddle);
        assert_eq!(rows[3], ("fc_weight", 5.0, 1e-4, 1));
        assert_eq!(rows[4], ("lr10_bias", 10.0, 0.0, 1));
        assert_eq!(rows[1], ("BN scale/shift", 1.0, 0.0, 40));
    }

    #[test]
    fn flat_decays_everything_alike() {
        assert_eq!(summary(Groups::Flat), [("all", 1.0, 5e-4, 62)]);
    }
}
