"""From the name of an architecture to its model."""

from __future__ import annotations

from factory_train.config import ModelConfig
from factory_train.models.language_model import LanguageModel
from factory_train.registries import ARCHITECTURES


def build_model(cfg: ModelConfig, vocab_size: int) -> LanguageModel:
    """Builds the model of a configuration, on the device of the surrounding `torch.device` context.

    On the meta device nothing is allocated; `to_empty(device=...)`, `init_buffers` and a fill of the parameters by
    `initial_std` make it real.

    Args:
        cfg: the model section.
        vocab_size: rows of the embedding.

    Raises:
        ConfigError: there is no such architecture.
    """
    model: LanguageModel = ARCHITECTURES.get(cfg.architecture)(cfg, vocab_size)
    return model
