// Streams and events of the stand-in accelerator: what a program has submitted, what has run, and what each side can know.
//
// A stream is a queue of work that runs as late as the program allows. Vector clocks record what each stream and the host
// know to have finished, so an access that does not wait for the work it depends on is a violation, every time.
#pragma once
#include <c10/core/Stream.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

// Python's C API, as far as the lock needs it; the process that loads this library provides it.
extern "C" {
int Py_IsInitialized(void);
int PyGILState_Check(void);
void* PyEval_SaveThread(void);
void PyEval_RestoreThread(void*);
}

namespace standin {

inline size_t read_env(const char* name, size_t default_value) {
  const char* value = getenv(name);
  return value && *value ? strtoull(value, nullptr, 10) : default_value;
}

inline int count_devices() {
  const char* visible = getenv("STANDIN_VISIBLE");
  if (!visible) return static_cast<int>(read_env("STANDIN_DEVICES", 1));
  int n = *visible ? 1 : 0;
  for (; *visible; visible++) n += *visible == ',';
  return n;
}

// A lock that releases Python's GIL while it waits: torch takes the GIL when the last C++ reference to a tensor goes.
struct GilReleasingLock {
  std::recursive_mutex mutex;
  void lock() {
    if (mutex.try_lock()) return;
    if (!Py_IsInitialized() || !PyGILState_Check()) {
      mutex.lock();
      return;
    }
    void* thread = PyEval_SaveThread();
    mutex.lock();
    PyEval_RestoreThread(thread);
  }
  void unlock() { mutex.unlock(); }
};

// One call at a time: the order of calls is what is tested, not this library's speed.
inline GilReleasingLock global_lock;
using Guarded = std::lock_guard<GilReleasingLock>;

inline std::string log_text, violations_text;
inline thread_local int current_device = 0;
inline thread_local std::map<int, int64_t> current_streams;  // stream number by device

inline void log_line(const std::string& line) { log_text += line + "\n"; }
inline void report_violation(const std::string& line) {
  violations_text += line + "\n";
  log_line("VIOLATION " + line);
}

using Clock = std::map<int64_t, uint64_t>;  // by stream, the time up to which its work is known to have finished
inline void merge(Clock& clock, const Clock& other) {
  for (auto& [stream, time] : other) clock[stream] = std::max(clock[stream], time);
}
inline bool has_passed(const Clock& clock, int64_t stream, uint64_t time) {
  auto known = clock.find(stream);
  return known != clock.end() && known->second >= time;
}

struct StreamState {
  int64_t id;
  int device;
  std::deque<std::function<void()>> queue;
  uint64_t n_submitted = 0, n_run = 0;
  Clock clock;
};
struct EventState {
  int64_t id = 0;
  bool recorded = false;
  int64_t stream = 0;
  uint64_t position = 0;  // how much of the stream had been submitted
  Clock clock;
  int n_queries = 0;
};

inline std::map<int64_t, StreamState> streams;
inline Clock host_clock;
inline int64_t n_streams = 0, n_events = 0;

// The default stream of every device is torch's number 0; here each needs a key of its own.
inline StreamState& get_stream(int64_t number, int device) {
  int64_t key = number ? number : -1 - device;
  auto& stream = streams[key];
  stream.id = key;
  stream.device = device;
  return stream;
}
inline StreamState& get_stream(const c10::Stream& stream) { return get_stream(stream.id(), stream.device_index()); }
inline StreamState& get_current_stream() { return get_stream(current_streams[current_device], current_device); }

inline void run_up_to(StreamState& stream, uint64_t position) {
  while (stream.n_run < position && !stream.queue.empty()) {
    auto work = std::move(stream.queue.front());
    stream.queue.pop_front();
    stream.n_run++;
    work();
  }
}
inline void run_all(StreamState& stream) { run_up_to(stream, stream.n_submitted); }
inline void submit(StreamState& stream, std::function<void()> work) {
  stream.queue.push_back(std::move(work));
  stream.n_submitted++;
}
inline void advance_clock(StreamState& stream) {
  merge(stream.clock, host_clock);
  ++stream.clock[stream.id];
}

// A copy between the device and pinned memory that the host has not waited for. To the device: the host must not change
// the bytes yet. To the host: the bytes are kept here, and the host sees them only once it has waited.
struct PendingCopy {
  const char* from;
  char* host_target;  // null if it goes to the device
  size_t nbytes;
  uint64_t checksum;
  int64_t stream;
  uint64_t time;
  std::vector<char> bytes;
};
inline std::deque<PendingCopy> pending_copies;

inline uint64_t compute_checksum(const char* bytes, size_t n) {
  uint64_t hash = 14695981039346656037ull;  // FNV-1a
  for (size_t i = 0; i < n; i++) hash = (hash ^ static_cast<uint8_t>(bytes[i])) * 1099511628211ull;
  return hash;
}

// Deliver the copies that ``known`` says have finished, and check that the host left the others' sources alone.
inline void settle_copies(const Clock& known) {
  for (auto copy = pending_copies.begin(); copy != pending_copies.end();) {
    bool done = has_passed(known, copy->stream, copy->time);
    if (copy->host_target) {
      done = done && !copy->bytes.empty();
      if (done) memcpy(copy->host_target, copy->bytes.data(), copy->nbytes);
    } else if (!has_passed(host_clock, copy->stream, copy->time) &&
               compute_checksum(copy->from, copy->nbytes) != copy->checksum) {
      report_violation("pinned memory was written to before its copy to the device was waited for");
      done = true;
    }
    copy = done ? pending_copies.erase(copy) : copy + 1;
  }
}
inline void drop_copies(const char* begin, size_t nbytes) {
  std::erase_if(pending_copies, [&](const PendingCopy& copy) {
    const char* host_side = copy.host_target ? copy.host_target : copy.from;
    return host_side >= begin && host_side < begin + nbytes;
  });
}
inline void host_waited_for(const Clock& known) {
  settle_copies(known);
  merge(host_clock, known);
}

}  // namespace standin
