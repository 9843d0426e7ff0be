// Errors that cross into Python. The message names the argument, what came and what is allowed;
// the kind picks the Python exception.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tilewright {

enum class ErrorKind { kValue, kType, kNotImplemented, kRuntime };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

// Concatenates anything streamable: str("blocksize: got ", 7, ", allowed: 64..4096").
template <class... Parts>
std::string str(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  throw Error(kind, str(parts...));
}

template <class... Parts>
void check_value(bool ok, const Parts&... parts) {
  if (!ok) fail(ErrorKind::kValue, parts...);
}

template <class... Parts>
void check_type(bool ok, const Parts&... parts) {
  if (!ok) fail(ErrorKind::kType, parts...);
}

}  // namespace tilewright
