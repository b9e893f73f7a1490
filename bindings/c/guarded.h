/// Turns what a call throws into a status and a message of its thread.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "bitcore/exceptions.h"
#include "bitlab.h"

namespace bitcore::c_api {

/// What bitlab_last_error() returns. Never throws: without memory for a message there is none.
void set_last_error(const char* message) noexcept;

/// Runs `call`; nothing that it throws gets out.
template <class Call>
bitlab_status guarded(const Call& call) noexcept {
  try {
    call();
    return BITLAB_OK;
  } catch (const FileError& error) {
    set_last_error(error.what());
    return BITLAB_FILE_ERROR;
  } catch (const StateError& error) {
    set_last_error(error.what());
    return BITLAB_STATE_ERROR;
  } catch (const KernelNotFoundError& error) {
    set_last_error(error.what());
    return BITLAB_KERNEL_NOT_FOUND;
  } catch (const QuantizationError& error) {
    set_last_error(error.what());
    return BITLAB_QUANTIZATION_ERROR;
  } catch (const std::bad_alloc&) {
    set_last_error("out of memory");
    return BITLAB_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    set_last_error(error.what());
  } catch (...) {
    set_last_error("an exception of an unknown type");
  }
  return BITLAB_INTERNAL_ERROR;
}

}  // namespace bitcore::c_api
