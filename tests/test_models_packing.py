"""Documents packed into one row are to the model what they are alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_models_llama import BASE, VARIANTS, VOCAB, filled, tokens_of

from factory_train.config import ModelConfig
from factory_train.models.language_model import LanguageModel
from factory_train.models.llama import document_mask

EVERY_KIND = VARIANTS | {
    "qwen2": replace(BASE, num_kv_heads=2, qkv_bias=True),
    "qwen3": replace(BASE, num_kv_heads=2, qk_norm=True, head_dim=24),
}
# Two rows of the same length, cut in other places: documents of one token, of two, and one that fills a row.
LENGTHS = [[40, 1, 2, 53, 32], [128]]
every_kind = pytest.mark.parametrize("cfg", EVERY_KIND.values(), ids=EVERY_KIND)


def positions_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def documents(lengths: list[list[int]]) -> list[tuple[int, slice]]:
    """Returns row and place of each document."""
    found = []
    for row, of_row in enumerate(lengths):
        ends = torch.tensor(of_row).cumsum(0).tolist()
        found += [(row, slice(end - length, end)) for length, end in zip(of_row, ends, strict=True)]
    return found


def difference_to_separate_passes(model: LanguageModel, lengths: list[list[int]]) -> float:
    """Returns the largest difference between the logits of packed rows and of a pass for each document, in deviations of these."""
    tokens = tokens_of(len(lengths), sum(lengths[0]))
    with torch.no_grad():
        packed = model(tokens, positions_of(lengths))
        alone = [model(tokens[row : row + 1, place])[0] for row, place in documents(lengths)]
    worst = max(float((packed[row, place] - logits).abs().max()) for (row, place), logits in zip(documents(lengths), alone, strict=True))
    return worst / float(torch.cat(alone).std())


@every_kind
def test_packed_rows_have_the_logits_of_separate_forward_passes(cfg: ModelConfig) -> None:
    worst = difference_to_separate_passes(filled(cfg), LENGTHS)
    print(f"largest difference {worst:.2e} of the logits' standard deviation")
    assert worst <= 1e-5


@every_kind
def test_in_fp64_they_are_equal_to_rounding(cfg: ModelConfig) -> None:
    assert difference_to_separate_passes(filled(cfg, torch.float64), LENGTHS) <= 1e-12


def test_without_the_document_boundaries_they_would_differ() -> None:
    model, tokens = filled(BASE), tokens_of(1, 128)
    with torch.no_grad():
        packed, joined = model(tokens, positions_of(LENGTHS[:1])), model(tokens)
    assert torch.allclose(packed[:, :40], joined[:, :40], atol=1e-5)
    assert not torch.allclose(packed[:, 43:], joined[:, 43:], atol=1e-2)


@every_kind
def test_no_token_of_a_document_gets_a_gradient_from_another(cfg: ModelConfig) -> None:
    model, tokens, places = filled(cfg), tokens_of(2, 128), documents(LENGTHS)
    embedded: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.get_submodule("tok_embeddings").register_forward_hook(keep)
    for index, (row, place) in enumerate(places):
        logits = model(tokens, positions_of(LENGTHS))
        logits[row, place].square().sum().backward()
        grad = embedded.pop().grad
        assert grad is not None
        reach = grad.abs().amax(dim=-1)
        for other, (other_row, other_place) in enumerate(places):
            of_other = reach[other_row, other_place]
            assert torch.all(of_other > 0) if other == index else torch.all(of_other == 0), (index, other)


def test_the_loss_of_a_document_trains_all_weights_as_the_document_alone_does() -> None:
    tokens = tokens_of(1, 128)
    targets = tokens.roll(-1, dims=-1)

    def gradients(packed: bool) -> list[torch.Tensor]:
        model = filled(replace(BASE, num_kv_heads=2), torch.float64)
        places = [place for _, place in documents(LENGTHS[:1])]
        for place in [slice(None)] if packed else places:
            logits = model(tokens, positions_of(LENGTHS[:1])) if packed else model(tokens[:, place])
            F.cross_entropy(logits.flatten(0, 1), targets[:, place].flatten(), reduction="sum").backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    together, apart = gradients(True), gradients(False)
    assert len(together) == len(apart) > 20
    for ours, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_changing_one_document_leaves_the_others_bit_for_bit() -> None:
    model, tokens = filled(BASE), tokens_of(1, 128)
    changed = tokens.clone()
    changed[0, 43:96] = (changed[0, 43:96] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens, positions_of(LENGTHS[:1])), model(changed, positions_of(LENGTHS[:1]))
    same = (before == after).all(dim=-1)[0]
    assert torch.equal(same, torch.arange(128).lt(43) | torch.arange(128).ge(96))


def test_mask_is_causal_within_documents() -> None:
    mask = document_mask(torch.tensor([[0, 1, 0, 0, 1], [4, 5, 6, 7, 8]]), torch.float64)
    visible = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert mask.dtype == torch.float64
    assert mask.shape == (2, 1, 5, 5)
    assert (mask[0, 0] == 0).int().tolist() == visible
    assert torch.equal(mask[1, 0] == 0, torch.ones(5, 5, dtype=torch.bool).tril())
    assert torch.all((mask == 0) | (mask == -torch.inf))


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_share_one_mask_and_keep_no_copies_of_it(autocast: bool) -> None:
    """Attention would convert a mask of another type in every layer, and keep it."""
    length, dtype = 256, torch.bfloat16 if autocast else torch.float32
    model, of_mask = filled(replace(BASE, num_layers=4, num_kv_heads=2)), length * length * dtype.itemsize
    kept: set[int] = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (length, length):
            kept.add(tensor.untyped_storage().data_ptr())
            assert tensor.untyped_storage().nbytes() == of_mask
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tokens_of(1, length), positions_of([[100, 156]])).float().logsumexp(-1).sum()
    loss.backward()
    assert len(kept) == 1
