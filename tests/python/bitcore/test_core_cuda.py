"""TorchKernel on a GPU: the CPU's bits, and no synchronization in inference. Skipped where there is none."""

import pytest
import torch

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.ops import base, bitlinear
from bitcore.testing import assert_same_bits, check_kernel
from core_helpers import CONFIGS, INT8_CONFIGS, PER_TOKEN, id_of, make_layer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("tf32", [False, True])
def test_the_contract(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer sums stay exact, and the bound of the float32 configs holds, also where TF32 is allowed."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    check_kernel("TorchKernel", "cuda")
    layer = make_layer(64, out_features=96, in_features=4096)
    for config in INT8_CONFIGS:
        weights = bitlinear.prepare_weights(layer.weight, config)
        expected = bitlinear.forward(layer.x, None, *weights, layer.bias, config)
        scale, qweight = (tensor.cuda() for tensor in weights)
        y = bitlinear.forward(layer.x.cuda(), None, scale, qweight, layer.bias.cuda(), config)
        assert_same_bits(y.cpu(), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_prepared_weights_and_training_have_the_bits_of_a_cpu(config: BitQuantConfig) -> None:
    layer = make_layer(6)
    for ours, expected in zip(
        bitlinear.prepare_weights(layer.weight.cuda(), config),
        bitlinear.prepare_weights(layer.weight, config),
        strict=True,
    ):
        assert torch.equal(ours.cpu(), expected)
    leaves = [tensor.cuda().requires_grad_() for tensor in layer]
    y = bitlinear.forward(leaves[0], leaves[1], bias=leaves[2], quant_config=config, training=True)
    y.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    expected = bitlinear.forward(layer.x, layer.weight, bias=layer.bias, quant_config=config, training=True)
    if config.activation_dtype == "int8":
        assert_same_bits(y.detach().cpu(), expected)


def test_inference_never_synchronizes_and_marks_damage() -> None:
    layer = make_layer(6)
    x = layer.x.cuda()
    scale, qweight = bitlinear.prepare_weights(layer.weight.cuda(), PER_TOKEN)
    damaged = qweight.clone()
    damaged.view(-1)[7] |= 3
    torch.cuda.set_sync_debug_mode("error")
    try:
        good = bitlinear.forward(x, None, scale, qweight, None, PER_TOKEN)
        bad = bitlinear.forward(x, None, scale, damaged, None, PER_TOKEN)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert good.isfinite().all()
    assert bad.isnan().all()
    with pytest.raises(QuantizationError, match="code"):
        base.check_qweight(damaged, 37)
