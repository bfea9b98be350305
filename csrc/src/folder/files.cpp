#include "folder/files.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace gdpo::detail {
namespace {

class Handle {
 public:
  explicit Handle(int number) : number_(number) {}
  ~Handle() {
    if (number_ >= 0) close(number_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  int get() const { return number_; }

 private:
  int number_;
};

}  // namespace

bool is_file(const std::string& path) {
  struct stat status;
  return lstat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

Bytes read_regular(const std::string& path, std::int64_t limit) {
  // Opening a pipe would wait for its writer; opening a link is refused.
  const Handle file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  struct stat status;
  if (file.get() < 0 && errno == EACCES) throw FolderError(path + ": not readable (permission denied)");
  if (file.get() < 0 || fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode)) {
    throw FolderError(path + ": missing, or not a regular file; build the folder again");
  }
  if (status.st_size > limit) throw FolderError(text(path, ": larger than ", limit, " bytes"));
  Bytes content(static_cast<std::size_t>(status.st_size));
  for (std::size_t done = 0; done < content.size();) {
    const ssize_t count = read(file.get(), content.data() + done, content.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw FolderError(text(path, ": cannot be read (", std::strerror(errno), ")"));
    if (count == 0) throw FolderError(path + ": shorter than its size; it is being written");
    done += static_cast<std::size_t>(count);
  }
  return content;
}

}  // namespace gdpo::detail
