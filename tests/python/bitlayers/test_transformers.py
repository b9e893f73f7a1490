"""Models of transformers: what was saved is what is loaded, they train under its Trainer, and nothing is made up."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitNetConfig,
    BitNetForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.distributed.configuration_utils import DistributedConfig

from bitcore.config import BitQuantConfig
from bitcore.exceptions import FileError, QuantizationError
from bitcore.ops.packing import repack
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear, convert, deploy
from bitlayers.transformers import BitLabConfig
from bitmodels import AutoBitModel

pytestmark = pytest.mark.medium  # Importing transformers takes seconds.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IDS = torch.arange(10)[None]
PER_ROW = BitQuantConfig("per_channel")
UP = "model.layers.0.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "bitnet": (BitNetForCausalLM, BitNetConfig, {"num_key_value_heads": 2}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"num_key_value_heads": 2}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_key_value_heads": 2, "num_local_experts": 4}),
    "bert": (BertForSequenceClassification, BertConfig, {}),
}


def tiny(model: Any, config: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return model(config(**{"vocab_size": 128, "max_position_embeddings": 64, **sizes, **fields})).eval()


def llama(**fields: Any) -> Any:
    return tiny(LlamaForCausalLM, LlamaConfig, num_key_value_heads=2, **fields)


def put_into(state: str, model: Any) -> Any:
    return deploy(model) if state == "deployed" else model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(IDS).logits
    return y


def saved(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def ternary(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BitLinear)}


def quantization(directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return values


both_states = pytest.mark.parametrize("state", ["trainable", "deployed"])


# --- what was saved is what is loaded ---------------------------------------------------------------------------------


@both_states
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_loaded_with_the_same_bits(family: str, shard: str, state: str, tmp_path: Path) -> None:
    kind, config, fields = FAMILIES[family]
    model = put_into(state, convert(tiny(kind, config, **fields)))
    loaded, report = kind.from_pretrained(saved(model, tmp_path, max_shard_size=shard), output_loading_info=True)
    assert not any(report.values()), report
    assert ternary(loaded) == ternary(model) != set()
    assert_same_bits(logits(loaded), logits(model))
    assert loaded.config.quantization_config == model.config.quantization_config


@both_states
def test_scales_per_group(state: str, tmp_path: Path) -> None:
    groups = BitQuantConfig("per_group", "int8", "per_group", 32)
    model = convert(llama(), groups)
    model.get_submodule(UP).quant_config = PER_ROW  # type: ignore[assignment]
    model.get_submodule(Q).quant_config = BitQuantConfig("per_group")  # type: ignore[assignment]
    put_into(state, model)
    kind: Any = LlamaForCausalLM
    loaded, report = kind.from_pretrained(saved(model, tmp_path), output_loading_info=True)
    assert not any(report.values()), report
    assert_same_bits(logits(loaded), logits(model))
    found = quantization(tmp_path)
    assert (found["weight_granularity"], found["group_size"]) == ("per_group", 32)
    assert found["modules"][UP] == {"kind": "ternary", **PER_ROW.fields_unlike(groups)}
    assert found["modules"][Q]["group_size"] == 128


def test_a_float_checkpoint_becomes_one_of_groups(tmp_path: Path) -> None:
    config = BitLabConfig("per_group", "int8", "per_channel", group_size=64, state="deployed")
    model = LlamaForCausalLM.from_pretrained(saved(llama(), tmp_path), quantization_config=config)
    assert model.get_submodule(Q).qweight_scale.dtype == torch.float16
    assert model.get_submodule(Q).quant_config == BitQuantConfig("per_group", group_size=64)


@both_states
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_stay(dtype: torch.dtype, state: str, tmp_path: Path) -> None:
    # Not `.to(dtype)`, which rounds the frequencies of the rotary embedding, too; they are in no checkpoint.
    built = AutoModelForCausalLM.from_config(llama().config, dtype=dtype).eval()
    model = put_into(state, convert(built))
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path), dtype="auto")
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    assert_same_bits(logits(loaded), logits(model))


@both_states
def test_layers_keep_configs_of_their_own(state: str, tmp_path: Path) -> None:
    model = convert(llama(), skip=["lm_head", "*.o_proj"])
    model.get_submodule(UP).quant_config = PER_ROW  # type: ignore[assignment]
    put_into(state, model)
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert loaded.get_submodule(UP).quant_config == PER_ROW
    assert type(loaded.model.layers[1].self_attn.o_proj) is nn.Linear
    assert ternary(loaded) == ternary(model)
    assert quantization(tmp_path)["modules"][UP] == {"kind": "ternary", "weight_granularity": "per_channel"}
    assert_same_bits(logits(loaded), logits(model))


def test_both_states_in_one_model(tmp_path: Path) -> None:
    model = convert(llama())
    model.get_submodule(UP).deploy()  # type: ignore[operator]
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert {name for name in ternary(loaded) if loaded.get_submodule(name).is_deployed} == {UP}
    assert_same_bits(logits(loaded), logits(model))


def test_the_layout_of_packed_weights_stays(tmp_path: Path) -> None:
    model: Any = deploy(convert(llama()))
    down = model.model.layers[1].mlp.down_proj
    down.qweight = repack(down.qweight, down.in_features, "1.6bit")
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.qweight, down.qweight)
    assert_same_bits(logits(loaded), logits(model))


@both_states
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
def test_a_ternary_head(tied: bool, state: str, tmp_path: Path) -> None:
    model = put_into(state, convert(llama(tie_word_embeddings=tied), skip=()))
    auto: Any = AutoModelForCausalLM
    loaded, report = auto.from_pretrained(saved(model, tmp_path), output_loading_info=True)
    assert not any(report.values()), report
    assert "lm_head" in ternary(loaded)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (tied and state == "trainable")
    loaded.tie_weights()
    assert_same_bits(logits(loaded), logits(model))


@both_states
def test_base_model_and_other_heads(state: str, tmp_path: Path) -> None:
    model = put_into(state, convert(llama()))
    base = LlamaModel.from_pretrained(saved(model, tmp_path / "whole"))
    assert {f"model.{name}" for name in ternary(base)} == ternary(model)
    classifier = LlamaForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert ternary(classifier) == ternary(model)
    assert type(classifier.score) is nn.Linear
    again = LlamaForCausalLM.from_pretrained(saved(base, tmp_path / "base"))
    assert ternary(again) == ternary(model)
    with torch.no_grad():
        assert_same_bits(again.model(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_converted_base_model_is_saved_by_the_whole_one(tmp_path: Path) -> None:
    model = llama()
    convert(model.model)
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert ternary(loaded) == ternary(model)
    assert_same_bits(logits(loaded), logits(model))


def test_a_deployed_state_dict_fits_plain_torch(tmp_path: Path) -> None:
    model = deploy(convert(llama()))
    other = convert(llama())
    missing, unexpected = other.load_state_dict(load_file(saved(model, tmp_path) / "model.safetensors"))
    assert not missing
    assert not unexpected
    assert_same_bits(logits(other), logits(model))


@both_states
def test_a_loaded_model_outlives_its_file(state: str, tmp_path: Path) -> None:
    model = put_into(state, convert(llama()))
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes([255]) * file.stat().st_size)  # In place: the same file, as a copy over it would leave it.
    assert_same_bits(logits(loaded), logits(model))


# --- float checkpoints ------------------------------------------------------------------------------------------------


def test_a_float_checkpoint_becomes_trainable_layers(tmp_path: Path) -> None:
    model = llama()
    config = BitLabConfig(weight_granularity="per_channel", modules_to_not_convert=["lm_head", "o_proj"])
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path), quantization_config=config)
    convert(model, PER_ROW, skip=["lm_head", "*.o_proj"])
    assert ternary(loaded) == ternary(model)
    assert loaded.get_submodule(UP).weight.requires_grad
    assert getattr(loaded, "hf_quantizer", None) is None
    assert_same_bits(logits(loaded), logits(model))


def test_a_float_checkpoint_becomes_deployed(tmp_path: Path) -> None:
    model = llama()
    config = BitLabConfig(state="deployed")
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path), quantization_config=config)
    assert all(loaded.get_submodule(name).is_deployed for name in ternary(loaded))
    assert loaded.is_quantized
    assert_same_bits(logits(loaded), logits(deploy(convert(model))))


def test_heads_of_a_float_checkpoint_stay_float(tmp_path: Path) -> None:
    directory = saved(llama(), tmp_path)
    loaded = LlamaForSequenceClassification.from_pretrained(directory, quantization_config=BitLabConfig())
    assert type(loaded.score) is nn.Linear
    assert "model.layers.0.mlp.up_proj" in ternary(loaded)


# --- training and generating ------------------------------------------------------------------------------------------


class Counting(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= len(self):
            raise IndexError(index)
        return {"input_ids": torch.arange(index, index + 8), "labels": torch.arange(index, index + 8)}


def trained(model: Any, directory: Path, **options: Any) -> float:
    arguments = TrainingArguments(
        str(directory),
        per_device_train_batch_size=4,
        max_steps=3,
        save_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    loss: float = Trainer(model, arguments, train_dataset=Counting()).train().training_loss
    return loss


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_checkpointing": True}, {"bf16": True}, {"torch_compile": True}],
    ids=["plain", "checkpointing", "bfloat16", "compile"],
)
def test_the_trainer_trains_and_saves(options: dict[str, Any], tmp_path: Path) -> None:
    model = convert(llama(num_hidden_layers=1))
    before = model.get_submodule(UP).weight.detach().clone()  # type: ignore[operator]
    loss = trained(model, tmp_path, **options)
    assert loss == pytest.approx(trained(convert(llama(num_hidden_layers=1)), tmp_path / "plain"), rel=0.01)
    assert not torch.equal(before, model.get_submodule(UP).weight)  # type: ignore[arg-type]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert ternary(loaded) == ternary(model)
    for (name, tensor), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert_same_bits(tensor, other, name)


def test_a_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    model = convert(llama())
    trained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    arguments = TrainingArguments(
        str(tmp_path), max_steps=5, report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4
    )
    trainer = Trainer(loaded, arguments, train_dataset=Counting())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 5


def test_the_trainer_does_not_train_packed_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purely quantized"):
        trained(deploy(convert(llama())), tmp_path)


@both_states
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache: str, state: str) -> None:
    model: Any = put_into(state, convert(llama(eos_token_id=None)))
    attended = torch.ones_like(IDS)
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    made = model.generate(IDS, attention_mask=attended, cache_implementation=cache, **options)
    tokens = IDS
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert made.tolist() == tokens.tolist()


def test_generate_compiles_packed_weights() -> None:
    model: Any = deploy(convert(llama(num_hidden_layers=1)))
    assert model.hf_quantizer.is_compileable
    compiled: Any = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


# --- what a model tells of itself -------------------------------------------------------------------------------------


def test_a_config_follows_its_model() -> None:
    model: Any = convert(llama())
    config = model.config.quantization_config
    assert config.to_dict()["state"] == "trainable"
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(config))
    model.get_submodule(UP).quant_config = PER_ROW
    deploy(model)
    assert config.to_dict()["state"] == "deployed"
    assert UP in config.to_dict()["modules"]
    assert copied.config.quantization_config.to_dict()["state"] == pickled.to_dict()["state"] == "trainable"
    deploy(copied)
    assert copied.config.quantization_config.to_dict()["state"] == "deployed"


def test_deployed_models_count_as_quantized() -> None:
    model: Any = deploy(convert(llama()))
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized"):
            cast()


def test_dequantize(tmp_path: Path) -> None:
    config = BitQuantConfig("per_channel", activation_dtype="float32")
    model: Any = deploy(convert(llama(), config))
    plain = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path)).dequantize()
    assert ternary(plain) == set()
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


# --- offloading -------------------------------------------------------------------------------------------------------


@both_states
def test_offloaded_layers(state: str, tmp_path: Path) -> None:
    model = put_into(state, convert(llama()))
    places = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        saved(model, tmp_path / "model"), device_map=places, offload_folder=tmp_path / "offloaded"
    )
    for _ in range(2):
        assert_same_bits(logits(loaded), logits(model))
    for name in ternary(loaded):
        layer: Any = loaded.get_submodule(name)
        assert layer._packed is None or not layer._hf_hook.offload
    again = AutoModelForCausalLM.from_pretrained(saved(loaded, tmp_path / "again"))
    assert_same_bits(logits(again), logits(model))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_process_without_the_integration_stops(tmp_path: Path) -> None:
    directory = saved(deploy(convert(llama())), tmp_path)
    program = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(directory)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "Unknown quantization type, got bitlab" in done.stderr
    assert "MISMATCH" in done.stderr


def with_config(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"].update(fields)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, "format is 2, expected 1"),
        ({"format": True}, "format is True"),
        ({"state": "frozen"}, "state is 'frozen', expected 'trainable' or 'deployed'"),
        ({"layout": "3bit"}, "layout is '3bit'"),
        ({"layout": "1.6bit"}, "does not exist for 64 in_features"),
        ({"group_size": 64}, "group_size is 64.*expected 128"),
        ({"weight_granularity": "per_row"}, "weight_granularity is 'per_row'"),
        ({"modules": {Q: {"kind": "int4"}}}, f"kind of {Q} is 'int4'"),
        ({"modules": {Q: {"kind": "ternary", "state": "frozen"}}}, f"state of {Q} is 'frozen'"),
        ({"modules": {Q: {"kind": "float", "layout": "2bit"}}}, "modules has .'layout'. for"),
        ({"modules": [Q]}, "expected names with fields"),
        ({"modules_to_not_convert": "o_proj"}, "modules_to_not_convert is 'o_proj'"),
        ({"scales": "float16"}, "quantization_config has .'scales'."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_does_not_exist(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with_config(saved(deploy(convert(llama())), tmp_path), **fields)
    with pytest.raises(FileError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("weight_granularity", "per_row"),
        ("activation_dtype", "int4"),
        ("layout", "auto"),
        ("state", None),
        ("modules", {Q: "float"}),
        ("modules_to_not_convert", [1]),
        ("quant_method", "bitnet"),
        ("group_size", 0),
    ],
)
def test_arguments_that_do_not_exist(argument: str, value: Any) -> None:
    with pytest.raises(QuantizationError, match=argument):
        BitLabConfig(**{argument: value})


def flip_a_code(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.qweight"][0, 0] ^= 1


def spoil_a_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.qweight_scale"].fill_(-1.0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_code, f"{Q}.qweight: qweight is damaged"),
        (spoil_a_scale, f"{Q}.qweight_scale holds a scale"),
        (lambda tensors: tensors.pop(f"{Q}.qweight_scale"), f"has no {Q}.qweight_scale"),
        (lambda tensors: tensors.pop(f"{Q}.qweight"), f"has no {Q}.qweight,"),
    ],
    ids=["code", "scale", "no scale", "no codes"],
)
def test_damaged_checkpoints(damage: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    file = saved(deploy(convert(llama())), tmp_path) / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FileError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_foreign_quantization(tmp_path: Path) -> None:
    model = llama()
    model.config.quantization_config = {"quant_method": "bitnet"}
    with pytest.raises(QuantizationError, match="quantized by 'bitnet'"):
        convert(model)
    assert ternary(model) == set()
    with pytest.raises(ValueError, match="BitNetQuantConfig"):
        AutoModelForCausalLM.from_pretrained(saved(model, tmp_path), quantization_config=BitLabConfig())


def test_a_model_of_transformers_is_none_of_ours(tmp_path: Path) -> None:
    directory = saved(deploy(convert(llama())), tmp_path)
    with pytest.raises(FileError, match=r'model_type is "llama".*see bitlayers.transformers'):
        AutoBitModel.from_pretrained(directory)


def test_tensor_parallelism_is_refused(tmp_path: Path) -> None:
    directory = saved(deploy(convert(llama())), tmp_path)
    config = LlamaConfig.from_pretrained(directory)
    config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(QuantizationError, match="tensor parallelism"):
        AutoModelForCausalLM.from_pretrained(directory, config=config)
