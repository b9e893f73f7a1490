"""The engine's language model from Python: the same bits whatever runs beside it, sessions, sampling, errors."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitcore.exceptions import FileError, KernelNotFoundError, QuantizationError, StateError
from bitcore.kernels import KernelRegistry
from bitmodels import LanguageModel
from bitmodels.checkpoints import convert_checkpoint
from bitmodels.native_model import Append, Cancellation, Sampler, Sampling
from checkpoints import as_floats, hugging_face, tiny
from language_models import CACHES, IDS, MODELS, all_logits, hash_of

# Of all logits, by model and cache: they are the same on every CPU.
HASHES = json.loads((Path(__file__).parent / "language_model_hashes.json").read_text())


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for index, (name, (make, options)) in enumerate(MODELS.items()):
        folder = tmp_path_factory.mktemp(f"m{index}")
        model = make()
        convert_checkpoint(hugging_face(folder / "source", model, as_floats(model)), folder / "model", **options)
        made[name] = folder / "model"
    return made


@pytest.fixture(params=MODELS)
def named(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("cache", CACHES)
def test_one_hash_for_every_kernel_thread_count_and_split(named: str, cache: str, directories: dict[str, Path]) -> None:
    """The kernels of all instruction sets that this CPU has; other CPUs have the same hashes."""
    expected = all_logits(LanguageModel.open(directories[named], threads=1), cache)
    assert hash_of(expected) == HASHES[named][cache]
    kernels = [name for name in KernelRegistry.list_available_kernels() if name.startswith(("Int8", "Reference"))]
    splits = itertools.cycle([(60,), (1,) * 60, (7, 1, 20, 32), (33, 27)])
    for kernel, threads in itertools.product(kernels, (1, 2, 5)):
        model = LanguageModel.open(directories[named], kernel=kernel, threads=threads)
        parts = (20, 40) if kernel == "ReferenceKernel" else next(splits)
        assert hash_of(all_logits(model, cache, parts)) == HASHES[named][cache], (kernel, threads, parts)


@pytest.mark.parametrize("cache", CACHES)
def test_company_does_not_matter(named: str, cache: Any, directories: dict[str, Path]) -> None:
    """Alone, and with seven others that are prompts and single tokens at other positions."""
    model = LanguageModel.open(directories[named], threads=2)
    alone = all_logits(model, cache)
    others = [model.session(0, cache) for _ in range(7)]
    for index, session in enumerate(others):
        model.forward([Append(session, IDS[: 3 * index + 1], "none")])
    session, found = model.session(0, cache), []
    for first, size in ((0, 25), (25, 1), (26, 34)):
        appends = [Append(other, IDS[:1] if i % 2 else IDS[:4], "last") for i, other in enumerate(others)]
        appends.insert(3, Append(session, IDS[first : first + size], "all"))
        found.append((model.forward(appends) or [])[3])
    assert np.concatenate(found).tobytes() == alone.tobytes()


@pytest.mark.parametrize("cache", CACHES)
def test_forked_and_truncated_sessions(named: str, cache: Any, directories: dict[str, Path]) -> None:
    model = LanguageModel.open(directories[named], threads=2)
    expected = all_logits(model, cache)
    session = model.session(0, cache)
    model.forward([Append(session, IDS[:40], "none")])
    fork = session.fork()
    model.forward([Append(session, [5] * 15, "none")])  # What one writes the other does not see.
    session.truncate(30)
    for each, begin in ((fork, 40), (session, 30)):
        assert each.position == begin
        (logits,) = model.forward([Append(each, IDS[begin:], "all")]) or []
        assert logits.tobytes() == expected[begin:].tobytes()


def test_hidden_rows_are_what_the_head_is_applied_to(tmp_path: Path) -> None:
    made = tiny("llama")
    convert_checkpoint(hugging_face(tmp_path / "source", made, as_floats(made)), tmp_path / "model", head="keep")
    model = LanguageModel.open(tmp_path / "model")
    tokens = [(i * i) % 96 for i in range(50)]
    found = model.forward([Append(model.session(), tokens, rows) for rows in ("hidden", "all")])
    assert found is not None
    hidden, logits = found
    assert hidden.shape == (50, model.info.hidden_size)
    head = made.floats["lm_head.weight"].astype(np.float64)
    np.testing.assert_allclose(hidden @ head.T, logits, rtol=1e-4, atol=1e-5)


def test_long_contexts_go_over_blocks(tmp_path: Path) -> None:
    """600 positions are three blocks of the cache; forks share the full ones."""
    source = tiny("llama", 64, max_position_embeddings=1024)
    convert_checkpoint(hugging_face(tmp_path / "source", source, as_floats(source)), tmp_path / "model")
    model = LanguageModel.open(tmp_path / "model", threads=2)
    ids = [(i * i + 3) % 96 for i in range(600)]
    (expected,) = model.forward([Append(model.session(), ids, "all")]) or []
    for kernel, threads, parts in (
        ("ReferenceKernel", 1, (599, 1)),
        (None, 5, (255, 1, 1, 255, 1, 86, 1)),
        (None, 1, (300, 300)),
    ):
        other = LanguageModel.open(tmp_path / "model", kernel=kernel, threads=threads)
        session, first, found = other.session(), 0, []
        for size in parts:
            found += other.forward([Append(session, ids[first : first + size], "all")]) or []
            session = session.fork()
            first += size
        assert np.concatenate(found).tobytes() == expected.tobytes()


def test_reading_instead_of_mapping(directories: dict[str, Path]) -> None:
    name = "llama, int8 head"
    model = LanguageModel.open(directories[name], map_weights=False, check=True)
    assert hash_of(all_logits(model)) == HASHES[name]["float16"]


# --- sampling ---------------------------------------------------------------------------------------------------------


def philox(key: tuple[int, int], counter: int) -> list[int]:
    """Philox 4x32-10 by its definition (Salmon et al., 2011)."""
    words, (k0, k1) = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], key
    for _ in range(10):
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [b >> 32 ^ words[1] ^ k0, b & 0xFFFFFFFF, a >> 32 ^ words[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return words


def test_the_generator_is_philox() -> None:
    """The known answer of its authors for zeros."""
    assert philox((0, 0), 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def chosen(logits: Any, sampling: Sampling, index: int) -> int:
    """What the contract says, in float64 but for the logits."""
    values = logits.astype(np.float32)
    values = (values - values.max()) / np.float32(sampling.temperature)
    weights = np.exp(values.astype(np.float64))
    keep = np.arange(len(values))
    if sampling.top_k:
        keep = np.sort(np.lexsort((keep, -values))[: sampling.top_k])
    if sampling.top_p < 1:
        order = keep[np.lexsort((keep, -weights[keep]))]
        reached = np.cumsum(weights[order])
        count = int(np.searchsorted(reached, np.float32(sampling.top_p) * reached[-1])) + 1
        keep = np.sort(order[:count])
    keep = keep[weights[keep] >= sampling.min_p]
    words = philox((sampling.seed, sampling.choice), index)
    uniform = ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53
    return int(keep[np.searchsorted(np.cumsum(weights[keep]), uniform * weights[keep].sum(), side="right")])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7, "choice": 3},
    ],
)
def test_what_is_drawn(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    sampling = Sampling(**{"temperature": 1.0, "seed": 12345, **options})
    sampler = Sampler(sampling, 300)
    for index in range(200):
        logits = rng.normal(0, 3, 300).astype(np.float32)
        assert sampler.sample(logits.copy()) == chosen(logits, sampling, index)


def test_frequencies_are_those_of_the_weights() -> None:
    logits = np.log(np.array([1, 2, 3, 4], np.float32))
    sampler, counts = Sampler(Sampling(temperature=1.0, seed=7), 4), np.zeros(4)
    for _ in range(20_000):
        counts[sampler.sample(logits.copy())] += 1
    np.testing.assert_allclose(counts / counts.sum(), [0.1, 0.2, 0.3, 0.4], atol=0.015)


def test_greedy_takes_the_lowest_of_equal_ones() -> None:
    assert Sampler(Sampling(), 4).sample(np.array([1, 3, 3, 2], np.float32)) == 1


def test_penalties_bias_and_mask() -> None:
    logits = np.array([2.0, 1.9, -1.0, 0.0], np.float32)
    repeated = Sampler(Sampling(repetition_penalty=2.0), 4)
    repeated.see([0])
    assert repeated.sample(logits.copy()) == 1
    frequent = Sampler(Sampling(frequency_penalty=0.15), 4)
    assert [frequent.sample(logits.copy()) for _ in range(3)] == [0, 1, 0]
    present = Sampler(Sampling(presence_penalty=5.0), 4)
    assert [present.sample(logits.copy()) for _ in range(4)] == [0, 1, 3, 2]
    assert Sampler(Sampling(logit_bias=((2, 9.0),)), 4).sample(logits.copy()) == 2
    assert Sampler(Sampling(), 4).sample(logits.copy(), np.array([0b1100], np.uint32)) == 3
    for mask, message in (([0], "no token is allowed by mask"), ([1, 1], "mask has 2 words, expected 1")):
        with pytest.raises(QuantizationError, match=message):
            Sampler(Sampling(), 4).sample(logits.copy(), np.array(mask, np.uint32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2.0}, "min_p is 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
        ({"logit_bias": ((4, 1.0),)}, "token is 4, expected 0 to 3"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"choice": 0.5}, "choice is 0.5"),
        ({"top_k": 2**64 + 1}, "top_k is 18446744073709551617"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"temperature": "a"}, "temperature is 'a'"),
        ({"logit_bias": ((1, "x"),)}, "logit_bias is 'x'"),
        ({"logit_bias": {1: 2.0}}, "logit_bias is {1: 2.0}, expected pairs"),
    ],
)
def test_sampling_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        Sampler(Sampling(**options), 4)
    sampler = Sampler(Sampling(), 4)
    with pytest.raises(QuantizationError, match="logits has a NaN"):
        sampler.sample(np.array([0, np.nan, 0, 0], np.float32))
    with pytest.raises(QuantizationError, match="logits has 3, expected 4"):
        sampler.sample(np.zeros(3, np.float32))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(directories: dict[str, Path]) -> LanguageModel:
    return LanguageModel.open(directories["llama, int8 head"])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "tokens are empty"),
        ([96], "tokens has 96, expected 0 to 95"),
        ([-1], "tokens has -1 to -1"),
        ([2**31], "tokens has 2147483648"),
        ([0] * 65, "tokens has 65 after 0, and the context limit is 64"),
        ([0.5], "expected integers in one row"),
        ([[1]], "expected integers in one row"),
    ],
)
def test_tokens(tokens: Any, message: str, model: LanguageModel) -> None:
    session = model.session()
    with pytest.raises(QuantizationError, match=message):
        model.forward([Append(session, tokens)])
    assert session.position == 0
    assert hash_of(all_logits(model)) == HASHES["llama, int8 head"]["float16"]  # It still works.


def test_sessions(model: LanguageModel, directories: dict[str, Path]) -> None:
    session = model.session(8)
    with pytest.raises(QuantizationError, match="tokens has 9 after 0, and the context limit is 8"):
        model.forward([Append(session, [0] * 9)])
    with pytest.raises(StateError, match="session is in use"):
        model.forward([Append(session, [0]), Append(session, [0])])
    with pytest.raises(QuantizationError, match="session is of another model"):
        LanguageModel.open(directories["bitnet, tied int8"]).forward([Append(session, [0])])
    with pytest.raises(QuantizationError, match="position is 1, expected 0 to 0"):
        session.truncate(1)
    for position in (2**64, 0.5, True):
        with pytest.raises(QuantizationError, match="position is"):
            session.truncate(position)  # type: ignore[arg-type]
    for limit in (65, 2**64 + 5, 3.5):
        with pytest.raises(QuantizationError, match=f"context_limit is {limit}, expected"):
            model.session(limit)  # type: ignore[arg-type]
    bad: Any = "float8"
    with pytest.raises(QuantizationError, match="cache is 'float8'"):
        model.session(0, bad)
    with pytest.raises(QuantizationError, match="rows is 'some'"):
        model.forward([Append(session, [0], bad and "some")])  # type: ignore[arg-type]
    assert session.position == 0


def test_opening(directories: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is no directory"):
        LanguageModel.open(tmp_path / "missing")
    with pytest.raises(FileError, match="config.json: cannot be opened"):
        LanguageModel.open(tmp_path)
    with pytest.raises(KernelNotFoundError, match="NoKernel"):
        LanguageModel.open(directories["llama, int8 head"], kernel="NoKernel")
    for threads in (-1, 2**32 + 1, 1.5):
        with pytest.raises(QuantizationError, match=f"threads is {threads}"):
            LanguageModel.open(directories["llama, int8 head"], threads=threads)  # type: ignore[arg-type]
    for odd in ("llama\0x", "\udcff"):
        with pytest.raises(FileError):
            LanguageModel.open(tmp_path / odd)
    with pytest.raises(QuantizationError, match="kernel is 'a"):
        LanguageModel.open(directories["llama, int8 head"], kernel="a\0b")


def copy_of(source: Path, target: Path, **config: Any) -> Path:
    """A model with other fields in config.json; None removes one."""
    target.mkdir()
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    fields = {**json.loads((source / "config.json").read_text()), **config}
    (target / "config.json").write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
    return target


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma3"}, 'model_type is "gemma3", known are llama'),
        ({"vocab_size": 0}, "vocab_size is 0, expected a positive integer"),
        ({"vocab_size": 97}, r"embed_tokens.weight.* has shape \(96, 128\), expected \(97, 128\)"),
        ({"hidden_size": ...}, 'has no "hidden_size"'),
        ({"hidden_act": "tanh"}, 'hidden_act is "tanh"'),
        ({"head_dim": 31}, "head_dim is 31, expected an even number"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has a tensor model.layers.1.*, which the model does not have"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected a positive number"),
        ({"rope_parameters": ...}, 'has no "rope_parameters"'),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 'rope_type is "dynamic"'),
        ({"rope_parameters": {"rope_theta": 1e4, "x": 1}}, 'has "x", which is not known'),
        ({"quantization_config": ...}, "has no quantization_config"),
        ({"quantization_config": {"quant_method": "bitnet"}}, 'quant_method is "bitnet", expected "bitlab"'),
        ({"tie_word_embeddings": True}, "ties lm_head to an embedding of another kind"),
        ({"attention_bias": True}, "has no tensor .*bias"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes", expected true or false'),
    ],
)
def test_configs(config: dict[str, Any], message: str, directories: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message) as error:
        LanguageModel.open(copy_of(directories["llama, int8 head"], tmp_path / "a", **config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_granularity": "per_tensor"}, "a token's logits would depend on the others"),
        ({"state": "trainable"}, 'state is "trainable", expected "deployed"'),
        ({"format": 2}, "format is 2, expected 1"),
        ({"weight_granularity": "per_moon"}, "weight_granularity"),
        ({"modules": {"lm_head": {"kind": "int4"}}}, 'kind is "int4"'),
        ({"modules": {"lm_head": {"kind": "float"}}}, "lm_head.weight.* is int8, expected a floating dtype"),
    ],
)
def test_quantization_configs(
    fields: dict[str, Any], message: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    source = directories["llama, int8 head"]
    quantization = {**json.loads((source / "config.json").read_text())["quantization_config"], **fields}
    with pytest.raises(FileError, match=message):
        LanguageModel.open(copy_of(source, tmp_path / "a", quantization_config=quantization))


def test_damaged_weights(directories: dict[str, Path], tmp_path: Path) -> None:
    path = copy_of(directories["llama, int8 head"], tmp_path / "a")
    content = bytearray((path / "model.safetensors").read_bytes())
    for size in (0, 7, 100, len(content) - 1):
        (path / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(FileError, match=r"model.safetensors"):
            LanguageModel.open(path)
    length = int.from_bytes(content[:8], "little")
    begin = 8 + length + json.loads(content[8 : 8 + length])["model.layers.0.mlp.up_proj.qweight"]["data_offsets"][0]
    content[begin] = 0xFF  # Four codes 3.
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(FileError, match="up_proj.qweight"):
        LanguageModel.open(path, check=True)
    model = LanguageModel.open(path)
    session = model.session()
    with pytest.raises(QuantizationError, match="invalid code"):
        model.forward([Append(session, [1])])
    assert session.position == 0


def test_two_threads_in_one_session_is_an_error_and_no_race(tmp_path: Path) -> None:
    source = tiny("llama", 64, max_position_embeddings=1024)
    convert_checkpoint(hugging_face(tmp_path / "source", source, as_floats(source)), tmp_path / "model")
    model = LanguageModel.open(tmp_path / "model", threads=1)
    session, errors, done = model.session(), [], []

    def work() -> None:
        for _ in range(200):
            try:
                model.forward([Append(session, [1, 2])])
                done.append(2)
            except StateError as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.position == sum(done)
    assert len(errors) + len(done) == 400


def test_cancelled_calls_change_nothing(directories: dict[str, Path]) -> None:
    name = "llama, int8 head"
    model, cancellation = LanguageModel.open(directories[name], threads=2), Cancellation()
    session = model.session()
    model.forward([Append(session, IDS[:20], "none")])
    cancelled = 0
    for delay in range(100):
        timer = threading.Timer(delay * 2e-6, cancellation.cancel)
        timer.start()
        if model.forward([Append(session, IDS[20:60], "none")], cancellation) is None:
            cancelled += 1
            assert session.position == 20
        else:
            session.truncate(20)
        timer.join()
        cancellation.reset()
    (logits,) = model.forward([Append(session, IDS[20:], "all")]) or []
    assert logits.tobytes() == all_logits(model)[20:].tobytes()
    cancellation.cancel()
    assert model.forward([Append(model.session(), [1])], cancellation) is None


def test_a_model_lives_as_long_as_its_sessions(directories: dict[str, Path]) -> None:
    session = LanguageModel.open(directories["llama, int8 head"]).session()
    assert session.fork().position == 0
