/// What a loaded folder is made of.
#pragma once

#include <condition_variable>
#include <gdpo/upscaler.hpp>
#include <map>
#include <memory>
#include <mutex>

#include "backends/backend.hpp"
#include "picture/parallel.hpp"

namespace gdpo {

struct GDPO_HIDDEN Upscaler::Impl {
  using Sessions = std::map<std::string, std::unique_ptr<detail::Session>>;

  Impl(detail::Manifest manifest, Sessions sessions, std::string backend, std::string version, const Options& options,
       std::shared_ptr<detail::Accelerator> accelerator = nullptr);

  /// A public handle.
  static Upscaler wrap(std::shared_ptr<const Impl> impl) { return Upscaler(std::move(impl)); }

  const detail::Manifest manifest;
  const Sessions sessions;
  const std::string backend, version;
  const std::shared_ptr<detail::Accelerator> accelerator;  ///< null: the CPU does what is around the sessions
  mutable detail::Pool pool;

  /// Lets at most `concurrency` calls be at work; the others wait their turn.
  class Turn {
   public:
    explicit Turn(const Impl& impl);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    const Impl& impl_;
  };

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable free_;
  mutable int places_;
};

}  // namespace gdpo
