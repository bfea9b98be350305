#include "picture/parallel.hpp"

#include <sched.h>

#include <algorithm>

namespace gdpo::detail {

struct Pool::Job {
  Job(std::int64_t count, const std::function<void(std::int64_t)>& work) : count(count), work(work) {}

  /// Take items until none is left. `work` lives as long as the caller of `run`, which waits for every item taken.
  void help() {
    for (std::int64_t i; (i = next.fetch_add(1)) < count;) {
      std::exception_ptr caught;
      try {
        work(i);
      } catch (...) {
        caught = std::current_exception();
      }
      const std::lock_guard lock(mutex);
      if (caught && !failure) failure = caught;
      if (++done == count) finished.notify_all();
    }
  }

  const std::int64_t count;
  const std::function<void(std::int64_t)>& work;
  std::atomic<std::int64_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  std::int64_t done = 0;
  std::exception_ptr failure;
};

Pool::Pool(int threads) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
  } catch (const std::system_error&) {
    // Fewer threads than asked for: the callers do the rest.
  }
}

Pool::~Pool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(std::int64_t count, const std::function<void(std::int64_t)>& work) {
  if (count <= 1 || workers_.empty()) {
    for (std::int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  const auto job = std::make_shared<Job>(count, work);
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(job);
  }
  wake_.notify_all();
  job->help();
  {
    const std::lock_guard lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
  }
  std::unique_lock lock(job->mutex);
  job->finished.wait(lock, [&] { return job->done == job->count; });
  if (job->failure) std::rethrow_exception(job->failure);
}

void Pool::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
    if (stop_) return;
    const auto job = jobs_.front();
    if (job->next.load() >= job->count) {
      jobs_.pop_front();  // all taken: its caller waits for the last of them
      continue;
    }
    lock.unlock();
    job->help();
    lock.lock();
  }
}

int usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(CPU_COUNT(&set), 1);
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);  // more than 1024 cores
}

}  // namespace gdpo::detail
