// The extern "C" side of CudaApi: each function calls the plugin and catches.
#include "ext.h"

#include <cstring>

#include <ATen/ops/empty.h>

using tsm::cuda;
using tsm::guard;

extern "C" {

void tsm_cuda_register(const tsm::CudaApi* api) { tsm::cuda_api = api; }

struct TsmCudaInfo {
  int32_t device_count;
  int32_t runtime_version;
  int32_t nccl_version;
  char why[256];
};
int tsm_cuda_info(TsmCudaInfo* out) {
  return guard([&] {
    std::string why;
    out->device_count = cuda().device_count(why);
    out->runtime_version = cuda().runtime_version();
    out->nccl_version = cuda().nccl_version();
    std::strncpy(out->why, why.c_str(), sizeof(out->why) - 1);
  });
}

struct TsmCudaDevice {
  int32_t compute_capability;
  char name[256];
};
int tsm_cuda_device(int device, TsmCudaDevice* out) {
  return guard([&] {
    out->compute_capability = cuda().compute_capability(device);
    std::strncpy(out->name, cuda().device_name(device).c_str(), sizeof(out->name) - 1);
  });
}

int tsm_cuda_shift_cubin_bytes(int capability, size_t* out) {
  return guard([&] { *out = cuda().shift_cubin_bytes(capability); });
}
int tsm_cuda_set_device(int device) {
  return guard([&] { cuda().set_device(device); });
}
int tsm_cuda_synchronize(int device) {
  return guard([&] { cuda().synchronize(device); });
}
int tsm_cuda_memory(int device, int64_t* allocated, int64_t* peak, int64_t* reserved) {
  return guard([&] { cuda().memory(device, allocated, peak, reserved); });
}
int tsm_cuda_reset_peak(int device) {
  return guard([&] { cuda().reset_peak(device); });
}
int tsm_empty_bytes(int64_t bytes, int pinned, at::Tensor** out) {
  return guard([&] {
    *out = new at::Tensor(at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(pinned != 0)));
  });
}

int tsm_event_new(int device, void** out) {
  return guard([&] { *out = cuda().event_new(device); });
}
void tsm_event_free(void* e) { cuda().event_free(e); }
int tsm_event_record(void* e) {
  return guard([&] { cuda().event_record(e); });
}
int tsm_event_done(void* e, int* out) {
  return guard([&] { *out = cuda().event_done(e); });
}
int tsm_event_synchronize(void* e) {
  return guard([&] { cuda().event_synchronize(e); });
}
int tsm_event_block(void* e) {
  return guard([&] { cuda().event_block(e); });
}
int tsm_event_elapsed_ms(void* start, void* end, float* out) {
  return guard([&] { *out = cuda().event_elapsed_ms(start, end); });
}

int tsm_stream_new(int device, int high_priority, int64_t* out) {
  return guard([&] { *out = cuda().stream_new(device, high_priority != 0); });
}
int tsm_stream_set(int device, int64_t stream, int64_t* previous) {
  return guard([&] { *previous = cuda().stream_set(device, stream); });
}

int tsm_graph_new(void** out) {
  return guard([&] { *out = cuda().graph_new(); });
}
void tsm_graph_free(void* g) { cuda().graph_free(g); }
int tsm_graph_begin(void* g) {
  return guard([&] { cuda().graph_begin(g); });
}
int tsm_graph_end(void* g) {
  return guard([&] { cuda().graph_end(g); });
}
int tsm_graph_replay(void* g) {
  return guard([&] { cuda().graph_replay(g); });
}

} // extern "C"
