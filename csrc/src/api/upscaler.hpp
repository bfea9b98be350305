/// What a loaded folder is made of.
#pragma once

#include <condition_variable>
#include <gdpo/upscaler.hpp>
#include <memory>
#include <mutex>

#include "backends/backend.hpp"
#include "picture/parallel.hpp"
#include "picture/restore.hpp"

namespace gdpo {

struct GDPO_HIDDEN Upscaler::Impl {
  Impl(detail::Model model, std::string backend, std::string version, const Options& options,
       std::shared_ptr<detail::Accelerator> accelerator = nullptr);

  /// A public handle.
  static Upscaler wrap(std::shared_ptr<const Impl> impl);

  /// Upscale pictures that were checked.
  void run(const std::vector<ImageView>& in, std::vector<detail::Destination> out, const Request& request) const;

  const detail::Model model;
  const std::string backend, version;
  const std::shared_ptr<detail::Accelerator> accelerator;  ///< null: the CPU does what is around the sessions
  mutable detail::Pool pool;
  const int process;  ///< that loaded it: a fork's child has none of its threads

 private:
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

  mutable std::mutex mutex_;
  mutable std::condition_variable free_;
  mutable int places_;
};

}  // namespace gdpo
