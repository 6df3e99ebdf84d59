use tch::{Device, Kind, Tensor};

use super::*;

/// The CUDA libraries, or why this machine has none; tests then stop, and say so.
fn loaded() -> Option<CudaInfo> {
    match load_cuda() {
        Ok(info) => Some(info),
        Err(why) => {
            eprintln!("skipped: {why}");
            None
        }
    }
}

#[test]
fn loading_ends_with_versions_or_a_reason() {
    match load_cuda() {
        Ok(info) => {
            eprintln!("{info:?}");
            assert!(info.nccl_version >= 22000, "{info:?}");
            assert!(
                info.device_count == 0 || info.runtime_version >= 13000,
                "{info:?}"
            );
            assert_eq!(info.device_count == 0, info.no_device.is_some(), "{info:?}");
            assert_eq!(info.device_count, tch::Cuda::device_count().max(0) as usize);
        }
        Err(why) => assert!(!why.is_empty()),
    }
    assert_eq!(load_cuda(), load_cuda());
}

#[test]
fn without_a_device_everything_is_an_error_and_nothing_crashes() {
    if load_cuda().is_ok_and(|info| info.device_count > 0) {
        eprintln!("skipped: there is a CUDA device");
        return;
    }
    assert!(Event::new(0).is_err());
    assert!(Stream::new(0, false).is_err());
    assert!(Graph::capture(0, || Ok(())).is_err());
    assert!(memory_stats(0).is_err());
    assert!(device(0).is_err());
    assert!(set_device(0).is_err());
    assert!(synchronize(Device::Cuda(0)).is_err());
    synchronize(Device::Cpu).unwrap();
}

#[test]
fn a_host_buffer_can_be_had_everywhere() {
    let _ = load_cuda();
    let buffer = pinned(1 << 16).unwrap();
    assert_eq!((buffer.size(), buffer.kind()), (vec![1 << 16], Kind::Uint8));
}

#[test]
fn the_shift_kernel_compiles_for_ampere_hopper_and_blackwell() {
    if loaded().is_none() {
        return;
    }
    for capability in [80, 90, 100] {
        let bytes = compile_shift(capability).unwrap();
        assert!(bytes > 1000, "sm_{capability}: {bytes} bytes");
    }
    let error = compile_shift(1).unwrap_err().to_string();
    assert!(error.contains("sm_1"), "{error}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_last_device_can_be_made_current_and_one_more_cannot() {
    let count = load_cuda().unwrap().device_count;
    set_device(count - 1).unwrap();
    assert!(set_device(count).is_err());
    assert!(set_device(usize::MAX).is_err());
    let x = Tensor::ones([4], (Kind::Float, Device::Cuda(count - 1)));
    assert_eq!(x.sum(Kind::Float).double_value(&[]), 4.0);
}

#[test]
#[ignore = "needs a CUDA device"]
fn events_order_and_time_work_on_streams() {
    load_cuda().unwrap();
    let cuda = (Kind::Float, Device::Cuda(0));
    let (start, end) = (Event::new(0).unwrap(), Event::new(0).unwrap());
    let x = Tensor::ones([2048, 2048], cuda);
    start.record().unwrap();
    let side = Stream::new(0, true).unwrap();
    let y = {
        let _guard = side.enter().unwrap();
        start.block_stream().unwrap();
        let y = x.matmul(&x);
        end.record().unwrap();
        y
    };
    end.block_stream().unwrap();
    assert_eq!(y.double_value(&[0, 0]), 2048.0);
    end.synchronize().unwrap();
    assert!(end.query().unwrap());
    assert!(end.elapsed_ms(&start).unwrap() > 0.0);
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_peak_remembers_what_was_freed() {
    load_cuda().unwrap();
    reset_peak_memory(0).unwrap();
    let before = memory_stats(0).unwrap();
    drop(Tensor::zeros([64 << 20], (Kind::Uint8, Device::Cuda(0))));
    let after = memory_stats(0).unwrap();
    assert!(
        after.peak_bytes >= before.allocated_bytes + (64 << 20),
        "{before:?} {after:?}"
    );
    assert!(pinned(4096).unwrap().is_pinned(Device::Cuda(0)));
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_graph_replays_on_the_same_memory() {
    load_cuda().unwrap();
    let mut x = Tensor::zeros([16], (Kind::Float, Device::Cuda(0)));
    let _ = x.g_add_scalar_(1.0);
    let graph = Graph::capture(0, || {
        let _ = x.g_add_scalar_(1.0);
        Ok(())
    })
    .unwrap();
    for _ in 0..3 {
        graph.replay().unwrap();
    }
    synchronize(Device::Cuda(0)).unwrap();
    assert_eq!(x.double_value(&[15]), 4.0);
}

#[test]
#[ignore = "needs a CUDA device"]
fn nccl_reduces_with_one_rank() {
    use std::time::Duration;

    use crate::dist::{ProcessGroup, ReduceOp, Store};

    load_cuda().unwrap();
    let limit = Duration::from_secs(60);
    let store = Store::tcp("127.0.0.1", 0, 1, true, limit).unwrap();
    let group = ProcessGroup::nccl(&store, 0, 1, 0, limit).unwrap();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let t = Tensor::full([1000], 3.0, (kind, Device::Cuda(0)));
        group
            .all_reduce_async(&t, ReduceOp::Avg)
            .unwrap()
            .wait()
            .unwrap();
        assert_eq!(t.double_value(&[999]), 3.0);
    }
    group.barrier(limit).unwrap();
    group.shutdown().unwrap();
}
