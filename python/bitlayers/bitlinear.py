"""`BitLinear`: `nn.Linear` with ternary weights, from the first training step to deployment."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from bitcore._torch_private import is_tracing
from bitcore.config import BitQuantConfig, require_config
from bitcore.exceptions import QuantizationError, StateError
from bitcore.kernels.registry import KernelRegistry, selection
from bitcore.operators.checks import weight_scale_dtype
from bitcore.ops import bitlinear
from bitcore.ops.packing import check_qweight
from bitcore.ops.weight_gradient import attach_weight_gradient
from bitlayers.fx import traced_call
from bitlayers.init import InitMethod, Portable, find_init_method
from bitlayers.past_forward import TernaryWeight, is_read_by_peft, is_read_past_forward, refuse_adapters

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MAX_IN_FEATURES = 2**24 - 1  # Every partial sum of int8 products stays below 2^31.
_MAX_OUT_FEATURES = 2**31 - 1

_SMALL = 4096
"""Elements of a weight up to which all are compared with what they were: it takes about a microsecond."""

_COMPUTED = "weight is computed (parametrized, weight_norm, pruning); remove that first"


class _PackedCopy(NamedTuple):
    """A weight prepared for inference, and what it was prepared from."""

    weight: Tensor
    snapshot: Tensor  # Shares the weight's memory: while it lives, no other weight can have the same address.
    form: tuple[object, ...]
    version: int
    sample: Tensor | None  # A view of the weight's elements, or of some of them,
    sampled: Tensor | None  # and what they were.
    config: BitQuantConfig
    kernels: str  # The registry's token: which kernels there were to choose from.
    qweight_scale: Tensor
    qweight: Tensor

    @classmethod
    def of(cls, weight: Tensor, config: BitQuantConfig) -> "_PackedCopy":
        # The version first: should another thread change the weight meanwhile, the copy counts as outdated.
        version, kernels, snapshot = weight._version, selection(), weight.detach()
        sample = _sample(snapshot)
        sampled = None if sample is None else sample.clone()
        form = _form(snapshot)
        return cls(weight, snapshot, form, version, sample, sampled, config, kernels, *_prepare(weight, config))

    def is_of(self, weight: Tensor, config: BitQuantConfig) -> bool:
        """Whether weight, config and kernels are what they were: values, place, form, type."""
        return (
            self.weight is weight
            and self.version == weight._version
            and self.form == _form(weight)
            and (self.config is config or self.config == config)
            and self.kernels == selection()
            and (self.sample is None or self.sampled is None or torch.equal(self.sample, self.sampled))
        )

    @property
    def sees_every_change(self) -> bool:
        return self.sampled is not None and self.sampled.numel() == self.snapshot.numel()


def _form(weight: Tensor) -> tuple[object, ...]:
    """Place and form: what `weight.data = ...` may change."""
    return weight.data_ptr(), weight.dtype, weight.stride(), weight.shape


def _sample(weight: Tensor) -> Tensor | None:
    """Up to 64 elements from all over the matrix, all of a small one, as a view; None where looking at them would
    synchronize a device.

    Autograd's version counter misses what is written through `weight.data` and by fused optimizers, and what FSDP
    gathers; whatever trains or averages a weight changes practically all of its elements.
    """
    if not weight.is_cpu or type(weight) is not Tensor:
        return None
    if weight.numel() <= _SMALL:
        return weight
    rows, columns = (max(1, -(-size // 8)) for size in weight.shape)
    return weight[rows // 2 :: rows, columns // 2 :: columns]


class BitLinear(nn.Linear):
    """A linear layer whose weights are -1, 0 or +1 times a scale.

    It is always in one of two states:

    - *Trainable*: it holds the float parameter `weight`. In training mode every forward quantizes weight and
      activations and gives gradients by the straight-through estimator. In evaluation mode it computes from a packed
      copy of the weight, with the same bits (int8 activations) and the same gradients. The copy is made at the first
      evaluation, dropped by `train()`, `load_state_dict()` and a gradient of the weight, remade when the weight or
      `quant_config` was replaced or changed, and never saved. A change of a few elements that autograd cannot see (in
      place through `weight.data` or a NumPy view, or by another process in shared memory), and any such change on
      another device than the CPU, needs a `train()` to take effect. Of a weight of up to 4,096 elements on the CPU all
      are looked at: every change shows at once, and a gradient drops nothing.
    - *Deployed*: `deploy()` has replaced `weight` by the buffers `qweight` (packed, uint8) and `qweight_scale`
      (float32, float16 per group, also through `half()` and `to(dtype)`). The layer is 16 times smaller and its weight
      is frozen: it computes the same in training and in evaluation mode, and x and bias still receive gradients.

    The state that `load_state_dict()` is given decides: a deployed one makes the layer deployed, a trainable one
    makes it trainable again, with a new parameter that no optimizer knows yet. A tensor that does not fit or is
    damaged changes nothing. (Where keys are missing or unexpected, the rest is loaded before
    `load_state_dict(strict=True)` raises, as in all of torch.)

    Layers that share one `weight` (or share it with an `nn.Embedding`) are trained as one; each packs a copy of its
    own, and `deploy()` of one leaves the weight to the others. Deployed layers share nothing, but for heads that
    `from_pretrained` ties to an embedding.

    A weight that is computed (`torch.nn.utils.parametrize`, `weight_norm`, pruning) is packed anew at every
    evaluation that gives another tensor; `deploy()` and a deployed state want that removed first.

    Any number of threads may run forward. One that evaluates while another thread changes the weight in place may
    compute from a mixture of old and new values; a forward that begins after the change sees the new ones alone. What
    changes the layer itself (`deploy()`, `load_state_dict()`, `train()`, `to()`) must not run beside a forward.

    Args:
        in_features: Size of the last dimension of x.
        out_features: Size of the last dimension of y.
        bias: Whether a bias is added. It is never quantized.
        init_method: How `weight` is initialized: "kaiming_uniform" (what `nn.Linear` does), "kaiming_normal",
            "xavier_uniform", "xavier_normal", "normal" (deviation 0.02), "orthogonal", or a function that fills a
            tensor in place.
        quant_config: The quantization schema; `BitQuantConfig()` where None.
        device: Where the parameters live.
        dtype: float32, bfloat16 or float16.

    Attributes:
        weight: (out_features, in_features); None once deployed.
        qweight: uint8, packed; None until deployed.
        qweight_scale: float32, () or (out_features,), or float16 (out_features, groups); None until deployed.
        quant_config: May be replaced; once deployed `weight_granularity` and `group_size` have to stay.

    Raises:
        QuantizationError: a size that is no integer, below 1 or too large (in_features: above 2^24 - 1), a dtype (or a
            default dtype) that is none of the three, an unknown `init_method`, no BitQuantConfig.
    """

    qweight: Tensor | None
    qweight_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init_method: InitMethod = "kaiming_uniform",
        quant_config: BitQuantConfig | None = None,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _require_size("in_features", in_features, MAX_IN_FEATURES)
        _require_size("out_features", out_features, _MAX_OUT_FEATURES)
        _require_flag("bias", bias)
        _require_dtype(dtype)
        find_init_method(init_method)
        config = require_config(BitQuantConfig() if quant_config is None else quant_config)
        self.init_method = init_method  # nn.Linear's constructor calls reset_parameters().
        super().__init__(int(in_features), int(out_features), bool(bias), device=device, dtype=dtype)
        self.quant_config = config
        self.register_buffer("qweight", None)
        self.register_buffer("qweight_scale", None)
        self._packed: _PackedCopy | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, quant_config: BitQuantConfig | None = None) -> Self:
        """A BitLinear that shares the parameters (not copies of them), mode and sizes of an `nn.Linear`.

        Raises:
            QuantizationError: its parameters are not its own but computed (pruning, `weight_norm`), or of another
                dtype than float32, bfloat16 and float16; it has hooks, which the new layer would not have: register
                them afterwards.
        """
        _require_plain(linear)
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, quant_config=quant_config, device="meta"
        )
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer.train(linear.training)
        return layer

    @property
    def is_deployed(self) -> bool:
        """Whether the layer holds packed weights only."""
        return self._buffers.get("qweight") is not None  # nn.Linear's constructor asks before there is a buffer.

    def reset_parameters(self) -> None:
        """Initializes weight and bias anew.

        Raises:
            StateError: the layer is deployed: its float weight is gone.
        """
        if self.is_deployed:
            raise StateError("reset_parameters: the layer is deployed and has no float weight to initialize")
        super().reset_parameters()
        if self.init_method != "kaiming_uniform":
            with torch.no_grad():
                find_init_method(self.init_method)(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Computes y.

        Args:
            input: (*, in_features), float32, bfloat16 or float16.

        Returns:
            (*, out_features), of input's dtype; under autocast of the autocast dtype.

        Raises:
            QuantizationError: input does not fit; a weight to be packed is not finite; packed weights are damaged.
            KernelNotFoundError: no kernel covers the config.
        """
        given: Any = input
        if not isinstance(given, Tensor) and isinstance(given, torch.fx.Proxy):
            return traced_call(self, given)
        config = self.quant_config
        # What nn.Module's own look-up finds last it finds here at once; a computed one is an attribute of the class.
        parameters, buffers = self._parameters, self._buffers
        bias: Tensor | None = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (evaluates both)
        qweight_scale, qweight = buffers["qweight_scale"], buffers["qweight"]
        if qweight_scale is not None and qweight is not None:
            return bitlinear.forward(input, None, qweight_scale, qweight, bias, config)
        weight: Any = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        if self.training or is_tracing():  # The same bits, and the one of the two that a trace can hold.
            return bitlinear.forward(input, weight, bias=bias, quant_config=config, training=True)
        y = bitlinear.forward(input, None, *self._packed_weights(weight), bias, config)
        if torch.is_grad_enabled() and weight.requires_grad:
            return attach_weight_gradient(y, input, weight, config, self._expect_another_weight)
        return y

    def deploy(self) -> Self:
        """Packs the weight for good: `weight` goes, `qweight` and `qweight_scale` come. Returns the layer.

        Evaluation mode is set, as `bitlayers.deploy()` sets it for a model.

        Raises:
            StateError: the layer is deployed already.
            QuantizationError: the weight is not finite or parametrized.
        """
        self._become_deployed(*self.prepare_deployment())
        return self.eval()

    def prepare_deployment(self) -> tuple[Tensor, Tensor]:
        """What `deploy()` will store: qweight_scale and qweight. Changes nothing.

        Raises:
            StateError, QuantizationError: as `deploy()`.
        """
        if self.is_deployed:
            raise StateError("deploy: the layer is deployed already")
        if self._weight_is_computed():
            raise QuantizationError(f"deploy: {_COMPUTED}")
        # Any kernel of the standard form: what is saved must not depend on the kernels that are registered here.
        kernel = KernelRegistry.get_kernel_by_name("TorchKernel", self.quant_config)
        with torch.inference_mode(False), torch.no_grad():
            return kernel.prepare_weights(self.weight, self.quant_config)

    def train(self, mode: bool = True) -> Self:
        """Sets training or evaluation mode. A deployed layer computes the same in both: its packed weight is frozen."""
        if mode:
            self._packed = None
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        """As every module, but modules of torch and PEFT that would compute with the float weight do not get it."""
        if name == "weight" and not torch.compiler.is_compiling():
            if is_read_past_forward():
                return TernaryWeight()
            if self.is_deployed:
                refuse_adapters()
        if name == "qweight" and not self.is_deployed and is_read_by_peft():
            raise AttributeError("qweight: the layer is trainable")
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As every module; assignments to `weight` come through here, too.

        Raises:
            StateError: a weight for a deployed layer, which would never be used.
        """
        if name == "weight" and param is not None and self.is_deployed:
            raise StateError("weight: the layer is deployed; load_state_dict() of a weight makes it trainable")
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        config = self.quant_config
        activations: str = config.activation_dtype
        if activations != "float32":
            activations += f" {config.activation_granularity}"
        state = ", deployed" if self.is_deployed else ""
        weight: str = config.weight_granularity
        if weight == "per_group":
            weight += f" of {config.group_size}"
        return f"{super().extra_repr()}, weight=ternary {weight}, activations={activations}{state}"

    def _packed_weights(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """qweight_scale and qweight of a copy that is up to date."""
        packed = self._packed
        # A traced graph must not hold today's weights as constants.
        if packed is not None and not torch.compiler.is_compiling() and packed.is_of(weight, self.quant_config):
            return packed.qweight_scale, packed.qweight
        # An inference tensor does not tell when it changes.
        if torch.compiler.is_compiling() or weight.is_inference():
            return _prepare(weight, self.quant_config)
        if _is_offloaded(self):  # A copy would keep in memory what lies elsewhere until the next call.
            self._packed = None
            return _prepare(weight, self.quant_config)
        self._packed = packed = _PackedCopy.of(weight, self.quant_config)
        return packed.qweight_scale, packed.qweight

    def _expect_another_weight(self) -> None:
        """The weight has a gradient: it is about to change, by an optimizer that may not count as a change."""
        if self._packed is not None and not self._packed.sees_every_change:
            self._packed = None

    def _weight_is_computed(self) -> bool:
        return "weight" not in self._parameters

    def _become_deployed(self, qweight_scale: Tensor, qweight: Tensor) -> None:
        self._packed = None
        self.register_parameter("weight", None)
        self.qweight_scale = qweight_scale
        self.qweight = qweight

    def _become_trainable(self, weight: Tensor) -> None:
        self.qweight_scale = None
        self.qweight = None
        self.weight = nn.Parameter(weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts like every module, but leaves the dtypes of the deployed buffers alone."""
        self._packed = None
        qweight_scale, qweight = self.qweight_scale, self.qweight
        super()._apply(fn, recurse)
        if qweight_scale is not None and qweight is not None:
            self.qweight_scale = _with_dtype_of(qweight_scale, self.qweight_scale)
            self.qweight = _with_dtype_of(qweight, self.qweight)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        *args: Any,
    ) -> None:
        """Takes the state that is loaded, deployed or trainable, after a look at every byte of it."""
        self._packed = None
        if self._parameters.get("bias") is not None and (bias := state_dict.get(prefix + "bias")) is not None:
            _check_values(prefix + "bias", bias)
            _check_shape(prefix + "bias", bias, (self.out_features,))
        if _is_placeholder(state_dict.get(prefix + "weight")):
            state_dict = {name: tensor for name, tensor in state_dict.items() if name != prefix + "weight"}
        found = {name: state_dict.get(prefix + name) for name in ("weight", "qweight", "qweight_scale")}
        _check_one_device({prefix + name: state_dict.get(prefix + name) for name in (*found, "bias")})
        if found["qweight"] is not None or found["qweight_scale"] is not None:
            self._expect_deployed_state(prefix, found)
        elif found["weight"] is not None:
            self._expect_trainable_state(prefix, found["weight"])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self.qweight_scale is not None and self.qweight is not None:  # With assign=True the loaded tensors.
            shape = self.quant_config.weight_scale_shape(self.out_features, self.in_features)
            dtype = weight_scale_dtype(self.quant_config.weight_group_size)
            self.qweight_scale = _ordinary(self.qweight_scale).to(dtype).reshape(shape)
            self.qweight = _ordinary(self.qweight)

    def _expect_deployed_state(self, prefix: str, found: dict[str, Tensor | None]) -> None:
        qweight, qweight_scale = found["qweight"], found["qweight_scale"]
        if qweight is None or qweight_scale is None or found["weight"] is not None:
            names = [prefix + name for name, tensor in found.items() if tensor is not None]
            raise QuantizationError(f"state_dict holds {names}, expected qweight and qweight_scale, or weight alone")
        if self._weight_is_computed():
            raise QuantizationError(f"{prefix}qweight: {_COMPUTED}")
        self._check_qweight(prefix + "qweight", qweight)
        self._check_qweight_scale(prefix + "qweight_scale", qweight_scale)
        if not self.is_deployed:
            device = self.weight.device
            shape = self.quant_config.weight_scale_shape(self.out_features, self.in_features)
            with torch.inference_mode(False):  # Autograd may have to save them.
                dtype = weight_scale_dtype(self.quant_config.weight_group_size)
                scale = torch.ones(shape, dtype=dtype, device=device)
                self._become_deployed(scale, torch.empty_like(qweight, device=device))

    def _expect_trainable_state(self, prefix: str, weight: Tensor) -> None:
        _check_values(prefix + "weight", weight)
        _check_shape(prefix + "weight", weight, (self.out_features, self.in_features))
        if self.qweight is not None:
            with torch.inference_mode(False):
                self._become_trainable(torch.empty_like(weight, device=self.qweight.device))

    def _check_qweight(self, name: str, qweight: Tensor) -> None:
        if qweight.ndim != 2 or qweight.shape[0] != self.out_features:
            shape = tuple(qweight.shape)
            raise QuantizationError(f"{name} has shape {shape}, expected {self.out_features} rows (out_features)")
        if not qweight.is_meta:
            _named(name, check_qweight, qweight, self.in_features)

    def _check_qweight_scale(self, name: str, scale: Tensor) -> None:
        granularity = self.quant_config.weight_granularity
        expected = self.quant_config.weight_scale_shape(self.out_features, self.in_features)
        shape = tuple(scale.shape)
        if shape != expected and not (expected == () and shape == (1,)):
            groups = f", group_size={self.quant_config.group_size}" if granularity == "per_group" else ""
            raise QuantizationError(
                f"{name} has shape {shape}, expected {expected}: weight_granularity={granularity}{groups}"
            )
        _check_dtype(name, scale)
        if granularity == "per_group" and scale.dtype != torch.float16:
            raise QuantizationError(f"{name} has dtype {scale.dtype}, expected torch.float16 for scales per group")
        if not scale.is_meta and not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise QuantizationError(f"{name} holds a scale that is not finite and positive")

    def _check_packed_weights(self) -> None:
        """Looks at every byte of a deployed layer's weight.

        Raises:
            QuantizationError: something is damaged.
        """
        if self.qweight is not None and self.qweight_scale is not None:
            self._check_qweight("qweight", self.qweight)
            self._check_qweight_scale("qweight_scale", self.qweight_scale)

    def __prepare_scriptable__(self) -> None:
        """What `torch.jit.script` asks first.

        Raises:
            NotImplementedError
        """
        raise NotImplementedError(
            "BitLinear cannot be compiled by torch.jit.script: use torch.jit.trace, torch.compile or torch.export"
        )

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle take: everything but the packed copy."""
        return {**self.__dict__, "_packed": None, "init_method": Portable(self.init_method)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        init_method = state["init_method"]
        if isinstance(init_method, Portable):
            state = {**state, "init_method": init_method.method}
        super().__setstate__(state)


def _is_offloaded(layer: nn.Module) -> bool:
    """Whether accelerate loads the layer's weight at each call, and frees it afterwards."""
    return bool(getattr(vars(layer).get("_hf_hook"), "offload", False))


def _is_placeholder(weight: object) -> bool:
    """Whether it is the empty tensor that lies beside packed weights in a checkpoint of transformers: it stops a reader
    that would not know what to do with those."""
    return isinstance(weight, Tensor) and weight.dtype == torch.uint8 and weight.numel() == 0


def _prepare(weight: Tensor, config: BitQuantConfig) -> tuple[Tensor, Tensor]:
    """qweight_scale and qweight as ordinary tensors, also inside inference mode: autograd may have to save them."""
    with torch.inference_mode(False), torch.no_grad():
        return bitlinear.prepare_weights(weight, config)


def _require_plain(linear: nn.Linear) -> None:
    """Refuses a layer that does more than its parameters say."""
    if not {"weight", "bias"} <= linear._parameters.keys():
        raise QuantizationError("weight or bias is computed from other parameters (pruning, weight_norm); remove that")
    require_no_hooks(linear)
    for name, parameter in linear.named_parameters(recurse=False):
        _check_dtype(name, parameter)


def require_no_hooks(layer: nn.Module) -> None:
    """Refuses a layer with hooks, which the layer in its place would not have."""
    hooks = [name.strip("_") for name, value in vars(layer).items() if "hooks" in name and value]
    if hooks:
        raise QuantizationError(f"the layer has {', '.join(hooks)}; remove them and register them on the new layer")


def _require_size(name: str, size: object, most: int) -> None:
    if isinstance(size, bool) or not isinstance(size, Integral) or not 1 <= int(size) <= most:
        raise QuantizationError(f"{name} is {size!r}, expected an integer from 1 to {most}")


def _require_flag(name: str, value: object) -> None:
    if not isinstance(value, Integral) or int(value) not in (0, 1):  # bool is an Integral.
        raise QuantizationError(f"{name} is {value!r}, expected True or False")


def _require_dtype(dtype: object) -> None:
    allowed = ", ".join(map(str, _DTYPES))
    if dtype is None and torch.get_default_dtype() not in _DTYPES:
        raise QuantizationError(
            f"torch's default dtype is {torch.get_default_dtype()}, expected one of {allowed}: give the layer a dtype"
        )
    if dtype is not None and dtype not in _DTYPES:
        raise QuantizationError(f"dtype is {dtype}, expected one of {allowed}")


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise QuantizationError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, _DTYPES))}")


def _check_values(name: str, tensor: Tensor) -> None:
    _check_dtype(name, tensor)
    if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        raise QuantizationError(f"{name} holds NaN or infinity")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise QuantizationError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def _check_one_device(tensors: dict[str, Tensor | None]) -> None:
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise QuantizationError(f"state_dict has {where}, expected one device")


def _ordinary(tensor: Tensor) -> Tensor:
    """No inference tensor: autograd may have to save it."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _with_dtype_of(original: Tensor, moved: Tensor | None) -> Tensor:
    """`moved`, or, where it was cast, `original` with the bits that it had, on the device of `moved`."""
    if moved is None or moved.dtype == original.dtype:
        return original if moved is None else moved
    return original.to(moved.device)


def _named(name: str, check: Any, *args: Any) -> None:
    """Runs a check and says in its error which tensor it was about."""
    try:
        check(*args)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from error
