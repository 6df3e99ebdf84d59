// Stores, process groups and, as a test oracle, DistributedDataParallel's reducer.
#include "ext.h"

#include <chrono>
#include <memory>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/env.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>
#include <torch/csrc/distributed/c10d/logger.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

using c10::intrusive_ptr;
using c10::make_intrusive;
using std::chrono::milliseconds;
using tsm::guard;

struct TsmStore {
  intrusive_ptr<c10d::Store> store;
  uint16_t port;
};
struct TsmGroup {
  intrusive_ptr<c10d::ProcessGroup> group;
  bool gloo;
  // NCCL's one device: a barrier that is not told guesses it from the rank.
  std::vector<int64_t> devices{};
};
struct TsmWork {
  intrusive_ptr<c10d::Work> work;
};
struct TsmReducer {
  std::shared_ptr<c10d::Reducer> reducer;
  std::shared_ptr<c10d::Logger> logger;
};
struct TsmBytes {
  const uint8_t* data;
  size_t size;
};

namespace {

std::string text(const TsmBytes& b) { return {reinterpret_cast<const char*>(b.data), b.size}; }

std::vector<std::string> texts(const TsmBytes* keys, size_t count) {
  std::vector<std::string> out;
  for (size_t i = 0; i < count; i++) out.push_back(text(keys[i]));
  return out;
}

TsmGroup* make_group(const intrusive_ptr<c10d::Store>& store, int rank, int world, at::DeviceType device,
                     c10d::ProcessGroup::BackendType type, const intrusive_ptr<c10d::Backend>& backend) {
  auto group = make_intrusive<c10d::ProcessGroup>(store, rank, world);
  group->setDefaultBackend(type);
  group->setBackend(device, type, backend);
  group->setGroupName("default");
  group->setGroupDesc("default_pg");
  return new TsmGroup{group, type == c10d::ProcessGroup::BackendType::GLOO};
}

// 0 sum, 1 mean, 2 maximum.
c10d::AllreduceOptions reduce_options(int op) {
  c10d::AllreduceOptions options;
  options.reduceOp = op == 0   ? c10d::ReduceOp::SUM
                     : op == 1 ? c10d::ReduceOp::AVG
                               : c10d::ReduceOp::MAX;
  return options;
}

} // namespace

extern "C" {

int tsm_store_tcp(TsmBytes host, uint16_t port, size_t world, int is_master, int64_t timeout_ms, TsmStore** out) {
  return guard([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = is_master != 0;
    options.numWorkers = world;
    // Nobody can join before the master has told them the port it was given.
    options.waitWorkers = port != 0;
    options.timeout = milliseconds(timeout_ms);
    auto store = make_intrusive<c10d::TCPStore>(text(host), options);
    const uint16_t actual = store->getPort();
    *out = new TsmStore{std::move(store), actual};
  });
}
int tsm_store_prefix(const TsmStore* s, TsmBytes prefix, TsmStore** out) {
  return guard([&] { *out = new TsmStore{make_intrusive<c10d::PrefixStore>(text(prefix), s->store), s->port}; });
}
uint16_t tsm_store_port(const TsmStore* s) { return s->port; }
int tsm_store_set(const TsmStore* s, TsmBytes key, TsmBytes value) {
  return guard([&] { s->store->set(text(key), std::vector<uint8_t>(value.data, value.data + value.size)); });
}
int tsm_store_get(const TsmStore* s, TsmBytes key, void* sink, void (*write)(void*, const uint8_t*, size_t)) {
  return guard([&] {
    const auto value = s->store->get(text(key));
    write(sink, value.data(), value.size());
  });
}
int tsm_store_wait(const TsmStore* s, const TsmBytes* keys, size_t count, int64_t timeout_ms) {
  return guard([&] { s->store->wait(texts(keys, count), milliseconds(timeout_ms)); });
}
int tsm_store_add(const TsmStore* s, TsmBytes key, int64_t amount, int64_t* out) {
  return guard([&] { *out = s->store->add(text(key), amount); });
}
int tsm_store_check(const TsmStore* s, const TsmBytes* keys, size_t count, int* out) {
  return guard([&] { *out = s->store->check(texts(keys, count)); });
}
// Only read when the first group is made.
int tsm_ranks_as_threads() {
  return guard([] { c10::utils::set_env("TORCH_FR_BUFFER_SIZE", "0", /*overwrite=*/true); });
}

void tsm_store_free(TsmStore* s) { delete s; }

int tsm_group_gloo(const TsmStore* s, int rank, int world, TsmBytes iface, int64_t timeout_ms, int threads,
                   TsmGroup** out) {
  return guard([&] {
    using Gloo = c10d::ProcessGroupGloo;
    auto store = make_intrusive<c10d::PrefixStore>("gloo", s->store);
    auto options = Gloo::Options::create(milliseconds(timeout_ms));
    options->threads = threads;
    options->devices.push_back(iface.size ? Gloo::createDeviceForInterface(text(iface)) : Gloo::createDefaultDevice());
    // Its rendezvous waits as long as the store allows, whatever the group's timeout.
    const c10d::StoreTimeoutGuard wait_limit(*store, milliseconds(timeout_ms));
    *out = make_group(store, rank, world, at::kCPU, c10d::ProcessGroup::BackendType::GLOO,
                      make_intrusive<Gloo>(store, rank, world, options));
  });
}
int tsm_group_nccl(const TsmStore* s, int rank, int world, int device, int64_t timeout_ms, TsmGroup** out) {
  return guard([&] {
    auto store = make_intrusive<c10d::PrefixStore>("nccl", s->store);
    intrusive_ptr<c10d::Backend> backend;
    tsm::cuda().nccl(store, rank, world, device, timeout_ms, backend);
    *out = make_group(store, rank, world, at::kCUDA, c10d::ProcessGroup::BackendType::NCCL, backend);
    (*out)->group->setBoundDeviceId(at::Device(at::kCUDA, static_cast<at::DeviceIndex>(device)));
    (*out)->devices = {device};
  });
}
int tsm_group_all_reduce(const TsmGroup* g, at::Tensor* t, int op, TsmWork** out) {
  return guard([&] {
    std::vector<at::Tensor> tensors{*t};
    *out = new TsmWork{g->group->allreduce(tensors, reduce_options(op))};
  });
}
// Frees the work, whether it succeeds or not.
int tsm_work_wait(TsmWork* w) {
  const std::unique_ptr<TsmWork> work(w);
  return guard([&] { TORCH_CHECK(work->work->wait(), "the collective was aborted"); });
}
void tsm_work_free(TsmWork* w) { delete w; }
int tsm_group_broadcast(const TsmGroup* g, at::Tensor* const* tensors, size_t count, int root) {
  return guard([&] {
    if (count == 0) return;
    const at::NoGradGuard no_grad;
    c10d::broadcast_coalesced(g->group, tsm::tensors(tensors, count), size_t{250} << 20, root);
  });
}
// `out` has room for one tensor of each rank.
int tsm_group_all_gather(const TsmGroup* g, at::Tensor* t, at::Tensor** out) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> inputs{t->contiguous()};
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (int i = 0; i < g->group->getSize(); i++) outputs[0].push_back(at::empty_like(inputs[0]));
    g->group->allgather(outputs, inputs)->wait();
    for (size_t i = 0; i < outputs[0].size(); i++) out[i] = new at::Tensor(outputs[0][i]);
  });
}
int tsm_group_barrier(const TsmGroup* g, int64_t timeout_ms) {
  return guard([&] {
    c10d::BarrierOptions options;
    options.timeout = milliseconds(timeout_ms);
    options.device_ids = g->devices;
    if (g->gloo) {
      // Names the ranks that did not come.
      g->group->monitoredBarrier(options, /*wait_all_ranks=*/true);
    } else {
      g->group->barrier(options)->wait();
    }
  });
}
int tsm_group_abort(const TsmGroup* g) {
  return guard([&] { g->group->abort(); });
}
int tsm_group_shutdown(const TsmGroup* g) {
  return guard([&] { g->group->shutdown(); });
}
void tsm_group_free(TsmGroup* g) { delete g; }

int tsm_reducer_new(const TsmGroup* g, at::Tensor* const* tensors, size_t count, int64_t bucket_bytes,
                    TsmReducer** out) {
  return guard([&] {
    const auto params = tsm::tensors(tensors, count);
    c10d::verify_params_across_processes(g->group, params, std::nullopt);
    // As DistributedDataParallel: everything in one bucket until the first backward has shown the order.
    auto buckets = std::get<0>(
        c10d::compute_bucket_assignment_by_size(params, {size_t{1} << 60}, std::vector<bool>(count, false)));
    auto reducer = std::make_shared<c10d::Reducer>(
        params, std::move(buckets), g->group, std::vector<bool>(count, false), bucket_bytes,
        /*find_unused_parameters=*/false, /*gradient_as_bucket_view=*/false,
        std::unordered_map<size_t, std::string>{}, /*first_bucket_bytes_cap=*/bucket_bytes,
        /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false, std::vector<int64_t>{});
    auto logger = std::make_shared<c10d::Logger>(reducer);
    reducer->set_logger(logger);
    logger->set_construction_data_and_log("tsm", {}, -1, false, false, false);
    *out = new TsmReducer{reducer, logger};
  });
}
int tsm_reducer_before_forward(const TsmReducer* r) {
  return guard([&] {
    r->logger->set_runtime_stats_and_log();
    r->reducer->prepare_for_forward();
    r->reducer->rebuild_buckets();
  });
}
int tsm_reducer_before_backward(const TsmReducer* r) {
  return guard([&] { r->reducer->prepare_for_backward({}); });
}
void tsm_reducer_free(TsmReducer* r) { delete r; }

} // extern "C"
