/// @file bitlab.h
/// BitLab from any language: functions of C that take the caller's memory, throw nothing and print nothing.
///
/// Every function returns a bitlab_status. Where it is not BITLAB_OK, bitlab_last_error() has one line that names the
/// argument and both values, and what was to be written is unspecified. All functions may run on any number of threads
/// at once.
#ifndef BITLAB_H
#define BITLAB_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
/// Marks what the shared object exports.
#define BITLAB_EXPORT __attribute__((visibility("default")))
#else
#define BITLAB_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

/// What became of a call.
typedef int32_t bitlab_status;
enum {
  BITLAB_OK = 0,                  ///< It did what it says.
  BITLAB_QUANTIZATION_ERROR = 1,  ///< An argument has a value that does not exist or does not fit the others.
  BITLAB_OUT_OF_MEMORY = 2,       ///< There was not enough memory.
  BITLAB_INTERNAL_ERROR = 3       ///< Anything else: a fault of BitLab.
};

/// Types of elements.
typedef int32_t bitlab_dtype;
enum {
  BITLAB_FLOAT32 = 0,   ///< IEEE binary32.
  BITLAB_BFLOAT16 = 1,  ///< The upper half of a binary32.
  BITLAB_FLOAT16 = 2,   ///< IEEE binary16.
  BITLAB_INT8 = 3,      ///< Signed bytes.
  BITLAB_UINT8 = 4      ///< Bytes.
};

/// How a packed weight stores its codes.
typedef int32_t bitlab_layout;
enum {
  BITLAB_2BIT = 1,  ///< Four codes in a byte.
  BITLAB_BASE3 = 2  ///< Five codes in a byte; exists where that makes a row smaller (from 65 in_features on always).
};

/// Over which weights a scale is shared.
typedef int32_t bitlab_granularity;
enum {
  BITLAB_PER_TENSOR = 0,   ///< All.
  BITLAB_PER_CHANNEL = 1,  ///< Those of an output row.
  BITLAB_PER_GROUP = 2     ///< Those of group_size adjacent in_features of a row.
};

/// A matrix to read: `rows` rows of `cols` adjacent elements, `row_stride` elements apart.
typedef struct bitlab_matrix {
  const void* data;    ///< First element of the first row.
  bitlab_dtype dtype;  ///< Of the elements.
  int64_t rows;        ///< Number of rows.
  int64_t cols;        ///< Elements in a row.
  int64_t row_stride;  ///< Elements from the start of a row to the start of the next.
} bitlab_matrix;

/// The message of this thread's last call that failed; empty before the first. Valid until the next one fails.
BITLAB_EXPORT const char* bitlab_last_error(void);

/// Bytes of a row of a packed weight, which is uint8 (out_features, row_bytes).
BITLAB_EXPORT bitlab_status bitlab_packed_row_bytes(int64_t out_features, int64_t in_features, bitlab_layout layout,
                                                    int64_t* row_bytes);

/// Packs int8 codes -1, 0 and 1 of shape (out_features, in_features).
/// @param packed       out_features * row_bytes bytes.
/// @param packed_bytes The size of `packed`.
BITLAB_EXPORT bitlab_status bitlab_pack_weights(bitlab_matrix codes, bitlab_layout layout, uint8_t* packed,
                                                size_t packed_bytes);

/// Checks every byte of a packed weight and unpacks it.
/// @param packed uint8 (out_features, row_bytes), contiguous.
/// @param codes  out_features * in_features bytes.
BITLAB_EXPORT bitlab_status bitlab_unpack_weights(bitlab_matrix packed, int64_t in_features, int8_t* codes,
                                                  size_t codes_bytes);

/// Quantizes a floating weight by the mean of its magnitudes (docs/contract.md) and packs it, on all cores.
/// @param group_size   Of BITLAB_PER_GROUP: 32, 64, 128 or 256; otherwise 128.
/// @param scale        float32: 1 or out_features elements; BITLAB_PER_GROUP: float16 (out_features,
///                     ceil(in_features / group_size)).
/// @param scale_bytes  The size of `scale`.
BITLAB_EXPORT bitlab_status bitlab_prepare_weights(bitlab_matrix weight, bitlab_granularity granularity,
                                                   int64_t group_size, bitlab_layout layout, void* scale,
                                                   size_t scale_bytes, uint8_t* packed, size_t packed_bytes);

#ifdef __cplusplus
}
#endif

#endif
