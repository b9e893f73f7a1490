/// @file bitcore.h
/// Every header of the engine.
#pragma once

#include "bitcore/config.h"
#include "bitcore/exceptions.h"
#include "bitcore/executor.h"
#include "bitcore/io.h"
#include "bitcore/kernels/base.h"
#include "bitcore/kernels/registry.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/ops/packing.h"
#include "bitcore/tensor.h"
#include "bitcore/version.h"
