//! Gradient hooks, and a backward pass that reports what they said.

use std::any::Any;
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;

use super::{Ptr, ptr};
use crate::error::{Result, check};

type Hook = Box<dyn Fn() -> std::result::Result<(), String> + Send + Sync>;

#[expect(unsafe_code, reason = "declarations of csrc/core.cpp")]
unsafe extern "C" {
    fn tsm_on_grad_ready(
        p: Ptr,
        call: extern "C" fn(*const c_void, *mut c_void) -> c_int,
        drop: extern "C" fn(*mut c_void),
        user: *mut c_void,
    ) -> c_int;
    fn tsm_hook_message(sink: *mut c_void, text: *const c_char, length: usize);
    fn tsm_backward(loss: Ptr) -> c_int;
}

/// Calls `f` each time the gradient of the leaf `p` has been accumulated in a backward pass.
///
/// It runs on the autograd thread of the device, before other gradients are ready; what it
/// starts overlaps with the rest of the pass. If it returns an error or panics, [`backward`]
/// ends with that message; it may change `p`'s gradient. A later call for the same tensor
/// replaces the hook. `p` owns `f`, so an `f` that owns `p` is never freed.
///
/// # Errors
/// If `p` is not a leaf that requires a gradient.
pub fn on_grad_ready(
    p: &Tensor,
    f: impl Fn() -> std::result::Result<(), String> + Send + Sync + 'static,
) -> Result<()> {
    let hook: Box<Hook> = Box::new(Box::new(f));
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: `p` is a live tensor; the hook is handed over and freed by `drop_hook`, and may be
    // called from any thread, as `Send + Sync` allows.
    check(unsafe { tsm_on_grad_ready(ptr(p), call_hook, drop_hook, Box::into_raw(hook).cast()) })
}

extern "C" fn call_hook(user: *const c_void, sink: *mut c_void) -> c_int {
    #[expect(unsafe_code, reason = "the pointer given to tsm_on_grad_ready")]
    // SAFETY: `user` is the `Box<Hook>` of `on_grad_ready`, alive until `drop_hook`.
    let hook: &Hook = unsafe { &*user.cast::<Hook>() };
    // Unwinding into C++ is undefined. Whatever state the panic left is the caller's, who ends
    // the step with this error.
    let message = match catch_unwind(AssertUnwindSafe(hook)) {
        Ok(Ok(())) => return 0,
        Ok(Err(message)) => message,
        Err(panic) => format!("a gradient hook panicked: {}", panic_message(&*panic)),
    };
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: `sink` is the C++ string that waits for the message, which is copied.
    unsafe {
        tsm_hook_message(sink, message.as_ptr().cast(), message.len());
    }
    1
}

extern "C" fn drop_hook(user: *mut c_void) {
    #[expect(unsafe_code, reason = "the pointer given to tsm_on_grad_ready")]
    // SAFETY: called once, by the owner of the `Box<Hook>`.
    drop(unsafe { Box::from_raw(user.cast::<Hook>()) });
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    if let Some(text) = panic.downcast_ref::<String>() {
        text
    } else if let Some(text) = panic.downcast_ref::<&str>() {
        text
    } else {
        "no message"
    }
}

/// Accumulates the gradients of the scalar `loss`, like [`Tensor::backward`], but returns the error:
/// of an operation, or of a hook of [`on_grad_ready`].
///
/// # Errors
/// If an operation of the backward pass or a hook failed; gradients are then incomplete.
pub fn backward(loss: &Tensor) -> Result<()> {
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: `loss` is a live tensor.
    check(unsafe { tsm_backward(ptr(loss)) })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::ops::set_grad;

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn leaf() -> Tensor {
        Tensor::ones([3], F32).set_requires_grad(true)
    }

    #[test]
    fn a_hook_fires_once_a_pass_after_all_uses_are_summed() {
        let p = leaf();
        let seen = Arc::new(AtomicUsize::new(0));
        let count = seen.clone();
        on_grad_ready(&p, move || {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
        .unwrap();
        for pass in 1..=2 {
            backward(&(&p * &p + &p * 3.0).sum(Kind::Float)).unwrap();
            assert_eq!(seen.load(Ordering::Relaxed), pass);
        }
        assert_eq!(p.grad().double_value(&[0]), 10.0);
    }

    #[test]
    fn a_hook_may_replace_the_gradient() {
        let p = leaf();
        let bucket = Tensor::zeros([3], F32);
        let (view, q) = (
            Mutex::new(bucket.shallow_clone()),
            Mutex::new(p.shallow_clone()),
        );
        on_grad_ready(&p, move || {
            let (mut view, q) = (view.lock().unwrap(), q.lock().unwrap());
            view.copy_(&q.grad());
            set_grad(&q, Some(&view)).map_err(|e| e.to_string())
        })
        .unwrap();
        backward(&(&p * 4.0).sum(Kind::Float)).unwrap();
        assert_eq!(p.grad().data_ptr(), bucket.data_ptr());
        assert_eq!(bucket.double_value(&[2]), 4.0);
        // The hook owns the tensor that owns it: cut the circle.
        on_grad_ready(&p, || Ok(())).unwrap();
    }

    #[test]
    fn an_error_of_a_hook_is_the_error_of_backward() {
        let p = leaf();
        on_grad_ready(&p, || Err("bucket 3 is gone".to_owned())).unwrap();
        let error = backward(&p.sum(Kind::Float)).unwrap_err();
        assert_eq!(error.to_string(), "bucket 3 is gone");
    }

    #[test]
    fn a_panic_of_a_hook_is_the_error_of_backward() {
        let p = leaf();
        on_grad_ready(&p, || panic!("index {}", 7)).unwrap();
        let error = backward(&p.sum(Kind::Float)).unwrap_err();
        assert!(error.to_string().contains("panicked: index 7"), "{error}");
    }

    #[test]
    fn replacing_a_hook_frees_the_old_one_and_a_refused_one() {
        let token = Arc::new(());
        let hook = |token: &Arc<()>| {
            let token = token.clone();
            move || {
                let _ = &token;
                Ok(())
            }
        };
        let p = leaf();
        on_grad_ready(&p, hook(&token)).unwrap();
        assert_eq!(Arc::strong_count(&token), 2);
        on_grad_ready(&p, || Ok(())).unwrap();
        assert_eq!(Arc::strong_count(&token), 1);
        let error = on_grad_ready(&(&p * 2.0), hook(&token)).unwrap_err();
        assert!(error.to_string().contains("not a leaf"), "{error}");
        assert_eq!(Arc::strong_count(&token), 1);
    }

    #[test]
    fn backward_names_the_operation_that_failed() {
        let error = backward(&Tensor::ones([2], F32)).unwrap_err();
        assert!(
            error.to_string().contains("does not require grad"),
            "{error}"
        );
        assert!(!error.to_string().contains("frame #"), "{error}");
    }
}
