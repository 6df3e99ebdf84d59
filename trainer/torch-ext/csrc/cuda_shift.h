#pragma once
#include "ext.h"

namespace tsm {

void shift_cuda(const at::Tensor& in, const at::Tensor& out, const ShiftSpec& spec);
// Compiles for a compute capability (90 for 9.0) without a device; the size of the machine code.
size_t shift_cubin_bytes(int capability);

} // namespace tsm
