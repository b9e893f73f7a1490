"""`torch.fx.symbolic_trace` of models with ternary layers."""

from typing import TYPE_CHECKING, Any

import torch

from bitcore.ops import bitlinear
from bitcore.ops.weight_gradient import attach_weight_gradient

if TYPE_CHECKING:
    from bitlayers.bitlinear import BitLinear


def traced_call(layer: "BitLinear", x: torch.fx.Proxy) -> Any:
    """What stands for a layer's call in a graph: a call of the module, as for the layers of `torch.nn`.

    A layer that is traced itself, not as part of a model, is no module of the graph: its operations are written down,
    in the mode and state that it has now.
    """
    tracer: Any = x.tracer
    if getattr(tracer, "root", None) is not layer:
        return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), {})
    return _operations(layer, x, tracer)


def _operations(layer: "BitLinear", x: torch.fx.Proxy, tracer: Any) -> Any:
    def attribute(name: str) -> Any:
        return None if getattr(layer, name) is None else tracer.create_proxy("get_attr", name, (), {})

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_function", function, args, kwargs)

    config, bias = layer.quant_config, attribute("bias")
    if layer.is_deployed:
        return call(bitlinear.forward, x, None, attribute("qweight_scale"), attribute("qweight"), bias, config)
    weight = attribute("weight")
    if layer.training:
        return call(bitlinear.forward, x, weight, bias=bias, quant_config=config, training=True)
    prepared = call(bitlinear.prepare_weights, weight, config)
    y = call(bitlinear.forward, x, None, prepared[0], prepared[1], bias, config)
    return call(attach_weight_gradient, y, x, weight, config)
