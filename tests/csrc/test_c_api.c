/* The C interface from C: test_c_api FOLDER. */
#include <gdpo/gdpo.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

static void expect(int condition, const char* what) {
  if (!condition) {
    printf("FAIL %s (last error: %s)\n", what, gdpo_last_error());
    ++failures;
  }
}

static int count_to_one(void* user, int64_t done, int64_t total) {
  (void)total;
  *(int64_t*)user = done;
  return 0;
}

struct rows {
  unsigned char* data;
  int64_t next, stop;
};

static int append(void* user, int64_t first, const gdpo_image* band) {
  struct rows* rows = user;
  if (first != rows->next || first >= rows->stop) return 0;
  memcpy(rows->data + first * band->row_stride, band->data, band->bytes);
  rows->next += band->height;
  return 1;
}

int main(int count, char** values) {
  enum { H = 40, W = 40 };
  static unsigned char in[H * W * 3], out[16 * H * W * 3], again[16 * H * W * 3];
  int64_t seen = 0, height = 0, width = 0;
  gdpo_upscaler* up = NULL;
  gdpo_request request = gdpo_request_default();
  gdpo_image source = gdpo_image_packed(in, H, W, GDPO_U8), target = gdpo_image_packed(out, 4 * H, 4 * W, GDPO_U8);
  gdpo_image other = gdpo_image_packed(again, 4 * H, 4 * W, GDPO_U8), bad;
  if (count != 2) return 2;
  for (int i = 0; i < H * W * 3; ++i) in[i] = (unsigned char)(i * 7);

  expect(gdpo_load(NULL, NULL, &up) == GDPO_INVALID_ARGUMENT && up == NULL, "a null folder");
  expect(gdpo_load("/nowhere", NULL, &up) == GDPO_FOLDER && strstr(gdpo_last_error(), "no such folder"), "no folder");
  expect(gdpo_load(values[1], NULL, NULL) == GDPO_INVALID_ARGUMENT, "a null out");
  expect(gdpo_load(values[1], NULL, &up) == GDPO_OK && up != NULL, "load");
  expect(gdpo_output_size(H, W, 4.0, &height, &width) == GDPO_OK && height == 4 * H && width == 4 * W, "output_size");
  expect(gdpo_output_size(H, W, -1.0, &height, &width) == GDPO_INVALID_ARGUMENT, "a negative scale");
  expect(gdpo_upscale(up, &source, &target, NULL) == GDPO_OK, "upscale");
  expect(gdpo_upscale(up, &source, &other, &request) == GDPO_OK && memcmp(out, again, sizeof out) == 0,
         "the same again");
  request.seed = 1;
  expect(gdpo_upscale(up, &source, &other, &request) == GDPO_OK && memcmp(out, again, sizeof out) != 0, "another seed");

  expect(gdpo_upscale(NULL, &source, &target, NULL) == GDPO_INVALID_ARGUMENT, "a null upscaler");
  expect(gdpo_upscale(up, NULL, &target, NULL) == GDPO_INVALID_ARGUMENT, "a null in");
  bad = source, bad.data = NULL;
  expect(gdpo_upscale(up, &bad, &target, NULL) == GDPO_INVALID_ARGUMENT, "null data");
  bad = source, bad.bytes -= 1;
  expect(gdpo_upscale(up, &bad, &target, NULL) == GDPO_INVALID_ARGUMENT, "a short buffer");
  bad = source, bad.row_stride = -bad.row_stride;
  expect(gdpo_upscale(up, &bad, &target, NULL) == GDPO_INVALID_ARGUMENT, "a negative stride");
  bad = source, bad.channels = 4;
  expect(gdpo_upscale(up, &bad, &target, NULL) == GDPO_INVALID_ARGUMENT, "four channels");
  bad = source, bad.struct_size = 4096;
  expect(gdpo_upscale(up, &bad, &target, NULL) == GDPO_INVALID_ARGUMENT, "a structure of the future");
  bad = gdpo_image_packed(in, -1, W, GDPO_U8);
  expect(gdpo_upscale(up, &bad, &target, NULL) == GDPO_INVALID_ARGUMENT, "a negative height");
  request.progress = count_to_one, request.user = &seen;
  expect(gdpo_upscale(up, &source, &target, &request) == GDPO_CANCELLED && seen == 1, "cancel");
  expect(strstr(gdpo_last_error(), "cancelled after 1 of") != NULL, "its message");
  request = gdpo_request_default();
  struct rows rows = {again, 0, 4 * H};
  memset(again, 0, sizeof again);
  expect(gdpo_upscale_bands(up, &source, append, &rows, &request) == GDPO_OK && rows.next == 4 * H &&
             memcmp(out, again, sizeof out) == 0,
         "bands");
  rows = (struct rows){again, 0, 0};
  expect(gdpo_upscale_bands(up, &source, append, &rows, &request) == GDPO_CANCELLED, "a band that cancels");
  expect(gdpo_upscale_bands(up, &source, NULL, NULL, &request) == GDPO_INVALID_ARGUMENT, "no sink");
  request.struct_size = offsetof(gdpo_request, max_pixels);
  expect(gdpo_upscale(up, &source, &other, &request) == GDPO_OK, "a caller of an older header");
  request = gdpo_request_default();
  request.max_pixels = 16 * H * W - 1;
  expect(gdpo_upscale(up, &source, &target, &request) == GDPO_INVALID_ARGUMENT, "more pixels than asked for");
  gdpo_free(up);
  gdpo_free(NULL);
  printf("%s %d failures\n", gdpo_version(), failures);
  return failures;
}
