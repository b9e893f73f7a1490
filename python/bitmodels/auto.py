"""`AutoBitModel`: the right model class for a config or a saved model."""

import os

import bitmodels.mlp  # noqa: F401 (registers its model)
from bitcore.config import BitQuantConfig
from bitcore.exceptions import FileError, QuantizationError
from bitmodels.base import BitModelBase, BitModelConfig
from bitmodels.config import CONFIG_FILE, read_config
from bitmodels.registry import find_model, find_model_of
from bitmodels.storage import require_path


class AutoBitModel:
    """Finds the class of a model. It has no instances."""

    def __init__(self) -> None:
        raise TypeError("AutoBitModel has no instances; use AutoBitModel.from_config() or from_pretrained()")

    @staticmethod
    def from_config(config: BitModelConfig, quant_config: BitQuantConfig | None = None) -> BitModelBase:
        """A new, untrained model.

        Args:
            config: The config of a registered model.
            quant_config: Takes the place of `config.quant_config` where given.

        Raises:
            QuantizationError: no registered model has such a config.
        """
        return find_model_of(config)(config, quant_config)

    @staticmethod
    def from_pretrained(directory: str | bytes | os.PathLike[str]) -> BitModelBase:
        """A saved model of any registered type, in evaluation mode. See `BitModelBase.from_pretrained`."""
        path = require_path(directory)
        model_type, values = read_config(path)
        try:
            model = find_model(model_type)
        except QuantizationError as error:
            foreign = (
                "; this is a model of transformers: see bitlayers.transformers" if "architectures" in values else ""
            )
            raise FileError(f"{path / CONFIG_FILE}: {error}{foreign}") from error
        return model.from_pretrained(directory)
