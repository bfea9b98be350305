/// A pool of threads that many callers share.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace gdpo::detail {

class Pool {
 public:
  /// @param threads that work on one `run`, the caller's included; at least 1
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  /// Call work(0) ... work(count - 1), each once, in any order and on any thread; return when all are done.
  /// The first exception is thrown again here, after the others have ended.
  void run(std::int64_t count, const std::function<void(std::int64_t)>& work);

 private:
  struct Job;
  void serve();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> jobs_;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

/// Cores that this process may use.
int usable_cores();

}  // namespace gdpo::detail
