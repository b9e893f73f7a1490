"""What config.json says of a model with ternary layers: `quantization_config`."""

import copy
import dataclasses
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitcore.config import DEFAULT_GROUP_SIZE, ActivationDtype, BitQuantConfig, Granularity
from bitcore.exceptions import FileError, QuantizationError
from bitcore.operators.checks import layout_of
from bitlayers.bitlinear import BitLinear
from bitlayers.convert import output_heads
from bitlayers.embedding import Int8Embedding, TernaryEmbedding
from bitlayers.int8_linear import Int8Linear
from bitlayers.packed_module import PackedModule

METHOD = "bitlab"
FORMAT = 1

Layout = Literal["2bit", "1.6bit"]
State = Literal["trainable", "deployed"]

_CHOICES = {"layout": ("2bit", "1.6bit"), "state": ("trainable", "deployed")}
_QUANT_FIELDS = tuple(field.name for field in dataclasses.fields(BitQuantConfig))
_PLAN_FIELDS = (*_QUANT_FIELDS, *_CHOICES)
_FIELDS = (*_PLAN_FIELDS, "modules", "modules_to_not_convert", "quant_method", "format")


class LayerPlan(NamedTuple):
    """What one ternary layer or embedding is."""

    quant_config: BitQuantConfig
    layout: str
    state: str

    @classmethod
    def of(cls, layer: BitLinear | TernaryEmbedding) -> Self:
        if isinstance(layer, TernaryEmbedding):
            return cls(layer.quant_config, layer.layout, "deployed")
        layout = "2bit" if layer.qweight is None else layout_of(layer.qweight, layer.in_features) or "2bit"
        return cls(layer.quant_config, layout, "deployed" if layer.is_deployed else "trainable")

    def fields(self) -> dict[str, Any]:
        return {**self.quant_config.to_dict(), "layout": self.layout, "state": self.state}


@dataclasses.dataclass(frozen=True)
class Int8Plan:
    """An int8 embedding or linear layer: there is only one kind."""


Plan = LayerPlan | Int8Plan


class BitLabConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model with ternary layers.

    Given to `from_pretrained` with a checkpoint of float weights, it makes the model's linear layers ternary: every
    `nn.Linear` of the base model (the decoder of a language model, the encoder of a classifier), but no head and none
    of `modules_to_not_convert`. With a checkpoint that BitLab's layers were saved in, transformers makes it from
    config.json.

    Embeddings and heads are float unless `modules` lists them; what class a module becomes follows from what it is in
    the model. Ternary and int8 embeddings and int8 linear layers are deployed by nature: they have no trainable state,
    whatever `state` says of the rest. A head that is tied to a ternary or int8 embedding and not listed is what the
    embedding is, and shares its memory.

    Held by a model, it is a picture of the model: `to_dict()` and what is saved tell what the layers are now, not what
    they were when the model was loaded.

    Args:
        weight_granularity, activation_dtype, activation_granularity, group_size: As in `BitQuantConfig`.
        layout: How weights are packed: "2bit" or "1.6bit" (deployed layers).
        state: "trainable": the layers keep float weights and train. "deployed": they are packed once loaded.
        modules: Of every module that is not as the rest: `{"kind": "float"}`; `{"kind": "int8"}`; or `{"kind":
            "ternary"}` and the fields that differ. The last two are for an `nn.Linear` or an `nn.Embedding`.
        modules_to_not_convert: Names, patterns or ends of names of layers that stay float, matched as by transformers.
        quant_method: "bitlab".
        format: 1.

    Raises:
        QuantizationError: an argument has a value that does not exist.
    """

    def __init__(
        self,
        weight_granularity: Granularity = "per_tensor",
        activation_dtype: ActivationDtype = "int8",
        activation_granularity: Granularity = "per_channel",
        *,
        layout: Layout = "2bit",
        state: State = "trainable",
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        modules_to_not_convert: Collection[str] | None = None,
        quant_method: str = METHOD,
        format: int = FORMAT,
        group_size: int = DEFAULT_GROUP_SIZE,
    ) -> None:
        _require("quant_method", quant_method, (METHOD,))
        _require("format", format, (FORMAT,))
        self.quant_method = METHOD  # type: ignore[assignment]  # A str to transformers, which types it as its enum.
        self.quant_config = BitQuantConfig(weight_granularity, activation_dtype, activation_granularity, group_size)
        self.layout: str = _require("layout", layout, _CHOICES["layout"])
        self.state: str = _require("state", state, _CHOICES["state"])
        self.modules = _checked_modules(modules)
        self.modules_to_not_convert = _checked_names(modules_to_not_convert)
        for name in self.modules:
            self.plan(name)  # Every value exists.
        self._model: weakref.ref[PreTrainedModel] | None = None

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From a config.json's `quantization_config`.

        Raises:
            FileError: a field that is unknown (of a later version, perhaps), or a value that does not exist.
        """
        if unknown := sorted(set(config_dict) - set(_FIELDS)):
            raise FileError(f"quantization_config has {unknown}, known are {sorted(_FIELDS)}")
        try:
            config = cls(**config_dict)
        except (QuantizationError, TypeError) as error:
            raise FileError(f"quantization_config: {error}") from error
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """The config of a model, which from now on shows what the model is."""
        config = cls()
        config._model = weakref.ref(model)
        config._look()
        return config

    def follow(self, model: PreTrainedModel) -> None:
        """From now on shows what `model` is."""
        self._model = weakref.ref(model)

    def describes(self, model: PreTrainedModel) -> bool:
        """Whether it shows `model`, or one that `model` is a part of."""
        whole = None if self._model is None else self._model()
        return whole is not None and any(part is model for part in whole.modules())

    def plan(self, name: str) -> Plan | None:
        """What the layer or embedding `name` is; None if it is float."""
        own = dict(self.modules.get(name, {}))
        kind = own.pop("kind", "ternary")
        if kind != "ternary":
            return Int8Plan() if kind == "int8" else None
        layout, state = own.pop("layout", self.layout), own.pop("state", self.state)
        for field, value in (("layout", layout), ("state", state)):
            _require(f"{field} of {name}", value, _CHOICES[field])
        return LayerPlan(self.quant_config.with_fields(own), layout, state)

    def plans(self, model: PreTrainedModel) -> dict[str, Plan]:
        """What each `nn.Linear` and `nn.Embedding` of a model becomes; those that stay float are not in it.

        A name also fits with the base model's prefix or without it: transformers loads the checkpoint of a base model
        into one with a head, and the other way round. A name that the model does not have is left out.

        Raises:
            FileError: a module cannot be what is said of it.
        """
        by_default = ternary_by_default(model)
        self._require_possible(model, set(by_default))
        plans = {}
        for name, ternary in by_default.items():
            listed = self._listed(model, name)
            if listed is None and (not ternary or not should_convert_module(name, self.modules_to_not_convert)):
                continue
            plan = self.plan(name if listed is None else listed)
            if isinstance(plan, LayerPlan) and isinstance(model.get_submodule(name), nn.Embedding):
                plan = self._deployed(plan, listed or name)
            if plan is not None:
                plans[name] = plan
        return plans | self._tied_plans(model, plans)

    def _listed(self, model: PreTrainedModel, name: str) -> str | None:
        """The name that `modules` has for a module of a model."""
        return next((each for each in _spellings(model, name) if each in self.modules), None)

    def _require_possible(self, model: PreTrainedModel, possible: set[str]) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, fields in self.modules.items():
            found = [each for each in _spellings(model, name) if each in modules]
            if fields["kind"] != "float" and found and possible.isdisjoint(found):
                raise FileError(
                    f"quantization_config: kind of {name} is {fields['kind']!r}, and it is a "
                    f"{type(modules[found[0]]).__name__}, expected an nn.Linear or an nn.Embedding"
                )

    def _deployed(self, plan: LayerPlan, name: str) -> LayerPlan:
        state = self.modules.get(name, {}).get("state", "deployed")
        if state != "deployed":
            raise FileError(
                f"quantization_config: state of {name} is {state!r}, and it is an embedding, expected 'deployed'"
            )
        return plan._replace(state=state)

    def _tied_plans(self, model: PreTrainedModel, plans: Mapping[str, Plan]) -> dict[str, Plan]:
        """Of what is tied to a ternary or int8 embedding and not listed: it is the same."""
        return {
            name: plans[source]
            for name, source in tied_modules(model).items()
            if source in plans
            and isinstance(model.get_submodule(source), nn.Embedding)
            and self._listed(model, name) is None
            and name in ternary_by_default(model)
        }

    def to_dict(self) -> dict[str, Any]:
        """All that it says, as JSON holds it."""
        self._look()
        skipped = {"modules_to_not_convert": list(self.modules_to_not_convert)} if self.modules_to_not_convert else {}
        return {
            "quant_method": METHOD,
            "format": FORMAT,
            **LayerPlan(self.quant_config, self.layout, self.state).fields(),
            "group_size": self.quant_config.group_size,
            "modules": copy.deepcopy(self.modules),
            **skipped,
        }

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict's: transformers asks a config in this way when it is given one that a model holds."""
        return self.to_dict().get(key, default)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BitLabConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy; of the copied model, if a model is being copied, and a picture that no longer changes otherwise."""
        copied = self.from_dict(self.to_dict())
        model = None if self._model is None else memo.get(id(self._model()))
        if model is not None:
            copied.follow(model)
        return copied

    def __copy__(self) -> Self:
        return self.from_dict(self.to_dict())

    def __reduce__(self) -> tuple[Any, ...]:
        return (_from_dict, (self.to_dict(),))

    def _look(self) -> None:
        """Describes the model that it belongs to, if there is one and it has ternary or int8 layers."""
        model = None if self._model is None else self._model()
        if model is None:
            return
        defaults = ternary_by_default(model)
        modules = {name: model.get_submodule(name) for name in defaults}
        plans = {name: _plan_of(module) for name, module in modules.items()}
        layers = [LayerPlan.of(module) for module in modules.values() if isinstance(module, BitLinear)]
        if not any(plans.values()):
            return
        if layers:
            ((self.quant_config, self.layout, self.state), _), *_ = Counter(layers).most_common()
        most = LayerPlan(self.quant_config, self.layout, self.state)
        self.modules = {
            name: _module_fields(plan, most)
            for name, plan in plans.items()
            if plan != (most if defaults[name] else None)
        }
        self.modules_to_not_convert = []  # They are in modules now, by their names.


def ternary_by_default(model: PreTrainedModel) -> dict[str, bool]:
    """Of every `nn.Linear` and `nn.Embedding`, and of what BitLab has in their place: whether it is ternary unless a
    config says otherwise.

    Linear layers inside the base model are, heads and embeddings are not.
    """
    heads = set(output_heads(model))
    inside = set(map(id, model.base_model.modules()))
    return {
        name: isinstance(module, nn.Linear | Int8Linear) and id(module) in inside and name not in heads
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding) or isinstance(module, BitLinear | PackedModule)
    }


def tied_modules(model: PreTrainedModel) -> dict[str, str]:
    """Of every module whose weight is tied: the module that it is tied to."""
    end = ".weight"
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        target.removesuffix(end): source.removesuffix(end)
        for target, source in tied.items()
        if target.endswith(end) and source.endswith(end)
    }


def _spellings(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """A module's name, and what it is with the base model's prefix and without it."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


def _plan_of(module: nn.Module) -> Plan | None:
    if isinstance(module, BitLinear | TernaryEmbedding):
        return LayerPlan.of(module)
    return Int8Plan() if isinstance(module, Int8Linear | Int8Embedding) else None


def _module_fields(plan: Plan | None, most: LayerPlan) -> dict[str, Any]:
    if not isinstance(plan, LayerPlan):
        return {"kind": "float" if plan is None else "int8"}
    packing = {"layout": plan.layout, "state": plan.state}
    rest = {"layout": most.layout, "state": most.state}
    differing = {field: value for field, value in packing.items() if value != rest[field]}
    return {"kind": "ternary"} | plan.quant_config.fields_unlike(most.quant_config) | differing


def _from_dict(values: dict[str, Any]) -> BitLabConfig:
    config: BitLabConfig = BitLabConfig.from_dict(values)
    return config


def _require(name: str, value: Any, choices: tuple[object, ...]) -> Any:
    if isinstance(value, bool) or value not in choices:
        raise QuantizationError(f"{name} is {value!r}, expected {' or '.join(map(repr, choices))}")
    return value


def _checked_modules(modules: object) -> dict[str, dict[str, Any]]:
    if modules is None:
        return {}
    if not isinstance(modules, Mapping) or not all(isinstance(fields, Mapping) for fields in modules.values()):
        raise QuantizationError(f"modules is {modules!r}, expected names with fields")
    for name, fields in modules.items():
        _require(f"kind of {name}", fields.get("kind"), ("ternary", "int8", "float"))
        allowed = {"kind", *_PLAN_FIELDS} if fields["kind"] == "ternary" else {"kind"}
        if unknown := sorted(set(fields) - allowed):
            raise QuantizationError(f"modules has {unknown} for {name}, known are {sorted(allowed)}")
    return {name: dict(fields) for name, fields in modules.items()}


def _checked_names(names: object) -> list[str]:
    if names is None:
        return []
    if (
        isinstance(names, str)
        or not isinstance(names, Collection)
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise QuantizationError(f"modules_to_not_convert is {names!r}, expected a collection of names")
    return list(names)
