"""How transformers builds, checks and saves a model with ternary layers."""

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from bitcore.exceptions import FileError, QuantizationError
from bitcore.operators.checks import has_layout, packed_row_bytes, weight_scale_dtype
from bitcore.ops.base import dequantize_weight
from bitcore.ops.packing import unpack_weights
from bitlayers.bitlinear import BitLinear
from bitlayers.convert import deploy
from bitlayers.transformers.config import METHOD, BitLabConfig, LayerPlan

# Beside packed weights lies an empty tensor, named as the weight of the first ternary layer. transformers takes every
# unknown quantization for none and fills what it misses with random numbers; at a weight of another size it stops.
GUARD_DTYPE, GUARD_SHAPE = torch.uint8, (0,)


class BitLabQuantizer(HfQuantizer):
    """What transformers asks of a quantization method. A model keeps it once it is deployed; a model that trains is an
    ordinary one to transformers, whose Trainer refuses to train all weights of a quantized model."""

    quantization_config: BitLabConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Puts ternary layers, still on the meta device, where the config says.

        Raises:
            QuantizationError: tensor parallelism; a config that fits no layer of the model.
            FileError: a checkpoint's config that the model cannot have.
        """
        distributed = getattr(model.config, "distributed_config", None)
        if (getattr(distributed, "tp_size", None) or 1) > 1 or getattr(distributed, "tp_plan", None):
            raise QuantizationError("tensor parallelism is asked for, which packed ternary weights cannot be split by")
        plans = self.quantization_config.plans(model)
        if not plans:
            raise QuantizationError(
                f"{type(model).__name__} has no linear layer that quantization_config makes ternary"
            )
        for name, plan in plans.items():
            linear = model.get_submodule(name)
            if type(linear) is not nn.Linear:
                raise QuantizationError(f"{name} is a {type(linear).__name__}, expected an nn.Linear")
            layer = BitLinear.from_linear(linear, plan.quant_config)
            if self.pre_quantized and plan.state == "deployed":
                _expect_packed(f"quantization_config of {name}", layer, plan)
            model.set_submodule(name, layer)
        _untie(model)
        guards = _guards(checkpoint_files or [])
        if guards:
            ignored = {rf"(^|\.){re.escape(guard)}$" for guard in guards}
            model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Checks what was loaded, and hands the model over.

        Raises:
            FileError: a packed weight that is missing or damaged.
        """
        config = self.quantization_config
        config.follow(model)
        model.config.quantization_config = config
        for name, layer in _ternary_layers(model):
            if layer.is_deployed:
                _require_loaded(name, layer)
        _leave_file(model)
        for name, layer in _ternary_layers(model):
            if layer.is_deployed:
                _check_packed(name, layer)
        if not self.pre_quantized and config.state == "deployed":
            deploy(model)
        if any(layer.is_deployed for _, layer in _ternary_layers(model)):
            mark_as_quantized(model, self)
        else:
            unmark(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on packed weights train."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All tensors, and the one that stops a reader that does not know them."""
        state = dict(model.state_dict())
        deployed = (name for name, layer in _ternary_layers(model) if layer.is_deployed)
        if (first := next(deployed, None)) is not None:
            state[f"{first}.weight"] = torch.empty(GUARD_SHAPE, dtype=GUARD_DTYPE)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """An `nn.Linear` with the ternary weights, times their scales, in place of every deployed layer."""
        for name, layer in list(_ternary_layers(model)):
            model.set_submodule(name, _dequantized(layer, dtype))
        return model


def mark_as_quantized(model: PreTrainedModel, quantizer: BitLabQuantizer) -> None:
    """Tells transformers that the model's weights are packed: it then refuses to cast them or to train them all."""
    marked = cast(Any, model)
    marked.hf_quantizer = quantizer
    marked.is_quantized = True
    marked.quantization_method = METHOD
    _untie(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def unmark(model: PreTrainedModel) -> None:
    """Tells transformers that no weight is packed: the model trains as any other."""
    marked = cast(Any, model)
    del marked.hf_quantizer
    del marked.quantization_method
    marked.is_quantized = False


def _ternary_layers(model: nn.Module) -> Iterable[tuple[str, BitLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BitLinear))


def _untie(model: PreTrainedModel) -> None:
    """Keeps transformers from tying deployed heads to their embeddings again: packed weights are theirs alone."""
    packed = {f"{name}.weight" for name, layer in _ternary_layers(model) if layer.is_deployed}
    for ties in ("_tied_weights_keys", "all_tied_weights_keys"):
        tied = getattr(model, ties, None)
        if isinstance(tied, dict) and not packed.isdisjoint({*tied.keys(), *tied.values()}):
            setattr(model, ties, {one: other for one, other in tied.items() if packed.isdisjoint((one, other))})


def _expect_packed(name: str, layer: BitLinear, plan: LayerPlan) -> None:
    if not has_layout(plan.layout, layer.in_features):
        raise FileError(f"{name}: layout is {plan.layout}, which does not exist for {layer.in_features} in_features")
    row_bytes = sum(packed_row_bytes(layer.out_features, layer.in_features, plan.layout))
    shape = plan.quant_config.weight_scale_shape(layer.out_features, layer.in_features)
    dtype = weight_scale_dtype(plan.quant_config.weight_group_size)
    scale = torch.empty(shape, dtype=dtype, device="meta")
    layer._become_deployed(scale, torch.empty(layer.out_features, row_bytes, dtype=torch.uint8, device="meta"))


def _require_loaded(name: str, layer: BitLinear) -> None:
    for part in ("qweight_scale", "qweight"):
        tensor = getattr(layer, part)
        # Loaded tensors are marked; offloaded ones lie elsewhere, and what moves them drops the mark.
        if not tensor.is_meta and not hasattr(layer, "_hf_hook") and not getattr(tensor, "_is_hf_initialized", False):
            raise FileError(f"the checkpoint has no {name}.{part}, which its quantization_config promises")


def _leave_file(model: nn.Module) -> None:
    """Copies what is a view of the checkpoint's file, which another process may overwrite while the model runs."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_cpu:
            tensor.data = tensor.data.clone()


def _check_packed(name: str, layer: BitLinear) -> None:
    try:
        layer._check_packed_weights()
    except QuantizationError as error:
        raise FileError(f"the checkpoint's {name}.{error}") from error


def _guards(checkpoint_files: Iterable[str]) -> list[str]:
    """The names of the empty tensors in a checkpoint."""
    found = []
    for file in checkpoint_files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                if not name.endswith(".weight"):
                    continue
                tensor = tensors.get_slice(name)
                if tensor.get_dtype() == "U8" and tuple(tensor.get_shape()) == GUARD_SHAPE:
                    found.append(name)
    return found


def _dequantized(layer: BitLinear, dtype: torch.dtype | None) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    scale, qweight = layer.qweight_scale, layer.qweight
    if scale is None or qweight is None:
        scale, qweight = layer.prepare_deployment()
    weight = dequantize_weight(unpack_weights(qweight, layer.in_features), scale, layer.quant_config)
    linear.weight = nn.Parameter(weight.to(dtype or weight.dtype))
    linear.bias = layer.bias
    return linear.train(layer.training)
