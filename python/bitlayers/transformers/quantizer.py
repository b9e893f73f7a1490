"""How transformers builds, checks and saves a model with ternary layers."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from bitcore.exceptions import FileError, QuantizationError, StateError
from bitcore.operators.checks import has_layout, packed_row_bytes, weight_scale_dtype
from bitcore.ops.base import dequantize_weight
from bitcore.ops.packing import unpack_weights
from bitlayers.bitlinear import BitLinear
from bitlayers.convert import deploy
from bitlayers.embedding import Int8Embedding, PackedEmbedding, TernaryEmbedding
from bitlayers.int8_linear import Int8Linear
from bitlayers.packed_module import PackedModule
from bitlayers.transformers.config import METHOD, BitLabConfig, Int8Plan, LayerPlan, Plan, tied_modules

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
        """Puts ternary and int8 modules, still on the meta device, where the config says.

        Raises:
            QuantizationError: tensor parallelism; a config that fits no layer of the model.
            FileError: a checkpoint's config that the model cannot have.
        """
        distributed = getattr(model.config, "distributed_config", None)
        if (getattr(distributed, "tp_size", None) or 1) > 1 or getattr(distributed, "tp_plan", None):
            raise QuantizationError("tensor parallelism is asked for, which packed ternary weights cannot be split by")
        self._plans = self.quantization_config.plans(model)
        if not self._plans:
            raise QuantizationError(
                f"{type(model).__name__} has no linear layer that quantization_config makes ternary"
            )
        for name, plan in self._plans.items():
            module = _expected(name, model.get_submodule(name), plan, self.pre_quantized)
            if module is not None:
                model.set_submodule(name, module)
        found, guards = _looked_into(checkpoint_files or [])
        self._ties = {
            name: source for name, source in tied_modules(model).items() if self._shares(model, name, source, found)
        }
        _untie(model)
        missing = {f"{name}.{part}" for name in self._ties for part in _parts(model.get_submodule(name))}
        _ignore(model, "_keys_to_ignore_on_load_missing", missing)
        _ignore(model, "_keys_to_ignore_on_load_unexpected", guards)

    def _shares(self, model: PreTrainedModel, name: str, source: str, found: set[str]) -> bool:
        """Whether a module is to share the memory of the one that it is tied to: the checkpoint has it only once."""
        module, embedding = model.get_submodule(name), model.get_submodule(source)
        if not isinstance(embedding, nn.Embedding | PackedEmbedding):
            return False
        if not self.pre_quantized:
            return _agree(self._plans.get(name), self._plans.get(source))
        return _are_alike(module, embedding) and found.isdisjoint(f"{name}.{part}" for part in _parts(module))

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """As transformers has it, but floats are never cast to codes: the check that follows finds them."""
        wanted = super().get_new_dtype(converter, param, dtype)
        return wanted if wanted is None or wanted.is_floating_point else None

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Checks what was loaded, and hands the model over.

        Raises:
            FileError: a packed weight that is missing or damaged.
        """
        config = self.quantization_config
        config.follow(model)
        model.config.quantization_config = config
        loaded = {name: module for name, module in _packed_modules(model).items() if name not in self._ties}
        for name, module in loaded.items():
            _require_loaded(name, module)
        _leave_file(model)
        for name, module in loaded.items():
            _check_packed(name, module)
        if not self.pre_quantized:
            self._pack(model)
        for name, source in self._ties.items():
            _share(model.get_submodule(name), model.get_submodule(source))
        if _packed_modules(model):
            mark_as_quantized(model, self)
        else:
            unmark(model)
        return model

    def _pack(self, model: PreTrainedModel) -> None:
        """Packs what was loaded as floats."""
        for name, plan in self._plans.items():
            module = model.get_submodule(name)
            if isinstance(module, nn.Embedding) or (isinstance(plan, Int8Plan) and isinstance(module, nn.Linear)):
                model.set_submodule(name, _quantized(module, plan))
        for name in self._ties:
            layer = model.get_submodule(name)
            if isinstance(layer, BitLinear):
                layer.deploy()
        remaining = [layer for _, layer in _ternary_layers(model) if not layer.is_deployed]
        if remaining and self.quantization_config.state == "deployed":
            deploy(model)

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
        # Never an int8 module, which has a weight of that name.
        ternary = [name for name, module in _packed_modules(model).items() if "qweight" in _parts(module)]
        layers = (name for name in ternary if isinstance(model.get_submodule(name), BitLinear))
        if (first := next(layers, next(iter(ternary), None))) is not None:
            state[f"{first}.weight"] = torch.empty(GUARD_SHAPE, dtype=GUARD_DTYPE)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """An `nn.Linear` or `nn.Embedding` with the codes, times their scales, in place of every module of BitLab's."""
        ties = _sharing(model)
        _untie(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, BitLinear | PackedModule):
                model.set_submodule(name, _dequantized(module, dtype))
        for name, source in ties.items():
            model.get_submodule(name).weight = model.get_submodule(source).weight
        _tie(model, {f"{name}.weight": f"{source}.weight" for name, source in ties.items()})
        _allow_resizing(model)
        return model


def mark_as_quantized(model: PreTrainedModel, quantizer: BitLabQuantizer) -> None:
    """Tells transformers that the model's weights are packed: it then refuses to cast them or to train them all."""
    marked = cast(Any, model)
    marked.hf_quantizer = quantizer
    marked.is_quantized = True
    marked.quantization_method = METHOD
    _untie(model)
    shared = {
        f"{name}.{part}": f"{source}.{part}"
        for name, source in _sharing(model).items()
        for part in _parts(model.get_submodule(name))
    }
    if shared:  # save_pretrained then writes them once. (What is tied while loading are parameters alone.)
        marked._tied_weights_keys = {**(model._tied_weights_keys or {}), **shared}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
            if _has_packed_vocabulary(module):
                cast(Any, module).resize_token_embeddings = _refuse_to_resize


def unmark(model: PreTrainedModel) -> None:
    """Tells transformers that no weight is packed: the model trains as any other."""
    marked = cast(Any, model)
    del marked.hf_quantizer
    del marked.quantization_method
    marked.is_quantized = False
    _allow_resizing(model)


def _has_packed_vocabulary(model: PreTrainedModel) -> bool:
    """Whether the embedding or the head holds codes, rows of which cannot be added."""
    head = model.get_output_embeddings()
    return any(isinstance(part, PackedModule) for part in model.modules()) or (head is not None and bool(_parts(head)))


def _refuse_to_resize(*args: Any, **kwargs: Any) -> None:
    """Stands for the `resize_token_embeddings` of a model with packed embeddings.

    Raises:
        StateError
    """
    raise StateError("resize_token_embeddings: the embedding or the head is packed; resize it before, or dequantize()")


def _allow_resizing(model: PreTrainedModel) -> None:
    for module in model.modules():
        vars(module).pop("resize_token_embeddings", None)


def _ternary_layers(model: nn.Module) -> Iterable[tuple[str, BitLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BitLinear))


def _packed_modules(model: nn.Module) -> dict[str, BitLinear | PackedModule]:
    """What holds codes and scales: deployed layers, ternary and int8 embeddings, int8 linear layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedModule) or (isinstance(module, BitLinear) and module.is_deployed)
    }


def _parts(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's codes and scales; none if it has float weights."""
    if isinstance(module, PackedModule):
        return module.parts
    return ("qweight", "qweight_scale") if isinstance(module, BitLinear) and module.is_deployed else ()


def _agree(plan: Plan | None, source: Plan | None) -> bool:
    """Whether two modules of one float weight become deployed ones of the same codes and scales."""
    if isinstance(plan, LayerPlan) and isinstance(source, LayerPlan):
        one, other = plan.quant_config, source.quant_config
        alike = (one.weight_granularity, one.group_size) == (other.weight_granularity, other.group_size)
        return alike and plan.state == source.state == "deployed"
    return isinstance(plan, Int8Plan) and isinstance(source, Int8Plan)


def _are_alike(module: nn.Module, source: nn.Module) -> bool:
    """Whether two modules can hold the same codes and scales."""
    parts = _parts(module)
    return bool(parts) and parts == _parts(source) and all(_form(module, part) == _form(source, part) for part in parts)


def _form(module: nn.Module, part: str) -> tuple[torch.Size, torch.dtype]:
    tensor: Tensor = getattr(module, part)
    return tensor.shape, tensor.dtype


def _share(module: nn.Module, source: nn.Module) -> None:
    """Gives a module the codes and scales of another; on another device a copy of them."""
    for part in _parts(module):
        own, tensor = getattr(module, part), getattr(source, part)
        setattr(module, part, tensor if own.is_meta else tensor.to(own.device))


def _sharing(model: nn.Module) -> dict[str, str]:
    """Of every module that shares its codes: the module, an embedding if there is one, whose they are."""
    packed = _packed_modules(model)
    sources: dict[int, str] = {}
    shared = {}
    for name in sorted(packed, key=lambda name: not isinstance(packed[name], PackedEmbedding)):  # Else in order.
        codes = getattr(packed[name], _parts(packed[name])[0])
        source = sources.setdefault(id(codes), name)
        if source != name:
            shared[name] = source
    return shared


def _untie(model: PreTrainedModel) -> None:
    """Keeps transformers from tying packed weights, which it would do by the name of a float one."""
    packed = {
        f"{name}.{part}" for name, module in _packed_modules(model).items() for part in ("weight", *_parts(module))
    }
    for ties in ("_tied_weights_keys", "all_tied_weights_keys"):
        tied = getattr(model, ties, None)
        if isinstance(tied, dict) and not packed.isdisjoint({*tied.keys(), *tied.values()}):
            setattr(model, ties, {one: other for one, other in tied.items() if packed.isdisjoint((one, other))})


def _tie(model: PreTrainedModel, names: Mapping[str, str]) -> None:
    """Tells transformers which parameters are tied."""
    for ties in ("_tied_weights_keys", "all_tied_weights_keys"):
        if names:
            setattr(model, ties, {**(getattr(model, ties, None) or {}), **names})


def _ignore(model: PreTrainedModel, what: str, names: Iterable[str]) -> None:
    """Adds tensors to those whose presence or absence in a checkpoint transformers does not report."""
    patterns = {rf"(^|\.){re.escape(name)}$" for name in names}
    if patterns:
        setattr(model, what, set(getattr(model, what) or ()) | patterns)


def _expected(name: str, module: nn.Module, plan: Plan, pre_quantized: bool) -> nn.Module | None:
    """What takes a module's place before the checkpoint is loaded; None if it stays until then."""
    if type(module) not in (nn.Linear, nn.Embedding):
        raise QuantizationError(f"{name} is a {type(module).__name__}, expected an nn.Linear or an nn.Embedding")
    if isinstance(module, nn.Linear) and isinstance(plan, LayerPlan):
        layer = BitLinear.from_linear(module, plan.quant_config)
        if pre_quantized and plan.state == "deployed":
            _expect_packed(f"quantization_config of {name}", layer, plan)
        return layer
    return _empty(name, module, plan) if pre_quantized else None


def _empty(name: str, module: nn.Module, plan: Plan) -> PackedModule:
    """An int8 linear layer or an embedding of a checkpoint, on the meta device."""
    dtype = cast(Tensor, module.weight).dtype
    if isinstance(module, nn.Linear):
        linear = Int8Linear(module.in_features, module.out_features, dtype=dtype, device="meta")
        linear.bias = module.bias
        return linear
    assert isinstance(module, nn.Embedding)
    sizes, padding_idx = (module.num_embeddings, module.embedding_dim), module.padding_idx
    if isinstance(plan, Int8Plan):
        return Int8Embedding(*sizes, padding_idx=padding_idx, dtype=dtype, device="meta")
    _require_layout(f"quantization_config of {name}", plan.layout, module.embedding_dim)
    return TernaryEmbedding(
        *sizes, plan.quant_config, layout=plan.layout, padding_idx=padding_idx, dtype=dtype, device="meta"
    )


def _quantized(module: nn.Module, plan: Plan) -> PackedModule:
    """The same of float weights."""
    if isinstance(module, nn.Linear):
        return Int8Linear.from_linear(module)
    assert isinstance(module, nn.Embedding)
    if isinstance(plan, Int8Plan):
        return Int8Embedding.from_embedding(module)
    return TernaryEmbedding.from_embedding(module, plan.quant_config, layout=plan.layout)


def _require_layout(name: str, layout: str, in_features: int) -> None:
    if not has_layout(layout, in_features):
        raise FileError(f"{name}: layout is {layout}, which does not exist for {in_features} in_features")


def _expect_packed(name: str, layer: BitLinear, plan: LayerPlan) -> None:
    _require_layout(name, plan.layout, layer.in_features)
    row_bytes = sum(packed_row_bytes(layer.out_features, layer.in_features, plan.layout))
    shape = plan.quant_config.weight_scale_shape(layer.out_features, layer.in_features)
    dtype = weight_scale_dtype(plan.quant_config.weight_group_size)
    scale = torch.empty(shape, dtype=dtype, device="meta")
    layer._become_deployed(scale, torch.empty(layer.out_features, row_bytes, dtype=torch.uint8, device="meta"))


def _require_loaded(name: str, layer: nn.Module) -> None:
    for part in reversed(_parts(layer)):
        tensor = getattr(layer, part)
        # Loaded tensors are marked; offloaded ones lie elsewhere, and what moves them drops the mark.
        if not tensor.is_meta and not hasattr(layer, "_hf_hook") and not getattr(tensor, "_is_hf_initialized", False):
            raise FileError(f"the checkpoint has no {name}.{part}, which its quantization_config promises")


def _leave_file(model: nn.Module) -> None:
    """Copies what is a view of the checkpoint's file, which another process may overwrite while the model runs."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_cpu:
            tensor.data = tensor.data.clone()


def _check_packed(name: str, module: BitLinear | PackedModule) -> None:
    try:
        if isinstance(module, PackedModule):
            module.check_weight()
        else:
            module._check_packed_weights()
    except QuantizationError as error:
        raise FileError(f"the checkpoint's {name}.{error}") from error


def _looked_into(checkpoint_files: Iterable[str]) -> tuple[set[str], set[str]]:
    """The names of the tensors in a checkpoint, and those of the empty ones that stop other readers."""
    found, guards = set(), set()
    for file in checkpoint_files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                tensor = tensors.get_slice(name)
                if name.endswith(".weight") and tensor.get_dtype() == "U8" and tuple(tensor.get_shape()) == GUARD_SHAPE:
                    guards.add(name)
                else:
                    found.add(name)
    return found, guards


def _dequantized(module: BitLinear | PackedModule, dtype: torch.dtype | None) -> nn.Linear | nn.Embedding:
    weight = nn.Parameter(_float_weight(module).to(dtype or torch.float32))
    if isinstance(module, PackedEmbedding):
        sizes = module.num_embeddings, module.embedding_dim
        embedding = nn.Embedding(*sizes, padding_idx=module.padding_idx, device="meta")
        embedding.weight = weight
        return embedding.train(module.training)
    assert isinstance(module, BitLinear | Int8Linear)
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    linear.weight = weight
    linear.bias = cast(nn.Parameter, module.bias)  # None if there is none.
    return linear.train(module.training)


def _float_weight(module: BitLinear | PackedModule) -> Tensor:
    """Codes times scales, float32."""
    if isinstance(module, Int8Embedding | Int8Linear):
        return module.weight.float() * module.weight_scale[:, None]
    assert isinstance(module, BitLinear | TernaryEmbedding)
    columns = module.in_features if isinstance(module, BitLinear) else module.embedding_dim
    scale, qweight = module.qweight_scale, module.qweight
    if scale is None or qweight is None:
        scale, qweight = cast(BitLinear, module).prepare_deployment()
    return dequantize_weight(unpack_weights(qweight, columns), scale, module.quant_config)
