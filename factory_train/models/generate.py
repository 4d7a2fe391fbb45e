"""Text generation, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def generate(
    model: Callable[[Tensor], Tensor],
    tokens: list[int],
    num_tokens: int,
    *,
    max_seq_len: int | None = None,
    eos_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Returns a prompt and what `continuation`, which see, adds to it; `eos_id` is included when it came."""
    added = continuation(
        model,
        tokens,
        num_tokens,
        max_seq_len=max_seq_len,
        eos_id=eos_id,
        temperature=temperature,
        top_p=top_p,
        generator=generator,
    )
    return [*tokens, *added]


@torch.no_grad()
def continuation(
    model: Callable[[Tensor], Tensor],
    tokens: list[int],
    num_tokens: int,
    *,
    max_seq_len: int | None = None,
    eos_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields the tokens that continue a prompt; each is predicted from the last `max_seq_len` tokens, computed anew.

    Args:
        model: maps tokens_BT to logits_BTV: a `LanguageModel`, or a wrapper that has one as `module`. When it is sharded,
            every rank must make the same call.
        tokens: ids of the prompt, at least one.
        num_tokens: how many tokens to add, at most.
        max_seq_len: longest context, at most that of the model; None is that of the model.
        eos_id: stop after this token.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled.
        top_p: sample from the most likely tokens that together have this probability; 1 is all of them.
        generator: source of randomness, on the device of the model.
    """
    assert tokens, "generation needs a prompt of at least one token"
    module = getattr(model, "module", model)
    assert isinstance(module, nn.Module)
    device = next(module.parameters()).device
    longest = min(max_seq_len or int(module.max_seq_len), int(module.max_seq_len))  # type: ignore[arg-type]
    context = list(tokens)
    for _ in range(num_tokens):
        logits_V = model(torch.tensor([context[-longest:]], device=device))[0, -1].float()
        if temperature > 0:
            probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
            if top_p < 1:
                probabilities_V = _nucleus(probabilities_V, top_p)
            token = int(torch.multinomial(probabilities_V, 1, generator=generator))
        else:
            token = int(logits_V.argmax())
        context.append(token)
        yield token
        if token == eos_id:
            return


def _nucleus(probabilities_V: Tensor, top_p: float) -> Tensor:
    """Returns the probabilities with those outside of the nucleus set to zero (Holtzman et al. 2020, arXiv 1904.09751).

    The nucleus is the smallest set of the most likely tokens whose probabilities sum to at least `top_p`.
    """
    sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
    # What comes before a token has to fall short of top_p; so the token that crosses it stays.
    before_V = sorted_V.cumsum(0) - sorted_V
    return torch.zeros_like(probabilities_V).scatter(0, order_V, sorted_V.where(before_V < top_p, 0.0))
