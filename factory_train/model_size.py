"""How large a model is: parameters and FLOPs, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from factory_train.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Args:
        total: all there are; a tied head has none of its own.
        matmul: those a token is multiplied by: the layers' matrices and the head, counted also when it is tied.
        embedding: the input embedding.
        layer: one layer, norms included.
        root: what is outside of the layers: embedding, last norm, and the head unless it is tied.
    """

    total: int
    matmul: int
    embedding: int
    layer: int
    root: int

    @property
    def layer_matrices(self) -> int:
        """Those in matrices of the layers."""
        return self.matmul - self.embedding


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCount:
    """Counts the parameters of a model without building it."""
    q_dim, kv_dim = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
    layer_matmul = 2 * model.dim * (q_dim + kv_dim) + 3 * model.dim * model.ffn_dim
    biases = q_dim + 2 * kv_dim if model.qkv_bias else 0
    head_norms = 2 * model.head_width if model.qk_norm else 0
    layer = layer_matmul + biases + head_norms + 2 * model.dim
    table = vocab_size * model.dim
    root = table + model.dim + (0 if model.tie_embeddings else table)
    return ParameterCount(model.num_layers * layer + root, model.num_layers * layer_matmul + table, table, layer, root)


def flops_per_token(model: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Returns the FLOPs of training on one token, forward and backward: 6 N_matmul + 12 L h d s.

    This is the one definition behind every TFLOP/s and MFU that is printed (Chowdhery et al. 2022, arXiv 2204.02311,
    appendix B):

    - 6 N_matmul: a multiplication and an addition with each matmul parameter, once forward and twice backward. The
      output head is counted, also when it is tied to the embedding; the input embedding is a look-up and is not.
    - 12 L h d s, with L layers of h query heads of width d and s tokens in a row: scores and weighted values, each
      2 h d s forward and twice that backward. Attention is not halved for being causal.
    - Recomputation by activation checkpointing is not counted: MFU, not hardware utilisation.

    MFU = FLOPs per token x tokens per second / (devices x dense bf16 peak of one), and is stated only where that peak
    is known.
    """
    attention = 12.0 * model.num_layers * model.num_heads * model.head_width * seq_len
    return 6.0 * count_parameters(model, vocab_size).matmul + attention
