"""The operators `torch.ops.bitcore.*` and what completes them: what kernels and the documented functions stand on."""

from bitcore import _requirements as _requirements  # first: without torch it says what to install
