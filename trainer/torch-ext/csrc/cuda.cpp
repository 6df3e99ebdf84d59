// The CUDA plugin: a shared object of its own, which src/cuda.rs loads after libtorch_cuda. What it
// needs of libtorch and CUDA is resolved then.
#include "ext.h"

#include "cuda_shift.h"

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
// USE_C10D_NCCL is defined by build.rs.
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

using at::cuda::CUDAGraph;
using c10::cuda::CUDAStream;

namespace {

at::DeviceIndex index(int device) { return static_cast<at::DeviceIndex>(device); }

CUDAStream stream_of(int device, int64_t id) {
  return CUDAStream(c10::Stream(c10::Stream::UNSAFE, c10::Device(at::kCUDA, index(device)), id));
}

void nccl(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, int device, int64_t timeout_ms,
          c10::intrusive_ptr<c10d::Backend>& out) {
  const c10::cuda::CUDAGuard guard(index(device));
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = std::chrono::milliseconds(timeout_ms);
  out = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, world, options);
}

int nccl_version() {
  int version = 0;
  TORCH_CHECK(ncclGetVersion(&version) == ncclSuccess, "ncclGetVersion failed");
  return version;
}

// Without a driver the runtime does not even tell its version.
int runtime_version() {
  int version = 0;
  if (cudaRuntimeGetVersion(&version) != cudaSuccess) (void)cudaGetLastError();
  return version;
}

int device_count(std::string& why) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return count;
  (void)cudaGetLastError();
  why = cudaGetErrorString(status);
  return 0;
}

std::string device_name(int device) {
  cudaDeviceProp properties;
  C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  return properties.name;
}

int compute_capability(int device) {
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

void set_device(int device) { c10::cuda::set_device(index(device)); }

void synchronize(int device) {
  const c10::cuda::CUDAGuard guard(index(device));
  c10::cuda::device_synchronize();
}

void memory(int device, int64_t* allocated, int64_t* peak, int64_t* reserved) {
  constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(index(device));
  *allocated = stats.allocated_bytes[all].current;
  *peak = stats.allocated_bytes[all].peak;
  *reserved = stats.reserved_bytes[all].current;
}

void reset_peak(int device) { c10::cuda::CUDACachingAllocator::resetPeakStats(index(device)); }

struct Event {
  cudaEvent_t event;
  at::DeviceIndex device;
};
Event& event(void* e) { return *static_cast<Event*>(e); }

void* event_new(int device) {
  const c10::cuda::CUDAGuard guard(index(device));
  cudaEvent_t raw = nullptr;
  C10_CUDA_CHECK(cudaEventCreateWithFlags(&raw, cudaEventDefault));
  return new Event{raw, index(device)};
}
void event_free(void* e) {
  // At the end of the process the driver may be gone before the last event.
  (void)cudaEventDestroy(event(e).event);
  delete static_cast<Event*>(e);
}
void event_record(void* e) {
  const c10::cuda::CUDAGuard guard(event(e).device);
  C10_CUDA_CHECK(cudaEventRecord(event(e).event, c10::cuda::getCurrentCUDAStream()));
}
bool event_done(void* e) {
  const cudaError_t status = cudaEventQuery(event(e).event);
  if (status == cudaErrorNotReady) {
    (void)cudaGetLastError();
    return false;
  }
  C10_CUDA_CHECK(status);
  return true;
}
void event_synchronize(void* e) { C10_CUDA_CHECK(cudaEventSynchronize(event(e).event)); }
void event_block(void* e) {
  const c10::cuda::CUDAGuard guard(event(e).device);
  C10_CUDA_CHECK(cudaStreamWaitEvent(c10::cuda::getCurrentCUDAStream(), event(e).event, 0));
}
float event_elapsed_ms(void* start, void* end) {
  float ms = 0;
  C10_CUDA_CHECK(cudaEventElapsedTime(&ms, event(start).event, event(end).event));
  return ms;
}

int64_t stream_new(int device, bool high_priority) {
  return c10::cuda::getStreamFromPool(high_priority, index(device)).id();
}
int64_t stream_set(int device, int64_t id) {
  const int64_t previous = c10::cuda::getCurrentCUDAStream(index(device)).id();
  c10::cuda::setCurrentCUDAStream(stream_of(device, id));
  return previous;
}

CUDAGraph& graph(void* g) { return *static_cast<CUDAGraph*>(g); }
void* graph_new() { return new CUDAGraph(); }
void graph_free(void* g) { delete static_cast<CUDAGraph*>(g); }
// Thread-local: data threads may allocate pinned memory while a step is captured.
void graph_begin(void* g) { graph(g).capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal); }
void graph_end(void* g) { graph(g).capture_end(); }
void graph_replay(void* g) { graph(g).replay(); }

constexpr tsm::CudaApi kApi{
    tsm::shift_cuda,
    nccl,
    tsm::shift_cubin_bytes,
    runtime_version,
    nccl_version,
    device_count,
    device_name,
    compute_capability,
    set_device,
    synchronize,
    memory,
    reset_peak,
    event_new,
    event_free,
    event_record,
    event_done,
    event_synchronize,
    event_block,
    event_elapsed_ms,
    stream_new,
    stream_set,
    graph_new,
    graph_free,
    graph_begin,
    graph_end,
    graph_replay,
};

} // namespace

extern "C" __attribute__((visibility("default"))) const tsm::CudaApi* tsm_cuda_plugin() { return &kApi; }
