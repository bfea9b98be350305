/* The C interface. No exception crosses it: every function returns a status, and gdpo_last_error() says more.
 *
 * Structures start with their own size (sizeof at the time the caller was compiled), so that fields can be added at
 * their end; fields that a caller does not know keep their defaults. */
#ifndef GDPO_GDPO_H
#define GDPO_GDPO_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define GDPO_C_API __attribute__((visibility("default")))
#else
#define GDPO_C_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum gdpo_status {
  GDPO_OK = 0,
  GDPO_INVALID_ARGUMENT = 1,
  GDPO_FOLDER = 2,     /* missing, stale, damaged, foreign or not trusted */
  GDPO_BACKEND = 3,    /* not installed, or cannot run here */
  GDPO_NOT_FINITE = 4, /* the model gave a value that is not finite */
  GDPO_CANCELLED = 5,
  GDPO_OUT_OF_MEMORY = 6,
  GDPO_INTERNAL = 7
} gdpo_status;

typedef enum gdpo_sample { GDPO_U8 = 0, GDPO_U16 = 1 } gdpo_sample;
typedef enum gdpo_color { GDPO_ADAIN = 0, GDPO_WAVELET = 1, GDPO_NONE = 2 } gdpo_color;

/* A loaded engine folder. Any number of threads may upscale with one. */
typedef struct gdpo_upscaler gdpo_upscaler;

/* How to load; see gdpo::Options. Start from gdpo_options_default(). A null string is an empty one. */
typedef struct gdpo_options {
  size_t struct_size;
  const char* backend;
  const char* device;
  const char* library;
  int threads;
  int trust_plan;
  int concurrency;
} gdpo_options;

/* A picture in the caller's memory; strides in bytes. Read as `in`, written as `out`. */
typedef struct gdpo_image {
  size_t struct_size;
  void* data;
  size_t bytes;
  int64_t height, width;
  int64_t row_stride, column_stride, channel_stride;
  int channels;
  gdpo_sample sample;
} gdpo_image;

/* Returns 0 to cancel. */
typedef int (*gdpo_progress)(void* user, int64_t done, int64_t total);

/* How to upscale; see gdpo::Request. Start from gdpo_request_default(). */
typedef struct gdpo_request {
  size_t struct_size;
  uint64_t seed;
  double scale;
  int tile;
  int batch;
  gdpo_color color;
  gdpo_progress progress;
  void* user;
  int64_t max_pixels;
} gdpo_request;

GDPO_C_API gdpo_options gdpo_options_default(void);
GDPO_C_API gdpo_request gdpo_request_default(void);
/* Packed samples [height, width, 3]. */
GDPO_C_API gdpo_image gdpo_image_packed(void* data, int64_t height, int64_t width, gdpo_sample sample);

/* Load a folder. `options` may be null. On success *out must be freed with gdpo_free; otherwise it is null. */
GDPO_C_API gdpo_status gdpo_load(const char* folder, const gdpo_options* options, gdpo_upscaler** out);
/* Null is allowed. */
GDPO_C_API void gdpo_free(gdpo_upscaler* upscaler);

/* Upscale one picture. `request` may be null. */
GDPO_C_API gdpo_status gdpo_upscale(const gdpo_upscaler* upscaler, const gdpo_image* in, const gdpo_image* out,
                                    const gdpo_request* request);

/* Takes finished rows [first, first + rows->height) of a result, which are valid during the call. Returns 0 to cancel.
 */
typedef int (*gdpo_sink)(void* user, int64_t first, const gdpo_image* rows);

/* Upscale one picture whose result need not be in memory whole: `sink` gets its rows from the top to the bottom. */
GDPO_C_API gdpo_status gdpo_upscale_bands(const gdpo_upscaler* upscaler, const gdpo_image* in, gdpo_sink sink,
                                          void* user, const gdpo_request* request);
GDPO_C_API gdpo_status gdpo_output_size(int64_t height, int64_t width, double scale, int64_t* out_height,
                                        int64_t* out_width);

/* What went wrong in this thread's last call that failed; valid until its next call. Never null. */
GDPO_C_API const char* gdpo_last_error(void);
GDPO_C_API const char* gdpo_version(void);

#ifdef __cplusplus
}
#endif

#endif
