"""How a text sample begins."""

from __future__ import annotations

from factory_train.config import EvaluationConfig
from factory_train.data.shards import TokenStream
from factory_train.data.tokenizer import Tokenizer

PROMPT_TOKENS = 24


def sample_prompt(cfg: EvaluationConfig, tokenizer: Tokenizer, validation: TokenStream) -> list[int]:
    """Returns the tokens of `evaluation.prompt`, or of the first words of the validation split."""
    if cfg.prompt:
        return tokenizer.encode(cfg.prompt)
    return validation.slice(0, min(PROMPT_TOKENS, validation.num_tokens)).tolist()
