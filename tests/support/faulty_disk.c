/* A disk that fails, for any program: LD_PRELOAD=faulty_disk.so. Every operation below the folder FAULTY_ROOT that
 * needs space or flushes counts; from number FAULTY_AT on (1 is the first), they fail as FAULTY_KIND says:
 *   full    ENOSPC, from then on        short   half of that write, then ENOSPC
 *   io      EIO, once                   lost    writes claim success and write nothing, from then on
 *   tiny    writes and reads of at most 7 and 512 bytes, which is allowed     nosync  fsync answers EINVAL
 *   slow    every operation takes 2 ms more                                   eintr   every other write is interrupted
 *   bad     reads fail with EIO, from then on
 * A forked program may choose again: faulty_arm(kind, at); faulty_count() tells how many operations there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_long count, limit;
static char kind[16];
static char root[4096];

#define REAL(type, name, ...)       \
  static type (*real)(__VA_ARGS__); \
  if (!real) *(void**)(&real) = dlsym(RTLD_NEXT, name)

void faulty_arm(const char* new_kind, long at) {
  snprintf(kind, sizeof kind, "%s", new_kind);
  atomic_store(&count, 0);
  atomic_store(&limit, at);
}

long faulty_count(void) { return atomic_load(&count); }

__attribute__((constructor)) static void start(void) {
  const char *where = getenv("FAULTY_ROOT"), *what = getenv("FAULTY_KIND"), *at = getenv("FAULTY_AT");
  snprintf(root, sizeof root, "%s", where ? where : "");
  faulty_arm(what ? what : "none", at ? atol(at) : 0);
}

static int is(const char* name) { return strcmp(kind, name) == 0; }

static int below(const char* path) {
  char whole[8192];
  if (!root[0] || !path) return 0;
  if (path[0] != '/') {
    if (!getcwd(whole, 4096)) return 0;
    strncat(whole, "/", 2);
    strncat(whole, path, 4000);
    path = whole;
  }
  return strncmp(path, root, strlen(root)) == 0;
}

static int watched(int fd) {
  char link[64], path[4096];
  if (!root[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, path, sizeof path - 1);
  if (n <= 0) return 0;
  path[n] = 0;
  return below(path);
}

enum { PASS, FAIL, HALF, LOST };

/* What becomes of the next operation; errno is set for FAIL. */
static int next(int writes) {
  const long number = atomic_fetch_add(&count, 1) + 1, at = atomic_load(&limit);
  if (is("slow")) nanosleep(&(struct timespec){0, 2000000}, NULL);
  if (is("eintr") && writes && number % 2) return errno = EINTR, FAIL;
  if (at <= 0 || number < at) return PASS;
  if (is("full")) return errno = ENOSPC, FAIL;
  if (is("short")) return number == at && writes ? HALF : (errno = ENOSPC, FAIL);
  if (is("io")) return number == at ? (errno = EIO, FAIL) : PASS;
  if (is("lost")) return writes ? LOST : PASS;
  return PASS;
}

static size_t less(int what, size_t size) {
  if (what == HALF) return size / 2;
  return is("tiny") && size > 7 ? 7 : size;
}

static ssize_t swallowed(int fd, size_t size) { return lseek(fd, (off_t)size, SEEK_CUR), (ssize_t)size; }

ssize_t write(int fd, const void* data, size_t size) {
  REAL(ssize_t, "write", int, const void*, size_t);
  if (!watched(fd)) return real(fd, data, size);
  const int what = next(1);
  if (what == FAIL) return -1;
  return what == LOST ? swallowed(fd, size) : real(fd, data, less(what, size));
}

ssize_t pwrite(int fd, const void* data, size_t size, off_t at) {
  REAL(ssize_t, "pwrite", int, const void*, size_t, off_t);
  if (!watched(fd)) return real(fd, data, size, at);
  const int what = next(1);
  if (what == FAIL) return -1;
  return what == LOST ? (ssize_t)size : real(fd, data, less(what, size), at);
}

ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) { return pwrite(fd, data, size, at); }

ssize_t writev(int fd, const struct iovec* parts, int n) {
  REAL(ssize_t, "writev", int, const struct iovec*, int);
  if (!watched(fd)) return real(fd, parts, n);
  const int what = next(1);
  if (what == FAIL) return -1;
  if (what == PASS && !is("tiny")) return real(fd, parts, n);
  size_t whole = 0;
  for (int i = 0; i < n; ++i) whole += parts[i].iov_len;
  if (what == LOST) return swallowed(fd, whole);
  const struct iovec first = {parts[0].iov_base, less(what, parts[0].iov_len)};
  return real(fd, &first, 1);
}

ssize_t sendfile(int out, int in, off_t* at, size_t size) {
  REAL(ssize_t, "sendfile", int, int, off_t*, size_t);
  if (watched(out) && next(0) == FAIL) return -1;
  return real(out, in, at, size);
}

ssize_t sendfile64(int out, int in, off64_t* at, size_t size) { return sendfile(out, in, at, size); }

ssize_t copy_file_range(int in, off64_t* from, int out, off64_t* to, size_t size, unsigned flags) {
  REAL(ssize_t, "copy_file_range", int, off64_t*, int, off64_t*, size_t, unsigned);
  if (watched(out) && next(0) == FAIL) return -1;
  return real(in, from, out, to, size, flags);
}

int ftruncate(int fd, off_t size) {
  REAL(int, "ftruncate", int, off_t);
  return watched(fd) && next(0) == FAIL ? -1 : real(fd, size);
}

int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

int fsync(int fd) {
  REAL(int, "fsync", int);
  if (!watched(fd)) return real(fd);
  if (next(0) == FAIL) return -1;
  return is("nosync") ? (errno = EINVAL, -1) : real(fd);
}

int mkdir(const char* path, mode_t mode) {
  REAL(int, "mkdir", const char*, mode_t);
  return below(path) && next(0) == FAIL ? -1 : real(path, mode);
}

int rename(const char* from, const char* to) {
  REAL(int, "rename", const char*, const char*);
  return below(to) && next(0) == FAIL ? -1 : real(from, to);
}

#define OPEN(name)                                                      \
  int name(const char* path, int flags, ...) {                          \
    mode_t mode = 0;                                                    \
    if (flags & (O_CREAT | O_TMPFILE)) {                                \
      va_list more;                                                     \
      va_start(more, flags);                                            \
      mode = va_arg(more, mode_t);                                      \
      va_end(more);                                                     \
    }                                                                   \
    REAL(int, #name, const char*, int, ...);                            \
    if ((flags & O_CREAT) && below(path) && next(0) == FAIL) return -1; \
    return real(path, flags, mode);                                     \
  }
OPEN(open)
OPEN(open64)

ssize_t read(int fd, void* data, size_t size) {
  REAL(ssize_t, "read", int, void*, size_t);
  if (!root[0] || !(is("tiny") || is("bad") || is("slow")) || !watched(fd)) return real(fd, data, size);
  if (is("slow")) nanosleep(&(struct timespec){0, 2000000}, NULL);
  if (is("bad") && atomic_fetch_add(&count, 1) + 1 >= atomic_load(&limit)) return errno = EIO, -1;
  return real(fd, data, is("tiny") && size > 512 ? 512 : size);
}
