"""Makes a checkpoint of random weights in the shape of a published model: what can be timed where none can be fetched.

    python benchmarks/models/make_model.py bitnet-2b-4t DIRECTORY --form packed

Needs NumPy and BitLab, no torch. The tokens of such a model mean nothing, and its bytes and operations are the real
ones.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitmodels.checkpoints.decoder import ARCHITECTURES, Decoder
from bitmodels.checkpoints.stream import Output, SafetensorsStream

ROWS = 4096  # Of a matrix that are made at a time.


class Shape(NamedTuple):
    """Sizes of a model; all but the first two are those of config.json."""

    model_type: str
    group: int  # Weights per scale of ternary floats; 0: one for a tensor.
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool


SHAPES = {
    "bitnet-2b-4t": Shape("bitnet", 0, 2560, 6912, 30, 20, 5, 128, 128256, True),
    "bonsai-1.7b": Shape("qwen3", 128, 2048, 6144, 28, 16, 8, 128, 151936, True),
    "bonsai-4b": Shape("qwen3", 128, 2560, 9728, 36, 32, 8, 128, 151936, True),
    "bonsai-8b": Shape("qwen3", 128, 4096, 12288, 36, 32, 8, 128, 151936, False),
    "llama3-8b": Shape("llama", 0, 4096, 14336, 32, 32, 8, 128, 128256, False),
    "falcon-e-3b": Shape("llama", 0, 2048, 13312, 32, 16, 2, 128, 32768, False),
}
FORMS = {
    "packed": "linear layers packed by rows as transformers does, the rest bfloat16",
    "masters": "bfloat16 weights that the model quantizes in every forward",
    "ternary": "bfloat16 weights that are ternary already, the embedding and the head included",
}


def config_of(shape: Shape, form: str) -> dict[str, Any]:
    """config.json."""
    architecture = ARCHITECTURES[shape.model_type]
    config = {
        **{name: value for name, value in shape._asdict().items() if name not in ("group", "model_type")},
        "architectures": [architecture.class_name],
        "model_type": shape.model_type,
        "hidden_act": architecture.defaults.get("hidden_act", "silu"),
        "attention_bias": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    }
    if form != "ternary":
        mode = "offline" if form == "packed" else "online"
        bitnet = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": mode}
        config["quantization_config"] = {**bitnet, "modules_to_not_convert": ["lm_head"]}
    return config


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Cut, not rounded."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def gaussian(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.uint16]:
    return bfloat16(rng.standard_normal((rows, columns), dtype=np.float32))


def ternary(rng: np.random.Generator, rows: int, columns: int, group: int) -> NDArray[np.uint16]:
    codes = rng.integers(-1, 2, (rows, columns), dtype=np.int8)
    scales = np.full((rows, 1), 0.02) if not group else rng.uniform(0.01, 0.05, (rows, -(-columns // group)))
    return bfloat16(
        (codes * scales.astype(np.float32).repeat(group or columns, axis=1)[:, :columns]).astype(np.float32)
    )


def packed(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.uint8]:
    """Four valid codes in every byte: the rows are packed rows."""
    fields = rng.integers(0, 3, (4, rows, columns), dtype=np.uint8)
    return fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6


def pieces(
    rng: np.random.Generator, output: Output, shape: Shape, form: str, is_linear: bool
) -> Iterator[NDArray[Any]]:
    """The contents of a tensor, some rows at a time."""
    if len(output.shape) == 1:
        yield bfloat16(np.full(output.shape, 1 if output.shape[0] > 1 else 0.02, np.float32))
        return
    rows, columns = output.shape
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        if output.dtype == "U8":
            yield packed(rng, count, columns)
        elif form == "ternary":
            yield ternary(rng, count, columns, shape.group)
        else:
            yield (
                gaussian(rng, count, columns)
                if is_linear
                else bfloat16(np.float32(0.02) * rng.standard_normal((count, columns), dtype=np.float32))
            )


def make(shape: Shape, form: str, directory: Path) -> None:
    """Writes config.json and model.safetensors."""
    config = config_of(shape, form)
    decoder = Decoder(ARCHITECTURES[shape.model_type], config)
    outputs: dict[Output, bool] = {}
    for name, (rows, columns), _ in decoder.linears():
        if form == "packed":
            outputs[Output(f"{name}.weight", "U8", (rows // 4, columns))] = True
            outputs[Output(f"{name}.weight_scale", "BF16", (1,))] = True
        else:
            outputs[Output(f"{name}.weight", "BF16", (rows, columns))] = True
    outputs |= {Output(f"{name}.weight", "BF16", sizes): False for name, sizes in decoder.matrices()}
    outputs |= {Output(name, "BF16", (size,)): False for name, size in decoder.vectors()}
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with SafetensorsStream(directory / "model.safetensors", outputs) as stream:
        for output, is_linear in outputs.items():
            for piece in pieces(rng, output, shape, form, is_linear):
                stream.append(output.name, piece)
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--form", choices=FORMS, default="packed", help="; ".join(f"{k}: {v}" for k, v in FORMS.items())
    )
    arguments = parser.parse_args()
    make(SHAPES[arguments.name], arguments.form, arguments.directory)


if __name__ == "__main__":
    main()
