/// One object, many threads, fewer places than threads: test_threads FOLDERS [ROUNDS].
#include <atomic>
#include <cstdlib>
#include <gdpo/pnm.hpp>
#include <gdpo/upscaler.hpp>
#include <iostream>
#include <thread>
#include <vector>

int main(int count, char** values) {
  if (count < 2) return 2;
  const std::string root = values[1];
  gdpo::Options options;
  options.threads = 3;
  options.concurrency = 2;
  const auto up = gdpo::Upscaler::load(root + "/plain", options);
  const gdpo::Picture in = gdpo::read_ppm(root + "/in.ppm");
  const auto expected = gdpo::read_ppm(root + "/expected-tiled.ppm").bytes;
  std::atomic<int> good{0}, cancelled{0};
  const int rounds = count > 2 ? std::atoi(values[2]) : 2;
  std::vector<std::thread> threads;
  for (int t = 0; t < 5; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < rounds; ++i) {
        gdpo::Picture out(gdpo::output_size(in.size), in.sample);
        gdpo::Request request;
        request.seed = 7;
        request.tile = 24;
        if (t == 4) request.progress = [](std::int64_t done, std::int64_t) { return done < 2; };
        try {
          up.upscale(in.view(), out.span(), request);
          good += out.bytes == expected;
        } catch (const gdpo::Cancelled&) {
          ++cancelled;
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  std::cout << good << " pictures as expected, " << cancelled << " cancelled\n";
  return good == 4 * rounds && cancelled == rounds ? 0 : 1;
}
