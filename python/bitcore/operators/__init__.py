"""The operators `torch.ops.bitcore.*` and what completes them: what kernels and the documented functions stand on."""
