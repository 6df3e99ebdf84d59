//! Which gradients travel together, and the memory they lie in.

use tch::{Kind, Tensor};
use tsm_torch_ext::ops::set_grad;

/// Gradients that are reduced in one piece.
#[derive(Debug)]
pub struct Bucket {
    /// One-dimensional; gradients at 64-byte steps, the gaps stay zero.
    pub flat: Tensor,
    /// What travels: `flat`, and in one bucket of an engine 64 bytes more, the first element of
    /// which is the ranks' votes to stop.
    pub(super) wire: Tensor,
    pub members: Vec<Member>,
}

/// A parameter's place in its bucket.
#[derive(Debug)]
pub struct Member {
    /// Index into the parameters given to [`super::Ddp::new`].
    pub param: usize,
    /// The gradient: a view of `flat` with the parameter's shape and strides.
    pub view: Tensor,
    /// First element in `flat`.
    pub offset: i64,
}

/// Every gradient starts at such a step, so that vector loads of the optimizer stay aligned.
const ALIGN_BYTES: usize = 64;

/// Cuts gradients, in the order they become ready, into buckets of one kind each.
///
/// A bucket closes when it holds at least its limit: `first` bytes for the first of its kind,
/// `rest` for the others. Buckets come in the order in which their last gradient is ready.
pub fn layout(
    order: &[usize],
    bytes: &[usize],
    kinds: &[Kind],
    first: usize,
    rest: usize,
) -> Vec<Vec<usize>> {
    struct Open {
        kind: Kind,
        limit: usize,
        size: usize,
        members: Vec<usize>,
        last: usize,
    }
    let mut open: Vec<Open> = Vec::new();
    let mut closed = Vec::new();
    for (position, &param) in order.iter().enumerate() {
        let at = open
            .iter()
            .position(|o| o.kind == kinds[param])
            .unwrap_or_else(|| {
                open.push(Open {
                    kind: kinds[param],
                    limit: first,
                    size: 0,
                    members: Vec::new(),
                    last: 0,
                });
                open.len() - 1
            });
        let bucket = &mut open[at];
        bucket.members.push(param);
        bucket.size += bytes[param];
        bucket.last = position;
        if bucket.size >= bucket.limit {
            closed.push(std::mem::take(&mut bucket.members));
            bucket.size = 0;
            bucket.limit = rest;
        }
    }
    open.retain(|o| !o.members.is_empty());
    open.sort_by_key(|o| o.last);
    closed.extend(open.into_iter().map(|o| o.members));
    closed
}

impl Bucket {
    /// Allocates a zeroed bucket, with or without a place for votes, and makes its views the
    /// gradients of `members` of `params`.
    ///
    /// # Errors
    /// A parameter whose memory is not dense, or that refuses the gradient.
    pub(super) fn allocate(
        members: &[usize],
        params: &[Tensor],
        votes: bool,
    ) -> anyhow::Result<Bucket> {
        let (kind, device) = (params[members[0]].kind(), params[members[0]].device());
        let step = ALIGN_BYTES / kind.elt_size_in_bytes();
        let mut offsets = Vec::with_capacity(members.len());
        let mut length = 0;
        for &param in members {
            offsets.push(length);
            length += params[param].numel().next_multiple_of(step) as i64;
        }
        let behind = if votes { step as i64 } else { 0 };
        let wire = Tensor::f_zeros([length + behind], (kind, device))?;
        let flat = wire.f_narrow(0, 0, length)?;
        let members = members
            .iter()
            .zip(offsets)
            .map(|(&param, offset)| {
                let p = &params[param];
                anyhow::ensure!(
                    is_dense(&p.size(), &p.stride()),
                    "a parameter of shape {:?} has strides {:?}: it must fill its memory without gaps",
                    p.size(),
                    p.stride()
                );
                let view = flat.f_as_strided(p.size(), p.stride(), offset)?;
                set_grad(p, Some(&view))?;
                Ok(Member {
                    param,
                    view,
                    offset,
                })
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Bucket {
            flat,
            wire,
            members,
        })
    }

    /// A float32 bucket of the same layout: its flat tensor, and a view per member.
    pub fn like(&self, kind: Kind) -> anyhow::Result<(Tensor, Vec<Tensor>)> {
        let flat = self.flat.f_zeros_like()?.f_to_kind(kind)?;
        let views = self
            .members
            .iter()
            .map(|m| flat.f_as_strided(m.view.size(), m.view.stride(), m.offset))
            .collect::<Result<_, _>>()?;
        Ok((flat, views))
    }
}

/// Whether the strides are those of some order of the dimensions without gaps.
fn is_dense(size: &[i64], stride: &[i64]) -> bool {
    let mut dims: Vec<(i64, i64)> = stride
        .iter()
        .copied()
        .zip(size.iter().copied())
        .filter(|&(_, n)| n != 1)
        .collect();
    dims.sort_unstable();
    let mut next = 1;
    dims.iter().all(|&(stride, n)| {
        let fits = stride == next;
        next *= n;
        fits
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn the_first_bucket_is_small_and_kinds_do_not_mix() {
        let kinds = [
            Kind::Half,
            Kind::Float,
            Kind::Half,
            Kind::Half,
            Kind::Float,
            Kind::Half,
        ];
        let bytes = [10, 1, 10, 30, 1, 5];
        let order = [5, 4, 3, 2, 1, 0];
        assert_eq!(
            layout(&order, &bytes, &kinds, 5, 35),
            [vec![5], vec![3, 2], vec![4, 1], vec![0]]
        );
    }

    #[test]
    fn every_gradient_has_one_place() {
        let bytes = vec![7; 100];
        let kinds = vec![Kind::Float; 100];
        let order: Vec<usize> = (0..100).rev().collect();
        let buckets = layout(&order, &bytes, &kinds, 20, 50);
        assert_eq!(buckets[0].len(), 3);
        assert_eq!(buckets[1].len(), 8);
        assert_eq!(buckets.concat(), order);
    }

    #[test]
    fn views_keep_the_parameters_strides_and_do_not_overlap() {
        let options = (Kind::Float, Device::Cpu);
        let plain = Tensor::zeros([3, 5], options).set_requires_grad(true);
        let nhwc = tsm_torch_ext::ops::to_channels_last(&Tensor::zeros([4, 3, 2, 2], options))
            .unwrap()
            .set_requires_grad(true);
        let bucket = Bucket::allocate(
            &[1, 0],
            &[plain.shallow_clone(), nhwc.shallow_clone()],
            true,
        )
        .unwrap();
        assert_eq!(bucket.flat.size(), [48 + 16]);
        assert_eq!(bucket.wire.size(), [48 + 16 + 16]);
        assert_eq!(nhwc.grad().stride(), nhwc.stride());
        let _ = plain.grad().fill_(1.0);
        let _ = nhwc.grad().fill_(2.0);
        assert_eq!(
            f64::try_from(bucket.flat.sum(Kind::Double)).unwrap(),
            15.0 + 96.0
        );
    }

    #[test]
    fn a_parameter_with_gaps_is_refused() {
        assert!(is_dense(&[4, 3, 2, 2], &[12, 1, 6, 3]));
        assert!(is_dense(&[], &[]));
        assert!(is_dense(&[5, 1], &[1, 77]));
        assert!(!is_dense(&[5, 2], &[4, 1]));
        assert!(!is_dense(&[5, 2], &[0, 1]));
    }
}
