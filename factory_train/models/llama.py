"""The Llama family of decoders (Touvron et al. 2023, arXiv 2302.13971; Llama 3: arXiv 2407.21783), Qwen2 and Qwen3 included.

Shapes: B batch, T tokens, D model width, H query heads, K key and value heads, E width of a head, F feed-forward width,
V vocabulary; 1 is one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factory_train.config import ModelConfig, RopeScaling
from factory_train.models.language_model import LanguageModel


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Returns the angle per position of each pair of channels, (E/2,), in float32 on the CPU.

    Rotary embeddings: Su et al. 2021, arXiv 2104.09864. Scaling as in Llama 3.1: wavelengths beyond the original context
    are stretched by `factor`, short ones left alone, those between interpolated.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    turns_in_context = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    keep = (turns_in_context - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def document_mask(positions_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what is added to attention scores so that each token sees its own document up to itself: 0 or -inf, (B, 1, T, T).

    A position that is not one more than that before it begins a document. In the type of the queries, since attention
    would otherwise convert it, and keep the result for the backward pass, once a layer.
    """
    document_BT = F.pad((positions_BT.diff(dim=-1) != 1).cumsum(dim=-1), (1, 0))
    visible_BTT = (document_BT[:, :, None] == document_BT[:, None, :]).tril()
    return torch.zeros(visible_BTT.shape, dtype=dtype, device=positions_BT.device).masked_fill_(~visible_BTT, -torch.inf).unsqueeze(1)


class RotaryEmbedding(nn.Module):
    """Turns query and key channels by their position: channel i is paired with i + E/2, the pairing of the HF weights.

    One instance is shared by all layers. The tables are looked up here instead of being passed to the layers as inputs,
    since FSDP2's mixed precision would cast inputs to bf16.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        self.head_dim, self.max_seq_len, self.theta, self.scaling = head_dim, max_seq_len, theta, scaling
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(max_seq_len, head_dim // 2, dtype=torch.float32), persistent=False)

    def init_buffers(self, device: torch.device) -> None:
        """Fills the tables. They are computed on the CPU, so that every device turns by the very same angles."""
        frequencies = rope_frequencies(self.head_dim, self.theta, self.scaling)
        angles = torch.outer(torch.arange(self.max_seq_len, dtype=torch.float32, device="cpu"), frequencies)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def forward(self, x_BTHE: Tensor, positions: Tensor | None) -> Tensor:
        dtype = torch.promote_types(x_BTHE.dtype, torch.float32)
        rows = slice(x_BTHE.shape[1]) if positions is None else positions
        cos, sin = self.cos[rows].to(dtype).unsqueeze(-2), self.sin[rows].to(dtype).unsqueeze(-2)
        first, second = x_BTHE.to(dtype).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHE.dtype)


class RMSNorm(nn.Module):
    """Divides by the root mean square (Zhang & Sennrich 2019, arXiv 1910.07467), in at least float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        # Under autocast queries and keys come in bf16 and their norms' weights do not; the fused kernel wants one type.
        return F.rms_norm(x_BTD, self.weight.shape, self.weight.to(x_BTD.dtype), self.eps)


class Attention(nn.Module):
    """Causal attention in which groups of query heads share a key and a value head (GQA: arXiv 2305.13245).

    Queries, keys and values may have a bias (Qwen2: arXiv 2407.10671); queries and keys may be normalised head by head
    (Qwen3: arXiv 2505.09388).
    """

    def __init__(self, cfg: ModelConfig, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.head_dim = cfg.head_width
        self.group_size = cfg.num_heads // cfg.num_kv_heads
        self.rope = rope
        self.wq = nn.Linear(cfg.dim, cfg.num_heads * self.head_dim, bias=cfg.qkv_bias)
        self.wk = nn.Linear(cfg.dim, cfg.num_kv_heads * self.head_dim, bias=cfg.qkv_bias)
        self.wv = nn.Linear(cfg.dim, cfg.num_kv_heads * self.head_dim, bias=cfg.qkv_bias)
        self.wo = nn.Linear(cfg.num_heads * self.head_dim, cfg.dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, positions: Tensor | None, mask_B1TT: Tensor | None = None) -> Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BHTE = self.rope(self.q_norm(self.wq(x_BTD).view(heads)), positions).transpose(1, 2)
        k_BKTE = self.rope(self.k_norm(self.wk(x_BTD).view(heads)), positions).transpose(1, 2)
        v_BKTE = self.wv(x_BTD).view(heads).transpose(1, 2)
        shared = self.group_size > 1
        # On CUDA only the half-precision kernel without a mask knows groups: others would fall back to one that stores T x T scores.
        if shared and q_BHTE.is_cuda and (mask_B1TT is not None or q_BHTE.dtype not in (torch.bfloat16, torch.float16)):
            k_BKTE, v_BKTE = (x.repeat_interleave(self.group_size, dim=1) for x in (k_BKTE, v_BKTE))
            shared = False
        out_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BKTE, v_BKTE, attn_mask=mask_B1TT, is_causal=mask_B1TT is None, enable_gqa=shared
        )
        return self.wo(out_BHTE.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class LlamaBlock(nn.Module):
    """One layer: attention and feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, cfg: ModelConfig, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attention = Attention(cfg, rope)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.feed_forward = FeedForward(cfg.dim, cfg.ffn_dim)

    def forward(self, x_BTD: Tensor, positions: Tensor | None = None, mask_B1TT: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), positions, mask_B1TT)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


class Llama(LanguageModel):
    """A Llama decoder.

    A tied head is the embedding's own parameter, used twice by the root: there is no second name for it that sharding,
    `to_empty` or a state dict could take apart.
    """

    def __init__(self, cfg: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.max_seq_len, self.init_std = cfg.max_seq_len, cfg.init_std
        self.tok_embeddings = nn.Embedding(vocab_size, cfg.dim)
        self.rope = RotaryEmbedding(cfg.head_width, cfg.max_seq_len, cfg.rope_theta, cfg.rope_scaling)
        self.layers = nn.ModuleList(LlamaBlock(cfg, self.rope) for _ in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = None if cfg.tie_embeddings else nn.Linear(cfg.dim, vocab_size, bias=False)
        if not self.rope.cos.is_meta:
            self.init_buffers(self.rope.cos.device)

    def hidden(self, tokens_BT: Tensor, positions: Tensor | None = None) -> Tensor:
        assert tokens_BT.shape[1] <= self.max_seq_len, f"{tokens_BT.shape[1]} tokens, but max_seq_len is {self.max_seq_len}"
        x_BTD = self.tok_embeddings(tokens_BT)
        of_layer: tuple[Tensor | None, ...] = (positions,)
        if positions is not None and positions.dim() == 2:
            device = x_BTD.device.type
            computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BTD.dtype
            of_layer = (positions, document_mask(positions, computed))
        for layer in self.layers:
            x_BTD = layer(x_BTD, *of_layer)
        return self.norm(x_BTD)

    def logits(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD, self.head_weight())

    def head_weight(self) -> Tensor:
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def init_buffers(self, device: torch.device) -> None:
        self.rope.init_buffers(device)

    def initial_std(self, name: str) -> float | None:
        if name.endswith("norm.weight"):
            return None
        if name.endswith(".bias"):
            return 0.0
        # What is added to the residual stream starts smaller with depth, so that its variance does not grow (GPT-2, section 2.3).
        into_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
        return self.init_std / math.sqrt(2 * len(self.layers)) if into_residual else self.init_std
