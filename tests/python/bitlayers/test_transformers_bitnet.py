"""Models that transformers loaded with its own BitNet layers, in both conventions: the same codes and scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations import bitnet

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.ops.packing import unpack_weights
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear, convert
from bitlayers.transformers import BitLabConfig

pytestmark = pytest.mark.medium  # Importing transformers takes seconds.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IDS = torch.arange(12)[None]
Q = "model.layers.0.self_attn.q_proj"
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama with biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "bitnet": (BitNetForCausalLM, BitNetConfig, {"tie_word_embeddings": True}),
}
PACKED = {"linear_class": "bitlinear"}
OFFLINE = {"linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = {"linear_class": "autobitlinear", "quantization_mode": "online"}


@pytest.fixture(autouse=True)
def eager() -> Any:
    """transformers' layers compile parts of themselves."""
    with torch.compiler.set_stance("force_eager"):
        yield


def checkpoint(directory: Path, convention: dict[str, str], family: str = "llama", **fields: Any) -> dict[str, Tensor]:
    """A checkpoint whose linear layers transformers' own function packs. Returns their codes."""
    torch.manual_seed(0)
    kind, config_kind, own = FAMILIES[family]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config_kind(vocab_size=128, num_key_value_heads=2, max_position_embeddings=64, **sizes, **own)
    model = kind(config)
    tensors, codes = dict(model.state_dict()), {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or name == "lm_head" or convention is ONLINE:
            continue
        codes[name] = torch.randint(-1, 2, module.weight.shape)
        tensors[f"{name}.weight"] = bitnet.pack_weights(codes[name].clone())
        mean = torch.rand(1) * 0.05 + 0.01
        tensors[f"{name}.weight_scale"] = mean if convention is OFFLINE else 1 / mean
        if module.bias is not None:
            tensors[f"{name}.bias"] = torch.randn_like(module.bias)
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    config.architectures = [kind.__name__]
    quantization = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"], **convention, **fields}
    (directory / "config.json").write_text(json.dumps({**config.to_dict(), "quantization_config": quantization}))
    return codes


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(IDS).logits
    return y


def layers(model: nn.Module) -> dict[str, BitLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}


def converted(model: Any, *args: Any) -> Any:
    return convert(model, *args)


def scale_of(layer: BitLinear) -> Tensor:
    assert layer.qweight_scale is not None
    return layer.qweight_scale


both_conventions = pytest.mark.parametrize("convention", [PACKED, OFFLINE], ids=["divides", "multiplies"])


@both_conventions
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_and_scales_are_kept(family: str, convention: dict[str, str], tmp_path: Path) -> None:
    codes = checkpoint(tmp_path, convention, family)
    model = load(tmp_path)
    stored = {name: model.get_submodule(name).weight_scale.clone().reshape(()) for name in codes}
    expected = logits(model)
    assert convert(model) is model
    assert set(layers(model)) == set(codes)
    for name, layer in layers(model).items():
        assert layer.qweight is not None
        assert torch.equal(unpack_weights(layer.qweight, layer.in_features), codes[name].to(torch.int8))
        assert torch.equal(scale_of(layer), stored[name] if convention is OFFLINE else 1 / stored[name])
    torch.testing.assert_close(logits(model), expected, atol=2e-3 * float(expected.abs().max()), rtol=0)


@both_conventions
def test_one_layer_computes_what_transformers_computes(convention: dict[str, str], tmp_path: Path) -> None:
    """Codes of activations next to a tie may differ, by the order in which transformers multiplies and divides."""
    checkpoint(tmp_path, convention, "llama with biases")
    model = load(tmp_path)
    x = torch.randn(3, 200, 64)
    with torch.no_grad():
        expected = model.get_submodule(Q)(x)
        layer = converted(model).get_submodule(Q)
        y = layer(x)
    off = (y - expected).abs() > 1e-5 * expected.abs().max()
    assert float(off.float().mean()) < 0.01
    largest_step = scale_of(layer) * x.abs().max() / 127  # one code of one activation
    assert bool(((y - expected).abs() <= 2 * largest_step).all())


@both_conventions
def test_the_model_is_one_of_ours(convention: dict[str, str], tmp_path: Path) -> None:
    checkpoint(tmp_path, convention, "qwen3")
    model = converted(load(tmp_path))
    assert isinstance(model.config.quantization_config, BitLabConfig)
    expected = logits(model)
    model.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
    assert (saved["quant_method"], saved["state"], saved["weight_granularity"]) == ("bitlab", "deployed", "per_tensor")
    kind: Any = AutoModelForCausalLM
    loaded, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_bits(logits(loaded), expected)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), loaded.generate(IDS, **options))


def test_a_bfloat16_model_keeps_the_scale_that_it_stores(tmp_path: Path) -> None:
    checkpoint(tmp_path, PACKED)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    stored = model.get_submodule(Q).weight_scale.clone()
    assert stored.dtype == torch.bfloat16
    assert torch.equal(scale_of(converted(model).get_submodule(Q)), 1 / stored.float().reshape(()))
    assert logits(model).dtype == torch.bfloat16


@both_conventions
def test_nothing_is_shared_with_what_was_loaded(convention: dict[str, str], tmp_path: Path) -> None:
    checkpoint(tmp_path, convention, "llama with biases")
    model = load(tmp_path)
    theirs = model.get_submodule(Q)
    with torch.inference_mode():
        converted(model)
    expected = logits(model)
    with torch.no_grad():
        theirs.bias.zero_()
        theirs.weight.zero_()
        theirs.weight_scale.zero_()
    assert_same_bits(logits(model), expected)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())


def test_online_layers_become_trainable_ones(tmp_path: Path) -> None:
    checkpoint(tmp_path, ONLINE)
    model = load(tmp_path)
    expected = logits(model)
    weight = model.get_submodule(Q).weight
    convert(model)
    assert model.get_submodule(Q).weight is weight
    assert not any(layer.is_deployed for layer in layers(model).values())
    torch.testing.assert_close(logits(model), expected, atol=2e-3 * float(expected.abs().max()), rtol=0)
    assert getattr(model, "hf_quantizer", None) is None
    model.train()(IDS, labels=IDS).loss.backward()
    assert weight.grad is not None
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "ours")
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), expected)


def test_masters_may_get_any_config(tmp_path: Path) -> None:
    checkpoint(tmp_path, ONLINE)
    groups = BitQuantConfig("per_group", group_size=32)
    model = converted(load(tmp_path), groups)
    assert {layer.quant_config for layer in layers(model).values()} == {groups}


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(model: Any, message: str, *args: Any, **kwargs: Any) -> None:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(QuantizationError, match=message):
        convert(model, *args, **kwargs)
    assert {name: type(module) for name, module in model.named_modules()} == before


def code_3(layer: Any) -> None:
    layer.weight[1, 5] |= 3 << 4


def not_ternary(layer: Any) -> None:
    layer.weight.data[0, :2] = 0.5


@pytest.mark.parametrize(
    ("convention", "damage", "message"),
    [
        (PACKED, code_3, "q_proj: weight has 1 codes 3"),
        (OFFLINE, not_ternary, "q_proj: weight has 2 elements that are not"),
        (PACKED, lambda layer: layer.weight_scale.fill_(0), "q_proj: weight_scale is 0.0"),
        (PACKED, lambda layer: layer.weight_scale.fill_(1e-39), "q_proj: weight_scale is inf"),
        (OFFLINE, lambda layer: layer.weight_scale.fill_(-1), "q_proj: weight_scale is -1.0"),
        (OFFLINE, lambda layer: layer.weight_scale.fill_(float("nan")), "q_proj: weight_scale is nan"),
        (OFFLINE, lambda layer: setattr(layer, "weight_scale", torch.ones(2)), r"weight_scale has shape \(2,\)"),
        (PACKED, lambda layer: setattr(layer, "weight", layer.weight[:-1]), "15 packed rows, which are 60 of .* 64"),
        (PACKED, lambda layer: layer.to("meta"), "q_proj: its tensors are not in memory"),
        (PACKED, lambda layer: layer.register_forward_hook(print), "q_proj: the layer has forward_hooks"),
    ],
    ids=["code 3", "float", "zero scale", "tiny scale", "negative", "NaN", "scales", "rows", "meta", "hook"],
)
def test_damaged_layers(convention: dict[str, str], damage: Any, message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, convention)
    model = load(tmp_path)
    with torch.no_grad():
        damage(model.get_submodule(Q))
    refused(model, message)


@pytest.mark.parametrize("convention", [PACKED, OFFLINE, ONLINE])
def test_a_norm_inside_of_a_layer_is_refused(convention: dict[str, str], tmp_path: Path) -> None:
    checkpoint(tmp_path, convention, use_rms_norm=True)
    refused(load(tmp_path), "q_proj: the layer has an RMSNorm")


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    checkpoint(tmp_path, PACKED)
    model = load(tmp_path)
    refused(model, 'weight_granularity "per_channel", expected "per_tensor"', BitQuantConfig("per_channel"))
    refused(model, "no skip", skip=[Q])
    refused(model, "no filter_fn", filter_fn=lambda layer, name: True)
