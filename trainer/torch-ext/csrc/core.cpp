// Tensor operations, autograd hooks and global switches. Needs libtorch_cpu and libc10 only.
#include "ext.h"

#include <cstring>
#include <optional>
#include <stdexcept>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_amp_update_scale.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

namespace tsm {

std::string& last_error() {
  thread_local std::string message;
  return message;
}

const CudaApi* cuda_api = nullptr;

const CudaApi& cuda() {
  TORCH_CHECK(cuda_api != nullptr, "the CUDA part of tsm-torch-ext is not loaded; call load_cuda() first");
  return *cuda_api;
}

namespace {

// Bytes, not elements: a shift only moves data, so one routine serves every dtype.
void shift_cpu(const at::Tensor& in, const at::Tensor& out, const ShiftSpec& s, bool channels_last) {
  const auto* src = static_cast<const char*>(in.const_data_ptr());
  auto* dst = static_cast<char*>(out.data_ptr());
  const int64_t frames = in.size(0), channels = in.size(1), pixels = in.size(2) * in.size(3);
  // A row is the unit in which the channels of one frame lie together: a frame in NCHW, a pixel in NHWC.
  const int64_t rows_per_frame = channels_last ? pixels : 1;
  const int64_t channel_bytes = in.element_size() * (channels_last ? 1 : pixels);
  const int64_t row_bytes = channels * channel_bytes;
  const int64_t frame_bytes = rows_per_frame * row_bytes;
  const int64_t fold_bytes = s.fold * channel_bytes;

  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const int64_t t = row / rows_per_frame % s.segments;
      const char* from = src + row * row_bytes;
      char* to = dst + row * row_bytes;
      auto group = [&](int64_t dir, int64_t offset, int64_t bytes) {
        if (t + dir >= 0 && t + dir < s.segments) {
          std::memcpy(to + offset, from + dir * frame_bytes + offset, bytes);
        } else {
          std::memset(to + offset, 0, bytes);
        }
      };
      group(s.dir_a, 0, fold_bytes);
      group(s.dir_b, fold_bytes, fold_bytes);
      group(0, 2 * fold_bytes, row_bytes - 2 * fold_bytes);
    }
  };
  // 32 KiB a task: below that, waking a thread costs more than the copy.
  const int64_t grain = std::max<int64_t>(1, (32 << 10) / std::max<int64_t>(1, row_bytes));
  at::parallel_for(0, frames * rows_per_frame, grain, rows);
}

at::Tensor shift(const at::Tensor& x, const ShiftSpec& spec) {
  const auto format = x.suggest_memory_format();
  const at::Tensor in = x.contiguous(format);
  const at::Tensor out = at::empty_like(in, format);
  if (in.numel() == 0) return out;
  if (in.is_cpu()) {
    shift_cpu(in, out, spec, format == at::MemoryFormat::ChannelsLast);
  } else if (in.is_cuda()) {
    cuda().shift(in, out, spec);
  } else {
    TORCH_CHECK(false, "temporal shift: no implementation for device ", in.device());
  }
  return out;
}

// The shift only moves elements, so its gradient is the same move with both directions turned round.
struct TemporalShift : torch::autograd::Function<TemporalShift> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, int64_t segments,
                            int64_t fold, int64_t dir_a, int64_t dir_b) {
    ctx->saved_data["spec"] = std::vector<int64_t>{segments, fold, -dir_a, -dir_b};
    return shift(x, {segments, fold, dir_a, dir_b});
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto spec = ctx->saved_data["spec"].toIntVector();
    return {shift(grads[0], {spec[0], spec[1], spec[2], spec[3]}), {}, {}, {}, {}};
  }
};

// A hook of Rust: `call` returns 0, or writes its message into `sink` and returns 1.
struct RustHook : torch::autograd::PostAccumulateGradHook {
  using Call = int (*)(void* user, std::string* sink);
  using Drop = void (*)(void* user);

  RustHook(Call call, Drop drop, void* user) : call_(call), drop_(drop), user_(user) {}
  ~RustHook() override { drop_(user_); }
  void operator()(const at::Tensor&) override {
    std::string message;
    if (call_(user_, &message) != 0) throw std::runtime_error(message);
  }

 private:
  Call call_;
  Drop drop_;
  void* user_;
};

bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return false;
  for (int64_t d = 0; d < a.dim(); d++) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// The CPU kernel walks the raw memory of the lists in parallel and checks nothing.
void check_layout(const at::Tensor& p, const at::Tensor& other, const char* what, size_t i) {
  TORCH_CHECK(same_layout(p, other) && p.scalar_type() == other.scalar_type() && p.device() == other.device() &&
                  p.is_non_overlapping_and_dense(),
              "fused_sgd: ", what, " ", i, " is ", other.sizes(), " with strides ", other.strides(), ", ",
              other.scalar_type(), " on ", other.device(), "; its parameter is ", p.sizes(), " with strides ",
              p.strides(), ", ", p.scalar_type(), " on ", p.device());
}

std::optional<at::Tensor> optional(at::Tensor* t) { return t ? std::optional<at::Tensor>(*t) : std::nullopt; }

} // namespace
} // namespace tsm

using tsm::guard;

extern "C" uint64_t aoti_torch_abi_version();

extern "C" {

const char* tsm_last_error() { return tsm::last_error().c_str(); }

int tsm_temporal_shift(at::Tensor* x, int64_t segments, int64_t fold, int64_t dir_a, int64_t dir_b, at::Tensor** out) {
  return guard([&] {
    TORCH_CHECK(x->dim() == 4, "temporal shift: x must be [n * t, c, h, w], got ", x->sizes());
    TORCH_CHECK(segments > 0 && x->size(0) % segments == 0, "temporal shift: the first dimension of x ", x->sizes(),
                " is not a multiple of num_segments = ", segments);
    TORCH_CHECK(fold >= 0 && 2 * fold <= x->size(1), "temporal shift: two folds of ", fold,
                " channels do not fit into x ", x->sizes());
    *out = new at::Tensor(tsm::TemporalShift::apply(*x, segments, fold, dir_a, dir_b));
  });
}

int tsm_to_channels_last(at::Tensor* x, at::Tensor** out) {
  return guard([&] {
    TORCH_CHECK(x->dim() == 4, "channels_last: the tensor must be [n, c, h, w], got ", x->sizes());
    *out = new at::Tensor(x->contiguous(at::MemoryFormat::ChannelsLast));
  });
}

int tsm_is_channels_last(at::Tensor* x) { return x->is_contiguous(at::MemoryFormat::ChannelsLast); }

int tsm_set_data(at::Tensor* dst, at::Tensor* src) {
  return guard([&] { dst->set_data(*src); });
}

int tsm_set_grad(at::Tensor* p, at::Tensor* grad) {
  return guard([&] {
    if (grad == nullptr) {
      p->mutable_grad().reset();
      return;
    }
    TORCH_CHECK(grad->sizes() == p->sizes() && grad->scalar_type() == p->scalar_type() && grad->device() == p->device(),
                "set_grad: the gradient is ", grad->sizes(), " ", grad->scalar_type(), " on ", grad->device(),
                ", the parameter ", p->sizes(), " ", p->scalar_type(), " on ", p->device());
    p->mutable_grad() = *grad;
  });
}

int tsm_fused_sgd(at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* momenta, size_t count,
                  size_t num_momenta, double lr, double momentum, double weight_decay, int nesterov, int first,
                  at::Tensor* grad_scale, at::Tensor* found_inf) {
  return guard([&] {
    if (count == 0) return;
    const auto p = tsm::tensors(params, count), g = tsm::tensors(grads, count);
    const auto m = tsm::tensors(momenta, num_momenta);
    for (size_t i = 0; i < count; i++) tsm::check_layout(p[i], g[i], "gradient", i);
    for (size_t i = 0; i < num_momenta; i++) tsm::check_layout(p[i], m[i], "momentum buffer", i);
    const at::NoGradGuard no_grad;
    at::_fused_sgd_(p, g, m, weight_decay, momentum, lr, /*dampening=*/0.0, nesterov != 0, /*maximize=*/false,
                    first != 0, tsm::optional(grad_scale), tsm::optional(found_inf));
  });
}

int tsm_unscale_and_check(at::Tensor* const* grads, size_t count, at::Tensor* found_inf, at::Tensor* inv_scale) {
  return guard([&] {
    if (count == 0) return;
    const at::NoGradGuard no_grad;
    at::_amp_foreach_non_finite_check_and_unscale_(tsm::tensors(grads, count), *found_inf, *inv_scale);
  });
}

int tsm_update_scale(at::Tensor* scale, at::Tensor* growth_tracker, at::Tensor* found_inf, double growth,
                     double backoff, int64_t interval) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    at::_amp_update_scale_(*scale, *growth_tracker, *found_inf, growth, backoff, interval);
  });
}

// Takes `user` over, whether it succeeds or not.
int tsm_on_grad_ready(at::Tensor* p, tsm::RustHook::Call call, tsm::RustHook::Drop drop, void* user) {
  auto hook = std::make_unique<tsm::RustHook>(call, drop, user);
  return guard([&] {
    TORCH_CHECK(p->is_leaf() && p->requires_grad(), "on_grad_ready: the tensor ", p->sizes(),
                " is not a leaf that requires a gradient");
    torch::autograd::impl::set_post_acc_grad_hooks(*p, std::move(hook));
  });
}

void tsm_hook_message(std::string* sink, const char* text, size_t length) { sink->assign(text, length); }

int tsm_backward(at::Tensor* loss) {
  return guard([&] { loss->backward(); });
}

// Replaces this thread's autocast state for a device type; `previous` receives the old one.
struct TsmAutocast {
  int32_t enabled;
  int32_t dtype;
};
int tsm_autocast_enter(int cuda, int dtype, TsmAutocast* previous) {
  return guard([&] {
    const auto device = cuda ? at::kCUDA : at::kCPU;
    previous->enabled = at::autocast::is_autocast_enabled(device);
    previous->dtype = static_cast<int32_t>(at::autocast::get_autocast_dtype(device));
    at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(dtype));
    at::autocast::set_autocast_enabled(device, true);
    at::autocast::increment_nesting();
  });
}
int tsm_autocast_leave(int cuda, const TsmAutocast* previous) {
  return guard([&] {
    const auto device = cuda ? at::kCUDA : at::kCPU;
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device, previous->enabled != 0);
    at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(previous->dtype));
  });
}

int tsm_set_flags(int cudnn_benchmark, int deterministic, int allow_tf32) {
  return guard([&] {
    auto& context = at::globalContext();
    context.setBenchmarkCuDNN(cudnn_benchmark != 0);
    context.setDeterministicCuDNN(deterministic != 0);
    context.setDeterministicAlgorithms(deterministic != 0, /*warn_only=*/false);
    context.setAllowTF32CuDNN(allow_tf32 != 0);
    context.setAllowTF32CuBLAS(allow_tf32 != 0);
  });
}

// major << 56 | minor << 48 | patch << 40, of the library that was loaded, not of the headers.
uint64_t tsm_torch_abi_version() { return aoti_torch_abi_version(); }

} // extern "C"
