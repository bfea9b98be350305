/// The parts that need no model.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <gdpo/pnm.hpp>
#include <gdpo/upscaler.hpp>
#include <numeric>

#include "api/views.hpp"
#include "check.hpp"
#include "folder/manifest.hpp"
#include "folder/sha256.hpp"
#include "picture/color.hpp"
#include "picture/noise.hpp"
#include "picture/resample.hpp"
#include "picture/tiles.hpp"

using namespace gdpo;
using namespace gdpo::detail;

TEST(philox_gives_random123s_published_vectors) {
  constexpr std::uint32_t all = 0xFFFFFFFF;
  using Words = std::array<std::uint32_t, 4>;
  CHECK((philox({0, 0, 0, 0}, 0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK((philox({all, all, all, all}, ~std::uint64_t{0}) == Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK((philox({0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}, 0x299F31D0A4093822) ==
         Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(the_compiled_table_is_the_projects) { CHECK(sha256(quantile_table(), sizeof(float) << 16) == kTableSha256); }

TEST(noise_windows_are_cut_from_one_field) {
  Pool pool(3);
  std::vector<float> whole(48 * 40 * 150), part(48 * 7 * 100);
  noise_field(7, 48, {0, 40}, {0, 150}, whole.data(), pool);
  noise_field(7, 48, {11, 18}, {33, 133}, part.data(), pool);
  for (int c = 0; c < 48; ++c) {
    for (int y = 0; y < 7; ++y) {
      CHECK(std::equal(&part[(c * 7 + y) * 100], &part[(c * 7 + y) * 100] + 100, &whole[(c * 40 + 11 + y) * 150 + 33]));
    }
  }
  THROWS(InvalidArgument, "rows must be a range", noise_field(0, 1, {4, 0}, {0, 1}, nullptr, pool));
  THROWS(InvalidArgument, "columns must be a range",
         noise_field(0, 1, {0, 1}, {0, (std::int64_t{1} << 32) + 1}, nullptr, pool));
  THROWS(InvalidArgument, "channels", noise_field(0, 0, {0, 1}, {0, 1}, nullptr, pool));
}

TEST(sha256_gives_the_published_digests) {
  const auto both = [](const std::string& data) {
    const std::string hex = sha256(data.data(), data.size());
    CHECK(hex == sha256_portable(data.data(), data.size()));
    return hex;
  };
  CHECK(both("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(both("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(both(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  for (std::size_t length = 0; length < 200; ++length) both(std::string(length, 'x'));
}

TEST(a_filter_is_normalised_and_a_constant_stays) {
  for (const auto& [size, target] : {std::pair(5, 20), {20, 5}, {7, 7}, {1, 9}, {300, 11}, {13, 52}}) {
    const Taps taps(size, target);
    for (std::size_t i = 0; i < taps.first.size(); ++i) {
      const auto* const weights = &taps.weights[i * taps.count];
      CHECK(std::abs(std::accumulate(weights, weights + taps.count, 0.0) - 1) < 1e-6);
    }
  }
  const std::vector<std::uint16_t> flat(9 * 11 * 3, 40000);
  Pool pool(2);
  const Resampler resampler(ImageView::packed(flat.data(), {9, 11}), {36, 44});
  std::atomic<std::int64_t> seen{0};
  resampler.window({-5, 60}, {-70, 90}, pool, [&](std::int64_t, std::int64_t count, const float* planes) {
    for (std::int64_t i = 0; i < 3 * count * 160; ++i) {
      if (std::abs(planes[i] - 40000) > 0.02f) return;
    }
    seen += count;
  });
  CHECK(seen == 65);
}

TEST(tiles_cover_and_their_weights_sum_to_one) {
  for (const std::int64_t size : {1, 16, 128, 129, 400, 1000}) {
    const Axis axis = cover(size, 128, 16, 4, false);
    std::vector<double> sum(static_cast<std::size_t>(axis.end() * 2));
    const auto weights = axis.weights(2);
    for (std::int64_t j = 0; j < axis.count(); ++j) {
      for (std::int64_t i = 0; i < axis.tile * 2; ++i) sum[axis.starts[j] * 2 + i] += weights[j * axis.tile * 2 + i];
    }
    CHECK(axis.end() >= size);
    CHECK(std::all_of(sum.begin(), sum.end(), [](double s) { return std::abs(s - 1) < 1e-6; }));
  }
  THROWS(InvalidArgument, "longer than its overlap", cover(100, 16, 16, 4, false));
}

TEST(the_pool_does_everything_once_and_throws_again) {
  Pool pool(4);
  for (int round = 0; round < 50; ++round) {
    std::vector<int> hits(97);
    pool.run(97, [&](std::int64_t i) { ++hits[i]; });
    CHECK(std::all_of(hits.begin(), hits.end(), [](int h) { return h == 1; }));
  }
  THROWS(InvalidArgument, "seven", pool.run(20, [](std::int64_t i) {
    if (i == 7) throw InvalidArgument("seven");
  }));
}

TEST(views_are_checked) {
  std::vector<std::uint8_t> in(4 * 5 * 3), out(16 * 20 * 3);
  const ImageView good = ImageView::packed(static_cast<const std::uint8_t*>(in.data()), {4, 5});
  const ImageSpan target = ImageSpan::packed(out.data(), {16, 20});
  check_input(good);
  check_output(target, good, {16, 20});
  const auto with = [&](auto change) {
    ImageView image = good;
    change(image);
    check_input(image);
  };
  THROWS(InvalidArgument, "data is null", with([](auto& i) { i.data = nullptr; }));
  THROWS(InvalidArgument, "the buffer has 59", with([](auto& i) { i.bytes = 59; }));
  THROWS(InvalidArgument, "row_stride must not be negative; got -15", with([](auto& i) { i.row_stride = -15; }));
  THROWS(InvalidArgument, "channels must be 3", with([](auto& i) { i.channels = 4; }));
  THROWS(InvalidArgument, "size must be at least 1x1", with([](auto& i) { i.size.height = 0; }));
  THROWS(InvalidArgument, "beyond all memory", with([](auto& i) { i.row_stride = INT64_MAX; }));
  THROWS(InvalidArgument, "beyond all memory", with([](auto& i) {
           i.size = {900000000, 900000000}, i.row_stride = 1 << 30, i.column_stride = INT64_MAX / 2;
         }));
  THROWS(InvalidArgument, "sides must be at most",
         with([](auto& i) { i.size.width = INT64_MAX, i.column_stride = 0; }));
  THROWS(InvalidArgument, "sample must be", with([](auto& i) { i.sample = static_cast<Sample>(9); }));
  const auto span = [&](auto change) {
    ImageSpan image = target;
    change(image);
    check_output(image, good, {16, 20});
  };
  THROWS(InvalidArgument, "size must be 16x20; got 15x20", span([](auto& i) { i.size.height = 15; }));
  THROWS(InvalidArgument, "share memory", span([](auto& i) { i.row_stride = 3; }));
  THROWS(InvalidArgument, "share memory", span([](auto& i) { i.channel_stride = 0; }));
  THROWS(InvalidArgument, "as many bits", span([](auto& i) {
           i.sample = Sample::u16;  // refused before a sample is touched: the buffer may be half as long as it says
           i.bytes *= 2, i.row_stride *= 2, i.column_stride *= 2, i.channel_stride *= 2;
         }));
  THROWS(InvalidArgument, "out overlaps in", span([&](auto& i) { i.data = in.data(), i.bytes = out.size(); }));
}

TEST(sizes_round_as_pythons) {
  CHECK((output_size({5, 3}, 0.5) == Size{2, 2}));  // halves to even
  CHECK((output_size({1, 1}, 0.05) == Size{1, 1}));
  CHECK((output_size({10, 20}) == Size{40, 80}));
  THROWS(InvalidArgument, "scale must be between", output_size({4, 4}, 0));
  THROWS(InvalidArgument, "scale must be between", output_size({4, 4}, std::nan("")));
  THROWS(InvalidArgument, "megapixels", output_size({100000, 100000}));
  THROWS(InvalidArgument, "at least 1x1", output_size({0, 4}));
}

TEST(ppm_files_are_read_and_refused) {
  const std::string good = "P6\n# a comment\n2 1\n255\nabcdef";
  const Picture picture = parse_ppm(good.data(), good.size());
  CHECK((picture.size == Size{1, 2}) && picture.bytes[5] == 'f');
  const std::string deep = std::string("P6 1 1 65535 ") + std::string("\x01\x02\x03\x04\x05\x06", 6);
  const Picture wide = parse_ppm(deep.data(), deep.size());
  CHECK(wide.sample == Sample::u16 && wide.bytes[0] == 2 && wide.bytes[1] == 1);
  for (const std::string bad :
       {"", "P5 1 1 255 a", "P6 0 1 255 abc", "P6 1 1 254 abc", "P6 2 2 255 abc", "P6 -1 1 255 abc", "P6 1 1",
        "P6 99999999999999999999 1 255 a", "P6 16777216 16777216 255 a", "P6 1 1 255"}) {
    THROWS(InvalidArgument, "PPM", parse_ppm(bad.data(), bad.size()));
  }
  THROWS(std::system_error, "nowhere.ppm", read_ppm("/nowhere.ppm"));
}

TEST(the_low_pass_keeps_what_is_flat_and_quantising_is_exact) {
  std::vector<float> plane(40 * 50, 12.5f);
  lowpass(plane, 40, 50);
  CHECK(std::all_of(plane.begin(), plane.end(), [](float v) { return v == 12.5f; }));
  const float values[] = {-2, -1, 0, 1, 7};
  std::uint16_t out[5];
  quantise(values, 5, out, 1);
  CHECK(out[0] == 0 && out[1] == 0 && out[2] == 32768 && out[3] == 65535 && out[4] == 65535);
  CHECK(to_8_bit(65535) == 255 && to_8_bit(128) == 0 && to_8_bit(129) == 1);
}

TEST(a_manifest_nested_deeply_is_refused_before_it_is_printed) {
  const std::string deep = std::string(200000, '[') + std::string(200000, ']');
  for (const std::string& text : {deep, "{\"format\": " + deep + "}", std::string(400000, '[')}) {
    THROWS(FolderError, "deep", parse_manifest(text.data(), text.data() + text.size()));
  }
}

TEST(a_manifest_that_programs_read_differently_is_refused) {
  const std::pair<const char*, std::string> wrong[] = {
      {"twice", R"({"format": 1, "format": 1})"},
      {"twice", R"({"model": {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1, "\u0062": 2}]}})"},
      {"zero byte", std::string("{}\0", 3)},
      {"zero byte", std::string("{}\0{", 4)},
      {"byte order mark", "\xef\xbb\xbf{}"},
  };
  for (const auto& [reason, text] : wrong) {
    THROWS(FolderError, reason, parse_manifest(text.data(), text.data() + text.size()));
  }
}

int main() { return check::main(); }
