// The engine's threads are torch's: the operators follow torch.set_num_threads and never oversubscribe.
#pragma once

#include "bitcore/executor.h"

namespace bitcore::torch_ops {

Executor& torch_executor();

}  // namespace bitcore::torch_ops
