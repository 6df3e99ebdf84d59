//! The networks.

/// What a parameter is in TSM's optimizer groups (original code, `get_optim_policies`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamRole {
    FirstConvWeight,
    FirstConvBias,
    /// Weight of any other convolution.
    Weight,
    /// Bias of any other convolution.
    Bias,
    BnWeight,
    BnBias,
    FcWeight,
    FcBias,
}
