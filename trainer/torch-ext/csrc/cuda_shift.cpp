// The temporal shift on CUDA: a kernel that NVRTC compiles for the device on first use, so that the
// build needs no CUDA compiler.
#include "cuda_shift.h"

#include <dlfcn.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

namespace tsm {
namespace {

// A row holds the channels of one frame that lie together: the frame in NCHW, a pixel in NHWC. A thread
// moves one unit of a row: 16 bytes where row, folds and addresses allow, else fewer. 32-bit division is
// several times cheaper than 64-bit, hence two index types.
constexpr const char* kSource = R"cuda(
#define SHIFT(NAME, UNIT, INDEX)                                                                          \
  extern "C" __global__ void __launch_bounds__(256) NAME(                                                 \
      const UNIT* __restrict__ in, UNIT* __restrict__ out, INDEX total, INDEX row_units, INDEX fold_units, \
      INDEX rows_per_frame, INDEX segments, int dir_a, int dir_b) {                                       \
    const INDEX i = (INDEX)blockIdx.x * 256 + threadIdx.x;                                                \
    if (i >= total) return;                                                                               \
    const INDEX row = i / row_units;                                                                      \
    const INDEX unit = i - row * row_units;                                                               \
    const int dir = unit < fold_units ? dir_a : unit < 2 * fold_units ? dir_b : 0;                        \
    const INDEX from = row / rows_per_frame % segments + dir;                                             \
    const long long step = (long long)dir * (long long)(rows_per_frame * row_units);                      \
    UNIT value = {};                                                                                      \
    /* Unsigned: one before the first segment is out of range too. */                                     \
    if (from < segments) value = in[(long long)i + step];                                                 \
    out[i] = value;                                                                                       \
  }
#define SHIFT_BOTH(BYTES, UNIT) \
  SHIFT(shift_##BYTES##_32, UNIT, unsigned int) SHIFT(shift_##BYTES##_64, UNIT, unsigned long long)
SHIFT_BOTH(16, uint4)
SHIFT_BOTH(8, uint2)
SHIFT_BOTH(4, unsigned int)
SHIFT_BOTH(2, unsigned short)
SHIFT_BOTH(1, unsigned char)
)cuda";

constexpr std::array<int64_t, 5> kUnitBytes{16, 8, 4, 2, 1};
constexpr int64_t kThreads = 256;

// NVRTC's C interface as far as it is used, from its documentation; the wheel set that builds this has
// no nvrtc.h.
struct Nvrtc {
  using Program = void*;
  int (*create)(Program*, const char* source, const char* name, int headers, const char* const*, const char* const*);
  int (*compile)(Program, int options, const char* const*);
  int (*log_size)(Program, size_t*);
  int (*log)(Program, char*);
  int (*cubin_size)(Program, size_t*);
  int (*cubin)(Program, char*);
  int (*destroy)(Program*);
  const char* (*error)(int);

  Nvrtc() {
    // Beside libcudart, which libtorch has found already: libnvrtc itself may be in no search path.
    std::string folder;
    Dl_info info{};
    if (dladdr(reinterpret_cast<void*>(&cudaGetDeviceCount), &info) != 0 && info.dli_fname != nullptr) {
      const std::string runtime = info.dli_fname;
      folder = runtime.substr(0, runtime.rfind('/') + 1);
    }
    const std::string name = "libnvrtc.so.13";
    void* library = dlopen((folder + name).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    TORCH_CHECK(library != nullptr, "temporal shift: NVRTC compiles its CUDA kernel, but cannot be loaded: ",
                dlerror(), "; install nvidia-cuda-nvrtc 13");
    const auto find = [&](auto& function, const char* symbol_name) {
      void* symbol = dlsym(library, symbol_name);
      TORCH_CHECK(symbol != nullptr, "temporal shift: ", name, " has no ", symbol_name);
      function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
    };
    find(create, "nvrtcCreateProgram");
    find(compile, "nvrtcCompileProgram");
    find(log_size, "nvrtcGetProgramLogSize");
    find(log, "nvrtcGetProgramLog");
    find(cubin_size, "nvrtcGetCUBINSize");
    find(cubin, "nvrtcGetCUBIN");
    find(destroy, "nvrtcDestroyProgram");
    find(error, "nvrtcGetErrorString");

    // NVRTC opens this one by its bare name, which finds it only where it is loaded already. If it is not
    // there, compiling says so.
    int (*version)(int*, int*) = nullptr;
    find(version, "nvrtcVersion");
    int major = 0, minor = 0;
    check(version(&major, &minor), "nvrtcVersion");
    const std::string builtins = "libnvrtc-builtins.so." + std::to_string(major) + "." + std::to_string(minor);
    dlopen((folder + builtins).c_str(), RTLD_NOW | RTLD_LOCAL);
  }

  void check(int status, const char* what) const {
    TORCH_CHECK(status == 0, "temporal shift: ", what, ": ", error(status));
  }
};

const Nvrtc& nvrtc() {
  static const Nvrtc functions;
  return functions;
}

std::string cubin_for(int capability) {
  const Nvrtc& n = nvrtc();
  Nvrtc::Program program = nullptr;
  n.check(n.create(&program, kSource, "temporal_shift.cu", 0, nullptr, nullptr), "nvrtcCreateProgram");
  const std::unique_ptr<Nvrtc::Program, void (*)(Nvrtc::Program*)> owner(
      &program, [](Nvrtc::Program* p) { nvrtc().destroy(p); });

  const std::string architecture = "--gpu-architecture=sm_" + std::to_string(capability);
  const char* options[] = {architecture.c_str()};
  const int status = n.compile(program, 1, options);
  if (status != 0) {
    size_t size = 0;
    n.log_size(program, &size);
    std::string log(size, '\0');
    if (size > 0) n.log(program, log.data());
    TORCH_CHECK(false, "temporal shift: NVRTC with ", architecture, ": ", n.error(status), "\n", log.c_str());
  }
  size_t size = 0;
  n.check(n.cubin_size(program, &size), "nvrtcGetCUBINSize");
  std::string image(size, '\0');
  n.check(n.cubin(program, image.data()), "nvrtcGetCUBIN");
  return image;
}

// [unit size][64-bit index]
using Kernels = std::array<std::array<cudaKernel_t, 2>, kUnitBytes.size()>;

// One library serves all devices of a compute capability; it stays loaded.
const Kernels& kernels(int device) {
  static std::mutex mutex;
  static std::map<int, Kernels> by_capability;
  const std::lock_guard<std::mutex> lock(mutex);
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const int capability = 10 * major + minor;
  const auto known = by_capability.find(capability);
  if (known != by_capability.end()) return known->second;

  const std::string image = cubin_for(capability);
  cudaLibrary_t library = nullptr;
  C10_CUDA_CHECK(cudaLibraryLoadData(&library, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0));
  Kernels loaded{};
  for (size_t u = 0; u < kUnitBytes.size(); u++) {
    for (const int wide : {0, 1}) {
      const std::string name = "shift_" + std::to_string(kUnitBytes[u]) + (wide ? "_64" : "_32");
      C10_CUDA_CHECK(cudaLibraryGetKernel(&loaded[u][wide], library, name.c_str()));
    }
  }
  return by_capability.emplace(capability, loaded).first->second;
}

template <typename Index>
void launch(cudaKernel_t kernel, const void* in, void* out, int64_t total, int64_t row_units, int64_t fold_units,
            int64_t rows_per_frame, const ShiftSpec& s, cudaStream_t stream) {
  auto n = static_cast<Index>(total), row = static_cast<Index>(row_units), fold = static_cast<Index>(fold_units);
  auto rows = static_cast<Index>(rows_per_frame), segments = static_cast<Index>(s.segments);
  int dir_a = static_cast<int>(s.dir_a), dir_b = static_cast<int>(s.dir_b);
  void* arguments[] = {&in, &out, &n, &row, &fold, &rows, &segments, &dir_a, &dir_b};
  const dim3 blocks(static_cast<unsigned>((total + kThreads - 1) / kThreads));
  C10_CUDA_CHECK(cudaLaunchKernel(kernel, blocks, dim3(kThreads), arguments, 0, stream));
}

} // namespace

size_t shift_cubin_bytes(int capability) { return cubin_for(capability).size(); }

void shift_cuda(const at::Tensor& in, const at::Tensor& out, const ShiftSpec& s) {
  const c10::cuda::CUDAGuard guard(in.device());
  const bool channels_last = in.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  const int64_t pixels = in.size(2) * in.size(3);
  const int64_t rows_per_frame = channels_last ? pixels : 1;
  const int64_t channel_bytes = in.element_size() * (channels_last ? 1 : pixels);
  const int64_t row_bytes = in.size(1) * channel_bytes, fold_bytes = s.fold * channel_bytes;
  const void* src = in.const_data_ptr();
  void* dst = out.data_ptr();

  size_t u = 0;
  const auto fits = [&](int64_t bytes) {
    const auto mask = static_cast<uintptr_t>(bytes - 1);
    return row_bytes % bytes == 0 && fold_bytes % bytes == 0 &&
           ((reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst)) & mask) == 0;
  };
  while (!fits(kUnitBytes[u])) u++;

  const int64_t unit = kUnitBytes[u];
  const int64_t row_units = row_bytes / unit, fold_units = fold_bytes / unit;
  const int64_t total = in.size(0) * rows_per_frame * row_units;
  const auto& kernel = kernels(in.get_device())[u];
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  // Below 2^31, so that neither the last block's indices nor an index plus one overflow 32 bits.
  if (total <= INT32_MAX) {
    launch<uint32_t>(kernel[0], src, dst, total, row_units, fold_units, rows_per_frame, s, stream);
  } else {
    launch<uint64_t>(kernel[1], src, dst, total, row_units, fold_units, rows_per_frame, s, stream);
  }
}

} // namespace tsm
