// Tensor operations, autograd hooks and global switches. Needs libtorch_cpu and libc10 only.
#include "ext.h"

#include <cstring>

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
#include <torch/version.h>

namespace tsm {

std::string& last_error() {
  thread_local std::string message;
  return message;
}

ShiftFn cuda_shift = nullptr;

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
    TORCH_CHECK(cuda_shift != nullptr, "temporal shift: the input is on ", in.device(),
                " but the CUDA part of tsm-torch-ext is not loaded; call load_cuda() first");
    cuda_shift(in, out, spec);
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

} // namespace
} // namespace tsm

using tsm::guard;

extern "C" {

const char* tsm_last_error() { return tsm::last_error().c_str(); }

const char* tsm_torch_version() { return TORCH_VERSION; }

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

} // extern "C"
