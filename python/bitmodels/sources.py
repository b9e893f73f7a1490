"""Where a model comes from: BitLab's own directory, one of Hugging Face, a GGUF file, or a name on the hub.

What is not BitLab's own form is converted once, into a cache.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from bitcore.exceptions import FileError
from bitmodels.checkpoints.conversion import Conversion, Progress, convert_checkpoint
from bitmodels.checkpoints.huggingface import CONFIG, read_json

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# What a model consists of; everything else in a repository of the hub is left there.
_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model")

_CONVERTER = 1  # Counts up with every change of what a conversion writes: a model is then converted again.

Converted = Callable[[Conversion], None]


def cache_directory() -> Path:
    """BITLAB_CACHE, or bitlab in the user's cache directory."""
    if chosen := os.environ.get("BITLAB_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitlab"


def is_own_form(path: Path) -> bool:
    """Whether it is a directory in BitLab's form.

    Raises:
        FileError: config.json is damaged.
    """
    config = path / CONFIG
    quantization = read_json(config).get("quantization_config") if config.is_file() else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "bitlab"


def model_directory(
    source: str, *, offline: bool = False, progress: Progress | None = None, converted: Converted | None = None
) -> Path:
    """A directory in BitLab's form for a source; what had to be converted is reported to `converted`.

    Args:
        source: A path, or `owner/name` of the hub if there is no such path.
        offline: Take from the hub only what has been fetched before.

    Raises:
        FileError: it is none of them, or cannot be converted (the message says why).
        OSError: it cannot be fetched, read or written.
    """
    path = Path(source)
    if not path.exists():
        if not _HUB_NAME.fullmatch(source):
            raise FileError(f"{source}: no such file or directory")
        path = _fetched(source, offline)
    if path.is_dir() and is_own_form(path):
        return path
    target = cache_directory() / "models" / _key(path)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            conversion = convert_checkpoint(path, target, progress=progress)
        except FileError:
            if not target.is_dir():
                raise
            return target  # Another process has just converted it.
        if converted is not None:
            converted(conversion)
    return target


def _fetched(name: str, offline: bool) -> Path:
    """A repository of the hub, in its library's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES), local_files_only=offline))
    except LocalEntryNotFoundError as error:
        why = "it has not been fetched before" if offline else "there is no connection"
        raise FileError(f"{name}: no such file or directory, and not to be had from the hub: {why}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise FileError(f"{name}: no such file or directory, and the hub says: {reason}") from error


def _key(path: Path) -> str:
    """Names what a source is now: another file of the same name is converted again."""
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    facts = [str(_CONVERTER), str(path.resolve())]
    for file in files:
        found = file.stat()
        facts.append(f"{file.name} {found.st_size} {found.st_mtime_ns}")
    return f"{path.stem}-{hashlib.sha256('|'.join(facts).encode()).hexdigest()[:16]}"
