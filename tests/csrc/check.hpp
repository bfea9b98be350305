/// The few lines of a test framework that these tests need.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <gdpo/error.hpp>
#include <string>
#include <vector>

namespace check {

struct Case {
  const char* name;
  std::function<void()> run;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, std::function<void()> run) { cases().push_back({name, std::move(run)}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw std::logic_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

/// `work` must throw an E whose message holds `part`.
template <typename E>
void throws(const char* file, int line, const std::string& part, const std::function<void()>& work) {
  try {
    work();
  } catch (const E& error) {
    if (std::string(error.what()).find(part) == std::string::npos) {
      fail(file, line, "the message is: " + std::string(error.what()));
    }
    return;
  }
  fail(file, line, "nothing was thrown; expected: " + part);
}

inline int main() {
  int failed = 0;
  for (const auto& test : cases()) {
    try {
      test.run();
      std::printf("ok   %s\n", test.name);
    } catch (const std::exception& error) {
      std::printf("FAIL %s: %s\n", test.name, error.what());
      ++failed;
    }
  }
  return failed == 0 && !cases().empty() ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                           \
  static void name();                                        \
  static const check::Register register_##name(#name, name); \
  static void name()
#define CHECK(condition) \
  if (!(condition)) check::fail(__FILE__, __LINE__, #condition)
#define THROWS(E, part, ...) check::throws<E>(__FILE__, __LINE__, part, [&] { __VA_ARGS__; })
