"""A model as Hugging Face describes it: architecture, config.json, names and shapes of the weights. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from factory_train.config import ModelConfig, RopeScaling
from factory_train.errors import ConfigError

# Architecture: (model_type, bias of queries, keys and values, norms of queries and keys).
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", False, False),
    "Qwen2ForCausalLM": ("qwen2", True, False),
    "Qwen3ForCausalLM": ("qwen3", False, True),
}

_ROOT_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# Switches of config.json that change what is computed, and the only value of each that our model computes.
_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}


def hf_name(name: str) -> str:
    """Returns the Hugging Face name of a parameter: layers.3.attention.wq.weight is model.layers.3.self_attn.q_proj.weight.

    Raises:
        KeyError: it is not a parameter of a Llama.
    """
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{_ROOT_NAMES[module]}.{kind}"
    _, index, inner = module.split(".", 2)
    return f"model.layers.{index}.{_LAYER_NAMES[inner]}.{kind}"


def weight_shapes(cfg: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by our name, without building the model."""
    q_dim, kv_dim = cfg.num_heads * cfg.head_width, cfg.num_kv_heads * cfg.head_width
    layer: dict[str, tuple[int, ...]] = {
        "attention.wq.weight": (q_dim, cfg.dim),
        "attention.wk.weight": (kv_dim, cfg.dim),
        "attention.wv.weight": (kv_dim, cfg.dim),
        "attention.wo.weight": (cfg.dim, q_dim),
        "feed_forward.w1.weight": (cfg.ffn_dim, cfg.dim),
        "feed_forward.w3.weight": (cfg.ffn_dim, cfg.dim),
        "feed_forward.w2.weight": (cfg.dim, cfg.ffn_dim),
        "attention_norm.weight": (cfg.dim,),
        "ffn_norm.weight": (cfg.dim,),
    }
    if cfg.qkv_bias:
        layer |= {"attention.wq.bias": (q_dim,), "attention.wk.bias": (kv_dim,), "attention.wv.bias": (kv_dim,)}
    if cfg.qk_norm:
        layer |= {"attention.q_norm.weight": (cfg.head_width,), "attention.k_norm.weight": (cfg.head_width,)}
    shapes = {f"layers.{index}.{name}": shape for index in range(cfg.num_layers) for name, shape in layer.items()}
    shapes |= {"tok_embeddings.weight": (vocab_size, cfg.dim), "norm.weight": (cfg.dim,)}
    return shapes if cfg.tie_embeddings else shapes | {"output.weight": (vocab_size, cfg.dim)}


def hf_config(cfg: ModelConfig, vocab_size: int, eos_id: int | None, dtype: str) -> dict[str, Any]:
    """Returns the contents of config.json.

    Transformers 4 reads `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5 reads `rope_parameters` and
    `dtype`; both are written, saying the same.

    Args:
        cfg: the model section.
        vocab_size: rows of the embedding.
        eos_id: id of the end-of-text token, if there is one.
        dtype: "float32", "bfloat16" or "float64".

    Raises:
        ConfigError: no Hugging Face architecture is this model.
    """
    architecture, model_type = _architecture_of(cfg)
    scaling: dict[str, Any] | None = None
    if cfg.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": cfg.rope_scaling.factor,
            "low_freq_factor": cfg.rope_scaling.low_freq_factor,
            "high_freq_factor": cfg.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": cfg.rope_scaling.original_max_seq_len,
        }
    switches: dict[str, Any] = {
        "llama": {"attention_bias": False, "mlp_bias": False},
        # Their bias is not a switch: Qwen2 always has it.
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"attention_bias": False, "use_sliding_window": False},
    }[model_type]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": cfg.dim,
        "intermediate_size": cfg.ffn_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_seq_len,
        "initializer_range": cfg.init_std,
        "rms_norm_eps": cfg.norm_eps,
        **switches,
        "attention_dropout": 0.0,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **(scaling or {"rope_type": "default"})},
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _architecture_of(cfg: ModelConfig) -> tuple[str, str]:
    for architecture, (model_type, qkv_bias, qk_norm) in ARCHITECTURES.items():
        if (cfg.qkv_bias, cfg.qk_norm) == (qkv_bias, qk_norm):
            return architecture, model_type
    raise ConfigError(
        "no Hugging Face architecture has a bias of queries, keys and values, and norms of them too",
        where="model.qkv_bias",
        fix="the weights stay in the run's checkpoints; train with model.qkv_bias=false or model.qk_norm=false to export",
    )


def model_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Returns the model section that a config.json describes, `vocab_size` and `head_dim` spelled out.

    Args:
        values: contents of config.json, of transformers 4 or 5. What is left out has the value of the class of its model.
        where: the file, for messages.

    Raises:
        ConfigError: it is of an architecture, or has a switch, that is not supported; or a value is missing or of another type.
    """
    architectures = values.get("architectures") or []
    supported = [name for name in architectures if name in ARCHITECTURES]
    if not supported:
        raise ConfigError(
            f"the architecture is {', '.join(map(str, architectures)) or 'not stated'}; supported are {', '.join(ARCHITECTURES)}",
            where=where,
            fix="start from a folder of a supported architecture",
        )
    model_type, qkv_bias, qk_norm = ARCHITECTURES[supported[0]]
    for key, only in _ONLY.items():
        if values.get(key, only) not in (only, None):
            raise _unsupported(f"{key} is {json.dumps(values[key])}, and only {json.dumps(only)} is supported", where)
    if values.get("quantization_config"):
        raise _unsupported("the weights are quantised", where)
    others = sorted(set(values.get("layer_types") or ()) - {"full_attention"})
    if others:
        raise _unsupported(f"layers have {', '.join(others)}, and only full_attention is supported", where)

    def number(key: str, kind: type, default: float | None = None) -> Any:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int) or value <= 0:
            state = "is missing" if value is None else f"is {value!r}, not a positive {'number' if kind is float else 'integer'}"
            raise ConfigError(f"{key} {state}", where=where, fix="download config.json again")
        return kind(value)

    dim, num_heads = number("hidden_size", int), number("num_attention_heads", int)
    theta, scaling = _rope(values, where)
    return ModelConfig(
        name=model_type,
        architecture="llama",
        vocab_size=number("vocab_size", int),
        dim=dim,
        num_layers=number("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=number("num_key_value_heads", int, num_heads),
        head_dim=number("head_dim", int, 128 if model_type == "qwen3" else dim // num_heads),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        ffn_dim=number("intermediate_size", int),
        max_seq_len=number("max_position_embeddings", int, 2048 if model_type == "llama" else 32768),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=number("rms_norm_eps", float, 1e-6),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        init_std=number("initializer_range", float, 0.02),
    )


def _rope(values: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Returns base and scaling of the rotary embedding, which transformers 5 keeps in one mapping and 4 in two keys."""
    rope: dict[str, Any] = {"rope_theta": values.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        part = values.get(key) or {}
        if not isinstance(part, Mapping):
            raise ConfigError(f"{key} is {json.dumps(part)}, not a mapping", where=where, fix="download config.json again")
        rope |= part
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise _unsupported(f"rotary embeddings are scaled by {kind!r}, and only 'llama3' is supported", where)
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported("only a part of each head is rotated", where)
    try:
        theta = 10000.0 if rope["rope_theta"] is None else float(rope["rope_theta"])
        if kind == "default":
            return theta, None
        return theta, RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_seq_len=int(rope["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the rotary settings cannot be read ({error!r})", where=where, fix="download config.json again") from None


def _unsupported(what: str, where: str) -> ConfigError:
    return ConfigError(f"not a model that can be computed here: {what}", where=where, fix="start from another model's folder")
