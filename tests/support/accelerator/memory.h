// Memory of the stand-in accelerator: device memory that only kernels and copies can touch, and pinned host memory.
#pragma once
#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <sys/mman.h>

#include <set>

#include "streams.h"

namespace standin {

constexpr auto DEVICE_TYPE = c10::DeviceType::PrivateUse1;
constexpr int POISON = 0xCB;  // the content of memory that nothing has been written to

inline size_t get_total_nbytes() { return read_env("STANDIN_MEMORY", 1ull << 30); }
inline size_t get_limit() { return get_total_nbytes() - read_env("STANDIN_TAKEN", 0); }
inline size_t round_to_pages(size_t nbytes) { return (std::max<size_t>(nbytes, 1) + 4095) / 4096 * 4096; }

struct Block {
  size_t nbytes;
  int device;
  int64_t stream;
  std::set<int64_t> other_streams;
  Clock written, read;
};
struct MemoryStats {
  size_t allocated = 0, peak = 0, n_oom = 0;
};
inline std::map<char*, Block> blocks;
inline std::map<int, MemoryStats> memory_stats;

template <typename Value, typename Size>
typename std::map<char*, Value>::iterator find_range(std::map<char*, Value>& ranges, const void* address, Size get_nbytes) {
  auto target = const_cast<char*>(static_cast<const char*>(address));
  auto range = ranges.upper_bound(target);
  if (range == ranges.begin()) return ranges.end();
  --range;
  return target < range->first + std::max<size_t>(1, get_nbytes(range->second)) ? range : ranges.end();
}
inline auto find_block(const void* address) {
  return find_range(blocks, address, [](const Block& block) { return block.nbytes; });
}
inline bool is_device_memory(const void* address) { return find_block(address) != blocks.end(); }

// Makes blocks of device memory accessible while it lives.
struct AccessScope {
  std::vector<char*> opened;
  explicit AccessScope(std::initializer_list<const void*> addresses) {
    for (auto address : addresses) {
      auto block = find_block(address);
      if (block == blocks.end()) continue;
      mprotect(block->first, round_to_pages(block->second.nbytes), PROT_READ | PROT_WRITE);
      opened.push_back(block->first);
    }
  }
  ~AccessScope() {
    for (auto address : opened)
      if (blocks.count(address)) mprotect(address, round_to_pages(blocks[address].nbytes), PROT_NONE);
  }
};

// Record that a stream reads or writes a block, and check that it has waited for the other streams that used it.
inline void record_access(const void* address, StreamState& stream, bool writes, const std::string& who) {
  auto found = find_block(address);
  if (found == blocks.end()) return;
  auto& block = found->second;
  merge(stream.clock, host_clock);
  auto check = [&](const Clock& earlier) {
    for (auto& [other, time] : earlier)
      if (other != stream.id && !has_passed(stream.clock, other, time))
        report_violation(who + " on stream " + std::to_string(stream.id) + " does not wait for stream " + std::to_string(other));
  };
  check(block.written);
  if (writes) check(block.read);
  (writes ? block.written : block.read)[stream.id] = stream.clock[stream.id];
}

inline void free_block(void* address) {
  Guarded guard(global_lock);
  auto begin = static_cast<char*>(address);
  if (!begin || !blocks.count(begin)) return;
  auto& block = blocks[begin];
  auto users = block.other_streams;
  users.insert(block.stream);
  for (auto id : users) {  // like a caching allocator: no reuse before the streams that it knows of have finished
    if (streams[id].queue.empty()) continue;
    block.other_streams.erase(id);
    submit(streams[id], [address] { free_block(address); });
    return;
  }
  memory_stats[block.device].allocated -= block.nbytes;
  munmap(begin, round_to_pages(block.nbytes));
  blocks.erase(begin);
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    Guarded guard(global_lock);
    auto& stats = memory_stats[current_device];
    if (stats.allocated + nbytes > get_limit()) {
      stats.n_oom++;
      log_line("oom " + std::to_string(nbytes));
      TORCH_CHECK_WITH(OutOfMemoryError, false, "standin out of memory. Tried to allocate ", nbytes, " bytes; ",
                       get_limit() - stats.allocated, " of ", get_limit(), " are free.");
    }
    size_t mapped = round_to_pages(nbytes);
    auto begin = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    TORCH_CHECK(begin != MAP_FAILED, "standin error: the host is out of memory");
    memset(begin, POISON, nbytes);
    mprotect(begin, mapped, PROT_NONE);
    nbytes = std::max<size_t>(nbytes, 1);
    blocks[begin] = {nbytes, current_device, get_current_stream().id, {}, {}, {}};
    stats.allocated += nbytes;
    stats.peak = std::max(stats.peak, stats.allocated);
    return {begin, begin, &free_block, c10::Device(DEVICE_TYPE, static_cast<c10::DeviceIndex>(current_device))};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    AccessScope scope{to, from};
    memcpy(to, from, nbytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override { log_line("empty_cache"); }
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    Guarded guard(global_lock);
    auto id = get_stream(stream).id;
    if (auto block = find_block(data.get()); block != blocks.end()) block->second.other_streams.insert(id);
    log_line("record_stream s" + std::to_string(id));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats result;
    auto& stats = memory_stats[device < 0 ? current_device : device];
    for (auto* kind : {&result.allocated_bytes, &result.reserved_bytes, &result.active_bytes}) {
      (*kind)[0].current = static_cast<int64_t>(stats.allocated);
      (*kind)[0].peak = static_cast<int64_t>(stats.peak);
    }
    result.num_ooms = static_cast<int64_t>(stats.n_oom);
    return result;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override { memory_stats[device].peak = memory_stats[device].allocated; }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    return {get_limit() - memory_stats[device].allocated, get_total_nbytes()};
  }
};
inline DeviceMemory device_memory;

inline std::map<char*, size_t> pinned_blocks;
inline size_t n_pinned_bytes = 0;
inline bool is_pinned(const void* address) {
  return find_range(pinned_blocks, address, [](size_t nbytes) { return nbytes; }) != pinned_blocks.end();
}

struct PinnedMemory final : at::HostAllocator {
  static void free_pinned(void* address) {
    Guarded guard(global_lock);
    auto begin = static_cast<char*>(address);
    size_t nbytes = pinned_blocks[begin];
    n_pinned_bytes -= nbytes;
    pinned_blocks.erase(begin);
    for (auto& [id, stream] : streams) run_all(stream);
    drop_copies(begin, std::max<size_t>(1, nbytes));
    free(address);
  }
  c10::DataPtr allocate(size_t nbytes) override {
    Guarded guard(global_lock);
    TORCH_CHECK(n_pinned_bytes + nbytes <= read_env("STANDIN_PINNED", 1ull << 40),
                "standin error: out of memory (host memory cannot be pinned)");
    void* begin = aligned_alloc(4096, round_to_pages(nbytes));
    memset(begin, POISON, nbytes);
    pinned_blocks[static_cast<char*>(begin)] = nbytes;
    n_pinned_bytes += nbytes;
    log_line("pin " + std::to_string(nbytes));
    return {begin, begin, &free_pinned, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t nbytes) const override { memcpy(to, from, nbytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
inline PinnedMemory pinned_memory;

}  // namespace standin
