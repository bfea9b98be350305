/// A plain mutation fuzzer for compilers without libFuzzer: NAME SECONDS SEED FILES... starts from the files, and keeps
/// the input it is at in crash-NAME. With SECONDS 0 it only runs the files, as a regression test.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes mutated(Bytes bytes, const std::vector<Bytes>& corpus, std::mt19937_64& random) {
  static const std::vector<std::string> words = {
      "65536", "0", "-1", "1e9", "null", "\"\"", "[]", "{}", "255", "65535", "18446744073709551616", "\xff", "P6"};
  const auto below = [&](std::size_t n) { return n == 0 ? 0 : static_cast<std::size_t>(random() % n); };
  for (std::size_t step = 0, steps = 1 + below(4); step < steps; ++step) {
    const std::size_t at = below(bytes.size() + 1);
    switch (below(7)) {
      case 0:
        if (at < bytes.size()) bytes[at] = static_cast<std::uint8_t>(bytes[at] ^ 1u << below(8));
        break;
      case 1:
        if (at < bytes.size()) bytes[at] = static_cast<std::uint8_t>(random());
        break;
      case 2:
        bytes.resize(at);
        break;
      case 3: {
        const auto end = at + below(std::min<std::size_t>(bytes.size() - at, 64) + 1);
        bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(at), bytes.begin() + static_cast<std::ptrdiff_t>(end));
        break;
      }
      case 4: {
        const auto& word = words[below(words.size())];
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), word.begin(), word.end());
        break;
      }
      case 5: {
        const auto& other = corpus[below(corpus.size())];
        const std::size_t from = below(other.size());
        const std::size_t count = below(std::min<std::size_t>(other.size() - from, 64) + 1);
        const auto start = other.begin() + static_cast<std::ptrdiff_t>(from);
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), start,
                     start + static_cast<std::ptrdiff_t>(count));
        break;
      }
      default:
        for (std::size_t i = 0, n = below(9); i < n; ++i) {
          bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), static_cast<std::uint8_t>(random()));
        }
    }
  }
  return bytes;
}

}  // namespace

int main(int count, char** values) {
  if (count < 4) return 2;
  const double seconds = std::atof(values[1]);
  std::mt19937_64 random(std::strtoull(values[2], nullptr, 10));
  std::vector<Bytes> corpus;
  for (int i = 3; i < count; ++i) {
    std::ifstream file(values[i], std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  for (const auto& bytes : corpus) LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  const std::string name = std::string(values[0]).substr(std::string(values[0]).rfind('/') + 1);
  const auto begin = std::chrono::steady_clock::now();
  std::uint64_t runs = corpus.size();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds) {
    const Bytes bytes = mutated(corpus[random() % corpus.size()], corpus, random);
    if (std::getenv("GDPO_FUZZ_KEEP") != nullptr) {
      std::ofstream("crash-" + name, std::ios::binary)
          .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    }
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    ++runs;
  }
  std::printf("%s: %llu inputs\n", name.c_str(), static_cast<unsigned long long>(runs));
  return 0;
}
