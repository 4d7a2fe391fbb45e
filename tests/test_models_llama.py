"""The Llama decoder against transformers' own, and against what any causal model must obey."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from factory_train.config import ModelConfig, RopeScaling
from factory_train.errors import ConfigError
from factory_train.models.build import build_model
from factory_train.models.hf_config import hf_config, hf_name
from factory_train.models.language_model import LanguageModel

VOCAB = 300
BASE = ModelConfig(dim=128, num_layers=3, num_heads=8, num_kv_heads=8, ffn_dim=352, max_seq_len=512, tie_embeddings=False)
# The original context is shorter than the rows, so that all three bands of wavelengths occur in what is compared.
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)
VARIANTS = {
    "mha_untied": BASE,
    "mha_tied": replace(BASE, tie_embeddings=True),
    "gqa_untied": replace(BASE, num_kv_heads=2),
    "gqa_tied": replace(BASE, num_kv_heads=2, tie_embeddings=True),
    "wide_heads": replace(BASE, num_kv_heads=2, head_dim=24),
    "mqa_tied": replace(BASE, num_kv_heads=1, tie_embeddings=True),
    "gqa_scaled_rope": replace(BASE, num_kv_heads=2, rope_theta=500000.0, rope_scaling=SCALING),
}


def filled(cfg: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """Builds on the meta device and fills by `initial_std`, as training does."""
    with torch.device("meta"):
        model = build_model(cfg, VOCAB)
    model.to(dtype).to_empty(device="cpu")
    model.init_buffers(torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = model.initial_std(name)
            if std is None:
                # Not ones: a norm weight that is never applied would go unnoticed.
                parameter.normal_(1.0, 0.1, generator=generator)
            else:
                parameter.normal_(0.0, std, generator=generator)
    return model


def tokens_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def difference_to_transformers(cfg: ModelConfig, dtype: torch.dtype) -> tuple[float, float]:
    """Returns the largest absolute difference of the logits on the same weights, and the logits' standard deviation."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    ours = filled(cfg, dtype)
    config = transformers.LlamaConfig(**hf_config(cfg, VOCAB, None, "float32"))
    config._attn_implementation = "sdpa"
    theirs = transformers.LlamaForCausalLM(config).to(dtype)
    loaded = theirs.load_state_dict({hf_name(name): tensor for name, tensor in ours.named_parameters()}, strict=False)
    assert loaded.unexpected_keys == []
    assert loaded.missing_keys == (["lm_head.weight"] if cfg.tie_embeddings else [])
    theirs.tie_weights()
    tokens = tokens_of(2, 384)
    with torch.no_grad():
        logits, expected = ours(tokens), theirs(tokens).logits
    assert logits.dtype == expected.dtype == dtype
    return float((logits - expected).abs().max()), float(expected.std())


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_fp32_logits_equal_those_of_transformers(cfg: ModelConfig) -> None:
    difference, deviation = difference_to_transformers(cfg, torch.float32)
    assert difference <= 1e-5 * deviation


# Transformers rounds to float32 inside its norms whatever the type of the model; ours stay in float64. That rounding is
# the whole difference (next test). A tied head scores the token it reads ten deviations above the rest, and the rounding
# with it, so that in units of the logits' deviation (about 0.2 here) a tied head is at 1.4e-6 and the others below 1e-6.
@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_fp64_logits_equal_those_of_transformers(cfg: ModelConfig) -> None:
    difference, deviation = difference_to_transformers(cfg, torch.float64)
    print(f"largest difference {difference:.2e}, {difference / deviation:.2e} of the logits' standard deviation")
    assert difference <= 1e-6


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_fp64_logits_are_exact_once_transformers_norms_are_in_fp64_too(cfg: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="pip install transformers")

    def forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
        return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))

    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", forward)
    difference, deviation = difference_to_transformers(cfg, torch.float64)
    assert difference <= 1e-12 * deviation


def test_rope_scaling_changes_the_logits() -> None:
    plain, scaled = (filled(replace(BASE, rope_scaling=scaling)) for scaling in (None, SCALING))
    tokens = tokens_of(1, 256)
    with torch.no_grad():
        assert not torch.allclose(plain(tokens), scaled(tokens), atol=1e-3)


@pytest.mark.parametrize("variant", ["mha_tied", "gqa_scaled_rope"])
def test_no_token_sees_a_later_one(variant: str) -> None:
    model = filled(VARIANTS[variant], torch.float64)
    x_BTD = torch.randn(1, 12, BASE.dim, dtype=torch.float64, requires_grad=True)
    position = 5
    out = x_BTD
    for layer in model.layers:
        out = layer(out)
    out[0, position].sum().backward()
    assert x_BTD.grad is not None
    reach = x_BTD.grad[0].abs().amax(dim=-1)
    assert torch.all(reach[: position + 1] > 0)
    assert torch.all(reach[position + 1 :] == 0)


def test_only_distances_between_positions_matter() -> None:
    model, tokens = filled(BASE, torch.float64), tokens_of(2, 32)
    with torch.no_grad():
        start, shifted = model(tokens), model(tokens, torch.arange(32) + 200)
        by_row = model(tokens, torch.stack([torch.arange(32), torch.arange(32) + 200]))
    # The tables are float32, and so are the angles in them.
    torch.testing.assert_close(start, shifted, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_row, torch.stack([start[0], shifted[1]]), rtol=0, atol=1e-12)


def test_forward_is_the_head_applied_to_the_hidden_state() -> None:
    model, tokens = filled(BASE), tokens_of(2, 16)
    assert torch.equal(model(tokens), model.logits(model.hidden(tokens)))


def test_a_tied_head_trains_the_embedding_and_has_no_name_of_its_own() -> None:
    model = filled(VARIANTS["mha_tied"])
    names = set(dict(model.named_parameters(remove_duplicate=False)))
    assert "output.weight" not in names
    assert set(model.state_dict()) == names
    model(tokens_of(1, 8)).logsumexp(-1).sum().backward()
    grad = model.get_parameter("tok_embeddings.weight").grad
    assert grad is not None
    # Rows of tokens that were not in the input get a gradient through the head only.
    assert torch.all(grad.abs().amax(dim=-1) > 0)


def test_norms_and_rope_do_not_lose_precision_in_bf16() -> None:
    model = filled(BASE)
    with torch.device("meta"):
        low = build_model(BASE, VOCAB)
    low.to(torch.bfloat16).to_empty(device="cpu")
    low.init_buffers(torch.device("cpu"))
    rope, norm = low.get_submodule("rope"), low.get_submodule("norm")
    assert {buffer.dtype for buffer in low.buffers()} == {torch.float32}
    x = torch.randn(1, 300, 8, 16, dtype=torch.bfloat16)
    assert torch.equal(rope(x, None), model.get_submodule("rope")(x.float(), None).to(torch.bfloat16))
    norm.load_state_dict({"weight": torch.ones(BASE.dim)})
    wide = 300 * torch.randn(4, BASE.dim, dtype=torch.bfloat16)
    exact = wide.float() * torch.rsqrt(wide.float().square().mean(-1, keepdim=True) + BASE.norm_eps)
    assert torch.equal(norm(wide), exact.to(torch.bfloat16))


def test_building_on_meta_allocates_nothing_and_tables_are_not_saved() -> None:
    with torch.device("meta"):
        model = build_model(BASE, VOCAB)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert set(model.state_dict()) == set(dict(model.named_parameters()))
    direct = build_model(BASE, VOCAB)
    materialised = filled(BASE)
    assert all(torch.equal(a, b) for a, b in zip(direct.buffers(), materialised.buffers(), strict=True))


def test_recomputed_layers_give_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x_BTD = filled(VARIANTS["gqa_untied"], torch.float64), torch.randn(2, 16, BASE.dim, dtype=torch.float64)
    layer = model.layers[0]

    def gradients(recompute: bool) -> list[torch.Tensor]:
        model.zero_grad()
        out = checkpoint(layer, x_BTD, None, use_reentrant=False) if recompute else layer(x_BTD, None)
        out.square().sum().backward()
        return [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == 9
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_projections_into_the_residual_stream_start_smaller_with_depth() -> None:
    with torch.device("meta"):
        model = build_model(replace(BASE, num_layers=8), VOCAB)
    stds = {name: model.initial_std(name) for name, _ in model.named_parameters()}
    assert stds["layers.3.attention.wo.weight"] == stds["layers.3.feed_forward.w2.weight"] == pytest.approx(0.02 / 4)
    assert stds["layers.3.attention.wq.weight"] == stds["tok_embeddings.weight"] == stds["output.weight"] == 0.02
    assert {name for name, std in stds.items() if std is None} == {name for name in stds if "norm" in name}


def test_unknown_architecture_is_refused_with_the_nearest_known() -> None:
    with pytest.raises(ConfigError, match="lama") as caught:
        build_model(replace(BASE, architecture="lama"), VOCAB)
    assert caught.value.fix == "model.architecture=llama"
