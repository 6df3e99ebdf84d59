//! One buffer that several threads fill at once, each its own slot.

use std::cell::UnsafeCell;
use std::sync::Arc;

/// The buffer, in a place that does not move while slots point into it.
struct Slab<B> {
    buffer: UnsafeCell<B>,
}

// SAFETY: no reference to the buffer is made between `split` and `Owner::join`; the slots reach
// its bytes through pointers to disjoint ranges.
#[expect(
    unsafe_code,
    reason = "threads fill disjoint ranges of one buffer without a copy"
)]
unsafe impl<B: Send> Sync for Slab<B> {}

/// The right to have the buffer back.
pub struct Owner<B>(Arc<Slab<B>>);

/// The right to write one range of the buffer.
pub struct Slot<B> {
    // Keeps the bytes alive, whoever goes first.
    _slab: Arc<Slab<B>>,
    start: *mut u8,
    len: usize,
}

// SAFETY: a slot is the only one with its range, and its slab is `Send` and `Sync` for `B: Send`.
#[expect(
    unsafe_code,
    reason = "a slot is a `&mut [u8]` that owns its buffer's life"
)]
unsafe impl<B: Send> Send for Slot<B> {}

/// Cuts the first `num * len` bytes of `buffer` into slots.
///
/// # Panics
/// If the buffer is smaller.
pub fn split<B: AsMut<[u8]> + Send>(buffer: B, num: usize, len: usize) -> (Owner<B>, Vec<Slot<B>>) {
    let slab = Arc::new(Slab {
        buffer: UnsafeCell::new(buffer),
    });
    // SAFETY: this thread alone knows the slab; the reference ends with the block.
    #[expect(unsafe_code, reason = "as above")]
    let base = unsafe {
        let bytes: &mut [u8] = (*slab.buffer.get()).as_mut();
        assert!(
            bytes.len() >= num * len,
            "{num} slots of {len} bytes in {}",
            bytes.len()
        );
        bytes.as_mut_ptr()
    };
    let slots = (0..num)
        .map(|i| Slot {
            _slab: Arc::clone(&slab),
            start: base.wrapping_add(i * len),
            len,
        })
        .collect();
    (Owner(slab), slots)
}

impl<B> Slot<B> {
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the range is inside the buffer (checked by `split`), which `_slab` keeps alive
        // and in place; no other slot has it and the owner cannot touch it before all are gone.
        #[expect(unsafe_code, reason = "as above")]
        unsafe {
            std::slice::from_raw_parts_mut(self.start, self.len)
        }
    }
}

impl<B> Owner<B> {
    /// The buffer, once every slot is dropped; `None` before.
    pub fn join(self) -> Option<B> {
        Arc::into_inner(self.0).map(|slab| slab.buffer.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_fill_their_slots() {
        let (owner, slots) = split(vec![0u8; 10], 3, 3);
        std::thread::scope(|scope| {
            for (i, mut slot) in slots.into_iter().enumerate() {
                scope.spawn(move || slot.bytes().fill(i as u8 + 1));
            }
        });
        assert_eq!(owner.join().unwrap(), [1, 1, 1, 2, 2, 2, 3, 3, 3, 0]);
    }

    #[test]
    fn bytes_stored_inside_the_buffer_itself_do_not_move() {
        let (owner, mut slots) = split([0u8; 4], 2, 2);
        slots[1].bytes().fill(7);
        drop(slots);
        assert_eq!(owner.join().unwrap(), [0, 0, 7, 7]);
    }

    #[test]
    fn the_buffer_comes_back_only_after_the_last_slot() {
        let (owner, slots) = split(vec![0u8; 4], 2, 2);
        assert!(owner.join().is_none());
        drop(slots);
    }

    #[test]
    #[should_panic(expected = "3 slots of 4 bytes in 11")]
    fn a_small_buffer_is_refused() {
        split(vec![0u8; 11], 3, 4);
    }
}
