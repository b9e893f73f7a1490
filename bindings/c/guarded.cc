#include "guarded.h"

namespace {
thread_local std::string last_error;
}

void bitcore::c_api::set_last_error(const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
}

const char* bitlab_last_error(void) { return last_error.c_str(); }
