"""Text generation, one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    tokens: list[int],
    num_tokens: int,
    *,
    max_seq_len: int | None = None,
    eos_id: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Continues a prompt; each token is predicted from the last `max_seq_len` tokens, computed anew.

    Args:
        model: maps tokens_BT to logits_BTV: a `LanguageModel`, or a wrapper that has one as `module`. When it is sharded,
            every rank must make the same call.
        tokens: ids of the prompt, at least one.
        num_tokens: how many tokens to add, at most.
        max_seq_len: longest context, at most that of the model; None is that of the model.
        eos_id: stop after this token.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled.
        generator: source of randomness, on the device of the model.

    Returns:
        The prompt and what follows it, `eos_id` included when it came.
    """
    assert tokens, "generation needs a prompt of at least one token"
    module = getattr(model, "module", model)
    assert isinstance(module, nn.Module)
    device = next(module.parameters()).device
    longest = min(max_seq_len or int(module.max_seq_len), int(module.max_seq_len))  # type: ignore[arg-type]
    text = list(tokens)
    for _ in range(num_tokens):
        logits_V = model(torch.tensor([text[-longest:]], device=device))[0, -1].float()
        if temperature > 0:
            probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
            text.append(int(torch.multinomial(probabilities_V, 1, generator=generator)))
        else:
            text.append(int(logits_V.argmax()))
        if text[-1] == eos_id:
            break
    return text
