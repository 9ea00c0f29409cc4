// A stand-in accelerator for torch (PrivateUse1), built by g++ alone: memory, streams, events and pinned memory of its own.
// It is made to find mistakes, not to be fast: its asynchronous copies happen as late as the program allows, so a program
// that forgets to wait reads wrong bytes, and is reported, every time. Kernels run on the CPU, on the device's bytes.
//   STANDIN_DEVICES  number of devices (1)              STANDIN_VISIBLE  those that this process sees, such as "1,0" (all)
//   STANDIN_MEMORY   bytes of each device (1 GiB)       STANDIN_TAKEN    bytes of it that other processes have taken (0)
//   STANDIN_PINNED   bytes of host memory that can be pinned (no limit)
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <sstream>

#include "memory.h"

namespace {
using namespace standin;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

thread_local int kernel_depth = 0;  // above 0, copies are part of a kernel

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = DEVICE_TYPE;
  c10::DeviceType type() const override { return DEVICE_TYPE; }
  Device exchangeDevice(Device device) const override {
    auto previous = current_device;
    current_device = device.index();
    return {DEVICE_TYPE, static_cast<DeviceIndex>(previous)};
  }
  Device getDevice() const override { return {DEVICE_TYPE, static_cast<DeviceIndex>(current_device)}; }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < count_devices(), "standin error: invalid device ordinal");
    current_device = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = device.index(); }
  Stream getStream(Device device) const override { return Stream(Stream::UNSAFE, device, current_streams[device.index()]); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream getNewStream(Device device, int) const override {
    Guarded guard(global_lock);
    if (device.index() < 0) device = getDevice();
    auto id = ++n_streams;
    get_stream(id, device.index());
    log_line("stream s" + std::to_string(id));
    return Stream(Stream::UNSAFE, device, id);
  }
  Stream exchangeStream(Stream stream) const override {
    auto previous = current_streams[stream.device_index()];
    current_streams[stream.device_index()] = stream.id();
    return Stream(Stream::UNSAFE, stream.device(), previous);
  }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(count_devices()); }

  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<EventState*>(event); }
  void record(void** slot, const Stream& on, DeviceIndex, c10::EventFlag) const override {
    Guarded guard(global_lock);
    if (!*slot) *slot = new EventState;
    auto& event = *static_cast<EventState*>(*slot);
    if (!event.id) event.id = ++n_events;
    auto& stream = get_stream(on);
    advance_clock(stream);
    event.recorded = true;
    event.stream = stream.id;
    event.position = stream.n_submitted;
    event.clock = stream.clock;
    event.n_queries = 0;
    log_line("record e" + std::to_string(event.id) + " s" + std::to_string(stream.id));
  }
  void block(void* slot, const Stream& on) const override {
    Guarded guard(global_lock);
    if (!slot) return;
    auto event = *static_cast<EventState*>(slot);
    auto& stream = get_stream(on);
    log_line("wait e" + std::to_string(event.id) + " s" + std::to_string(stream.id));
    if (!event.recorded) return;
    merge(stream.clock, event.clock);
    submit(stream, [event] { run_up_to(streams[event.stream], event.position); });
  }
  bool queryEvent(void* slot) const override {
    Guarded guard(global_lock);
    if (!slot) return true;
    auto& event = *static_cast<EventState*>(slot);
    if (!event.recorded) return true;
    auto& stream = streams[event.stream];
    if (stream.n_run < event.position && ++event.n_queries > 2) run_up_to(stream, event.position);  // polling ends
    if (stream.n_run < event.position) return false;
    host_waited_for(event.clock);
    return true;
  }
  bool queryStream(const Stream& stream) const override {
    Guarded guard(global_lock);
    return get_stream(stream).queue.empty();
  }
  void synchronizeStream(const Stream& on) const override {
    Guarded guard(global_lock);
    auto& stream = get_stream(on);
    log_line("sync stream s" + std::to_string(stream.id));
    run_all(stream);
    host_waited_for(stream.clock);
  }
  void synchronizeEvent(void* slot) const override {
    Guarded guard(global_lock);
    if (!slot) return;
    auto& event = *static_cast<EventState*>(slot);
    log_line("sync event e" + std::to_string(event.id));
    if (event.recorded) run_up_to(streams[event.stream], event.position);
    host_waited_for(event.clock);
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    Guarded guard(global_lock);
    log_line("sync device");
    for (auto& [id, stream] : streams) {
      if (stream.device != device) continue;
      run_all(stream);
      host_waited_for(stream.clock);
    }
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const Stream& stream) const override {
    device_memory.recordStream(data, stream);
  }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 1.0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return count_devices() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(count_devices()); }
  void setCurrentDevice(DeviceIndex device) const override { DeviceGuard().setDevice({DEVICE_TYPE, device}); }
  DeviceIndex getCurrentDevice() const override { return static_cast<DeviceIndex>(current_device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return DeviceGuard().exchangeDevice({DEVICE_TYPE, device}).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? getCurrentDevice() : exchangeDevice(device);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* address) const override {
    Guarded guard(global_lock);
    return is_pinned(address);
  }
  Device getDeviceFromPtr(void* address) const override {
    Guarded guard(global_lock);
    auto block = find_block(address);
    TORCH_CHECK(block != blocks.end(), "standin error: not an address of a device");
    return {DEVICE_TYPE, static_cast<DeviceIndex>(block->second.device)};
  }
};
Hooks hooks;

// Making and viewing tensors, which every device implements itself.
Device choose_device(std::optional<Device> device) {
  return device && device->has_index() ? *device : Device(DEVICE_TYPE, static_cast<DeviceIndex>(current_device));
}
constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(choose_device(device));
  return at::detail::empty_generic(size, &device_memory, KEYS, dtype.value_or(at::kFloat), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(choose_device(device));
  return at::detail::empty_strided_generic(size, stride, &device_memory, KEYS, dtype.value_or(at::kFloat));
}
const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  size_t nbytes = self.itemsize();
  for (auto length : size) nbytes *= length;
  auto& storage = *self.storage().unsafeGetStorageImpl();
  if (storage.nbytes() < nbytes) {
    c10::DeviceGuard guard(self.device());
    self.storage().set_data_ptr_noswap(device_memory.allocate(nbytes));
    storage.set_nbytes(nbytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}
at::Tensor& set_storage(at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  auto impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  if (stride.empty())
    impl->set_sizes_contiguous(size);
  else
    impl->set_sizes_and_strides(size, stride);
  return self;
}
at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::as_strided_tensorimpl(self, size, stride, self.storage_offset());
}
void record_stream(at::Tensor& self, Stream stream) { device_memory.recordStream(self.storage().data_ptr(), stream); }

// Copies.
const char* get_address(const at::Tensor& tensor) {
  return static_cast<const char*>(tensor.storage().data_ptr().get()) + tensor.storage_offset() * tensor.itemsize();
}
at::Tensor as_cpu_tensor(const at::Tensor& tensor) {
  return at::from_blob(const_cast<char*>(get_address(tensor)), tensor.sizes(), tensor.strides(),
                       tensor.options().device(at::kCPU));
}
bool is_plain_copy(const at::Tensor& from, const at::Tensor& to) {  // of bytes: no cast, no change of layout
  return from.scalar_type() == to.scalar_type() && from.sizes() == to.sizes() && from.strides() == to.strides() &&
         from.is_non_overlapping_and_dense();
}
void copy_now(const at::Tensor& from, const at::Tensor& to) {
  AccessScope scope{get_address(from), get_address(to)};
  if (is_plain_copy(from, to)) {
    memcpy(const_cast<char*>(get_address(to)), get_address(from), to.nbytes());
    return;
  }
  kernel_depth++;
  as_cpu_tensor(to).copy_(as_cpu_tensor(from));
  kernel_depth--;
}

// Submit a copy between the device and pinned memory; it runs when something waits for it.
void submit_copy(const at::Tensor& from, const at::Tensor& to, StreamState& stream, bool to_device) {
  const char* source = get_address(from);
  auto target = const_cast<char*>(get_address(to));
  size_t nbytes = to.nbytes();
  uint64_t time = stream.clock[stream.id];
  if (!to_device) memset(target, POISON, nbytes);  // what a read without a wait sees
  uint64_t checksum = to_device ? compute_checksum(source, nbytes) : 0;
  pending_copies.push_back({source, to_device ? nullptr : target, nbytes, checksum, stream.id, time, {}});
  submit(stream, [=] {
    if (!is_device_memory(to_device ? target : source)) {
      report_violation("device memory was freed before a copy of it had finished: use record_stream");
      return;
    }
    AccessScope scope{source, target};
    if (to_device) {
      memcpy(target, source, nbytes);
      return;
    }
    for (auto& copy : pending_copies)
      if (copy.host_target == target && copy.time == time && copy.bytes.empty()) {
        copy.bytes.assign(source, source + nbytes);
        return;
      }
  });
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  Guarded guard(global_lock);
  if (kernel_depth) {
    copy_now(from, to);
    return to;
  }
  bool to_device = to.device().type() == DEVICE_TYPE, from_device = from.device().type() == DEVICE_TYPE;
  bool within_device = to_device && from_device;
  c10::DeviceGuard device_guard(to_device ? to.device() : from.device());
  auto& stream = get_current_stream();
  advance_clock(stream);
  bool pinned = !within_device && is_pinned(get_address(to_device ? from : to));
  bool blocks_host = !within_device && !(non_blocking && pinned && is_plain_copy(from, to));
  std::string direction = within_device ? "d2d" : to_device ? "h2d" : "d2h";
  std::ostringstream line;
  line << direction << (within_device ? "" : pinned ? " pinned" : " pageable") << (blocks_host ? " blocking " : " async ")
       << to.nbytes() << " s" << stream.id << (is_plain_copy(from, to) ? "" : " converts");
  log_line(line.str());
  record_access(get_address(from), stream, false, direction);
  record_access(get_address(to), stream, true, direction);
  settle_copies(host_clock);
  if (!blocks_host && !within_device) {
    submit_copy(from, to, stream, to_device);
    return to;
  }
  run_all(stream);
  copy_now(from, to);
  if (blocks_host) host_waited_for(stream.clock);
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) const_cast<at::Tensor&>(to).resize_(from.sizes());
  return copy_from(from, to, false);
}

// All other kernels run on the CPU, at once.
const std::set<std::string> SYNCHRONIZING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",
                                             "aten::_unique2",            "aten::equal",   "aten::is_nonzero"};
std::string next_error;  // what the next kernel fails with; an "illegal" access breaks the device for good
bool is_broken = false;

void raise_injected_error() {
  if (next_error.empty() && !is_broken) return;
  auto message = is_broken ? "standin error: an illegal memory access was encountered" : next_error;
  is_broken |= message.find("illegal") != std::string::npos;
  next_error.clear();
  TORCH_CHECK(false, message);
}

template <typename Visit>
void for_each_tensor(const c10::IValue& value, Visit visit) {
  if (value.isTensor() && value.toTensor().defined()) visit(value.toTensor());
  if (value.isTensorList())
    for (const at::Tensor& tensor : value.toTensorVector())
      if (tensor.defined()) visit(tensor);
}

void start_kernel(const c10::FunctionSchema& schema, const torch::jit::Stack& stack, StreamState& stream) {
  raise_injected_error();
  advance_clock(stream);
  run_all(stream);
  log_line("kernel " + schema.name() + " s" + std::to_string(stream.id));
  auto& arguments = schema.arguments();
  for (size_t i = 0; i < arguments.size(); i++) {
    bool writes = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    for_each_tensor(stack[stack.size() - arguments.size() + i], [&](const at::Tensor& tensor) {
      bool on_device = tensor.device().type() == DEVICE_TYPE;
      TORCH_CHECK(on_device || tensor.dim() == 0 || !tensor.device().is_cpu(),
                  "Expected all tensors to be on the same device, but ", schema.name(),
                  " got one on cpu and one on standin:", current_device);
      if (on_device) record_access(get_address(tensor), stream, writes, schema.name());
    });
  }
  if (!SYNCHRONIZING.count(schema.name())) return;
  log_line("sync implicit " + schema.name());
  host_waited_for(stream.clock);
}
void finish_kernel(const c10::FunctionSchema& schema, const torch::jit::Stack& stack, StreamState& stream) {
  size_t n_returns = schema.returns().size();
  for (size_t i = 0; i < n_returns; i++)
    for_each_tensor(stack[stack.size() - n_returns + i], [&](const at::Tensor& tensor) {
      if (tensor.device().type() == DEVICE_TYPE) record_access(get_address(tensor), stream, true, schema.name());
    });
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // torch leaves convolutions of such devices to them; the CPU has the operation under its usual name.
  static const auto convolution = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  Guarded guard(global_lock);
  auto& schema = op.schema();
  auto& stream = get_current_stream();
  bool is_nested = kernel_depth > 0;
  if (!is_nested) start_kernel(schema, *stack, stream);
  kernel_depth++;
  try {
    at::native::cpu_fallback(schema.name() == "aten::convolution_overrideable" ? convolution : op, stack);
  } catch (...) {
    kernel_depth--;
    throw;
  }
  kernel_depth--;
  if (!is_nested) finish_kernel(schema, *stack, stream);
}
int64_t choose_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
                         bool, std::optional<double>, bool) {
  return 0;  // the one made of plain operations
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("record_stream", record_stream);
  library.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  library.impl("_fused_sdp_choice", choose_attention);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

struct Registration {
  Registration() {
    c10::SetAllocator(DEVICE_TYPE, &device_memory);
    at::setHostAllocator(DEVICE_TYPE, &pinned_memory);
    at::RegisterPrivateUse1HooksInterface(&hooks);
  }
} const registration;
}  // namespace

// What the Python module calls.
extern "C" {
const char* standin_read_log() {
  Guarded guard(global_lock);
  static std::string copy;
  copy = log_text;
  return copy.c_str();
}
const char* standin_read_violations() {
  Guarded guard(global_lock);
  settle_copies(host_clock);
  static std::string copy;
  copy = violations_text;
  return copy.c_str();
}
void standin_clear() {
  Guarded guard(global_lock);
  log_text.clear();
  violations_text.clear();
}
void standin_fail_next(const char* message) {
  Guarded guard(global_lock);
  next_error = message;
}
int standin_count_devices() { return count_devices(); }
int standin_get_device() { return current_device; }
void standin_set_device(int device) { DeviceGuard().setDevice({DEVICE_TYPE, static_cast<DeviceIndex>(device)}); }
long long standin_get_total_nbytes() { return static_cast<long long>(get_total_nbytes()); }
long long standin_get_free_nbytes(int device) {
  Guarded guard(global_lock);
  return static_cast<long long>(get_limit() - memory_stats[device].allocated);
}
}
