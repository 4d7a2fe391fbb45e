"""The text sample: how the model goes on from a prompt, for people to read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from factory_train.config import EvaluationConfig
from factory_train.data.shards import TokenStream
from factory_train.data.tokenizer import Tokenizer
from factory_train.models.generate import generate

PROMPT_TOKENS = 24
# One seed for every sample of every run: what differs between two samples is then the models.
_SEED = 0


def text_sample(
    model: Callable[[torch.Tensor], torch.Tensor],
    cfg: EvaluationConfig,
    tokenizer: Tokenizer,
    validation: TokenStream,
    *,
    seq_len: int,
    device: torch.device,
) -> dict[str, str]:
    """Returns `prompt` and `text`, the continuation of `evaluation.sample_tokens` tokens.

    Args:
        model: as for `generate`; when it is sharded, every rank must make the same call.
        validation: its first words are the prompt where `evaluation.prompt` is null.
        seq_len: longest context, in tokens.
        device: of the model.
    """
    prompt = tokenizer.encode(cfg.prompt) if cfg.prompt else validation.slice(0, min(PROMPT_TOKENS, validation.num_tokens)).tolist()
    generator = torch.Generator(device).manual_seed(_SEED)
    tokens = generate(model, prompt, cfg.sample_tokens, max_seq_len=seq_len, temperature=cfg.temperature, generator=generator)
    return {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(tokens[len(prompt) :])}
