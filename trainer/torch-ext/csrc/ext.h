// The C surface of this crate: what src/*.rs declares again. Every function catches C++ exceptions;
// a non-zero or null result means tsm_last_error() of the same thread has the message.
#pragma once
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>

namespace c10d {
class Store;
class Backend;
} // namespace c10d

namespace tsm {

std::string& last_error();

template <typename F>
int guard(F&& body) {
  try {
    body();
    return 0;
  } catch (const c10::Error& e) {
    last_error() = e.what_without_backtrace();
  } catch (const std::exception& e) {
    last_error() = e.what();
  } catch (...) {
    last_error() = "unknown C++ exception";
  }
  return 1;
}

inline std::vector<at::Tensor> tensors(at::Tensor* const* ptrs, size_t count) {
  std::vector<at::Tensor> out;
  out.reserve(count);
  for (size_t i = 0; i < count; i++) out.push_back(*ptrs[i]);
  return out;
}

// One temporal shift without gradient: `out` has the strides of `in`. Channels [0, fold) come from
// segment t + dir_a, [fold, 2 * fold) from t + dir_b; directions are -1, 0 or 1.
struct ShiftSpec {
  int64_t segments;
  int64_t fold;
  int64_t dir_a;
  int64_t dir_b;
};

// What the CUDA plugin offers. It is loaded at run time, so that one program serves machines with and
// without CUDA. Its functions throw; the extern "C" functions that call them catch.
struct CudaApi {
  void (*shift)(const at::Tensor& in, const at::Tensor& out, const ShiftSpec& spec);
  void (*nccl)(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, int device, int64_t timeout_ms,
               c10::intrusive_ptr<c10d::Backend>& out);

  size_t (*shift_cubin_bytes)(int capability);

  int (*runtime_version)();
  int (*nccl_version)();
  // 0 where there is no driver or no device; `why` then has CUDA's reason.
  int (*device_count)(std::string& why);
  std::string (*device_name)(int device);
  int (*compute_capability)(int device);

  void (*set_device)(int device);
  void (*synchronize)(int device);
  void (*memory)(int device, int64_t* allocated, int64_t* peak, int64_t* reserved);
  void (*reset_peak)(int device);

  void* (*event_new)(int device);
  void (*event_free)(void* event);
  void (*event_record)(void* event);
  bool (*event_done)(void* event);
  void (*event_synchronize)(void* event);
  // The current stream of the event's device waits; the host does not.
  void (*event_block)(void* event);
  float (*event_elapsed_ms)(void* start, void* end);

  int64_t (*stream_new)(int device, bool high_priority);
  // Makes `stream` current on `device` for this thread and returns the one it replaces.
  int64_t (*stream_set)(int device, int64_t stream);

  void* (*graph_new)();
  void (*graph_free)(void* graph);
  void (*graph_begin)(void* graph);
  void (*graph_end)(void* graph);
  void (*graph_replay)(void* graph);
};

// Null until the plugin is loaded.
extern const CudaApi* cuda_api;
// Throws where it is null.
const CudaApi& cuda();

} // namespace tsm
