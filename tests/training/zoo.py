"""Tiny models of families with experts, state spaces, chunks and attention of their own; all with teeth.

Weights have a standard deviation of 0.3, windows and chunks are 8 long, soft caps 0.5: a leak shows.
"""

from __future__ import annotations

import torch
import transformers as t

VOCABULARY, WINDOW = 64, 8
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
OWN = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
       "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2}
NARROW = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
STATES = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}

CONFIGS = {
    "mixtral": lambda: t.MixtralConfig(**COMMON, **EXPERTS, num_local_experts=4, sliding_window=WINDOW),
    "olmoe": lambda: t.OlmoeConfig(**COMMON, **EXPERTS, num_experts=4),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(**COMMON, **EXPERTS, **NARROW, num_experts=4),
    "qwen2_moe_window": lambda: t.Qwen2MoeConfig(
        **COMMON, **EXPERTS, **NARROW, num_experts=4,
        use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2,
    ),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(
        **COMMON, **EXPERTS, num_experts=4, moe_intermediate_size=24, head_dim=8
    ),
    "gpt_oss": lambda: t.GptOssConfig(
        **COMMON, **EXPERTS, num_local_experts=4, head_dim=8, sliding_window=WINDOW, rope_scaling=None
    ),
    "deepseek_v3": lambda: t.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4}, **EXPERTS, moe_intermediate_size=24, n_routed_experts=4,
        n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ),
    "olmo3": lambda: t.Olmo3Config(**COMMON, sliding_window=WINDOW),
    "cohere2": lambda: t.Cohere2Config(**COMMON, sliding_window=WINDOW),
    "phimoe": lambda: t.PhimoeConfig(
        **COMMON, **EXPERTS, num_local_experts=4, sliding_window=WINDOW, rope_scaling=None
    ),
    "llama4": lambda: t.Llama4TextConfig(
        **COMMON, num_experts_per_tok=1, num_local_experts=4, head_dim=8, attention_chunk_size=8,
        intermediate_size_mlp=48,
    ),
    "jamba": lambda: t.JambaConfig(
        **COMMON, **EXPERTS, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4,
    ),
    "falcon_h1": lambda: t.FalconH1Config(
        **COMMON, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
    ),
    "bamba": lambda: t.BambaConfig(**COMMON, **STATES, attn_layer_indices=[1]),
    "granitemoehybrid": lambda: t.GraniteMoeHybridConfig(
        **COMMON, **EXPERTS, **STATES, num_local_experts=4, shared_intermediate_size=24,
        layer_types=["mamba", "attention"],
    ),
    "lfm2": lambda: t.Lfm2Config(**COMMON, layer_types=["conv", "full_attention"]),
    "qwen3_next": lambda: t.Qwen3NextConfig(
        **COMMON, **EXPERTS, **NARROW, num_experts=4, head_dim=8, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "recurrent_gemma": lambda: t.RecurrentGemmaConfig(
        **{**COMMON, "num_hidden_layers": 3, "num_key_value_heads": 1}, lru_width=32, attention_window_size=WINDOW
    ),
    "mamba": lambda: t.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": lambda: t.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8,
        n_groups=1, chunk_size=8,
    ),
    "falcon": lambda: t.FalconConfig(**OWN, alibi=False, max_position_embeddings=256),
    "falcon_alibi": lambda: t.FalconConfig(**OWN, alibi=True, max_position_embeddings=256),
    "bloom": lambda: t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "gptj": lambda: t.GPTJConfig(
        vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=0,
        eos_token_id=0,
    ),
    "gpt_neo": lambda: t.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, window_size=WINDOW, bos_token_id=0,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=256, eos_token_id=0,
    ),
    "gemma2": lambda: t.Gemma2Config(
        **COMMON, sliding_window=WINDOW, query_pre_attn_scalar=8, head_dim=8, attn_logit_softcapping=0.5,
        final_logit_softcapping=0.5,
    ),
}  # fmt: skip

FLATTENED = [
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmo3", "cohere2", "gemma2",
]  # fmt: skip
PADDED = {
    "phimoe": "sliding window", "qwen2_moe_window": "sliding window",  # they carry it in the mask alone
    "llama4": "chunked",
    "jamba": "differ", "falcon_h1": "differ", "bamba": "differ", "granitemoehybrid": "differ", "lfm2": "differ",
    "qwen3_next": "differ", "recurrent_gemma": "differ",
    "mamba": "don't", "mamba2": "don't", "falcon": "don't", "falcon_alibi": "don't", "bloom": "don't",
    "gptj": "don't", "gpt_neo": "don't",
}  # fmt: skip
"""What is wrong with flattened rows, as the message says it."""


def model(name: str, **changes: object):
    """A model of this family in training mode, with the same weights each time."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    made = t.AutoModelForCausalLM.from_config(config)
    for key, parameter in made.named_parameters():
        if parameter.ndim > 1 and "A_log" not in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.train()


def examples(lengths: tuple[int, ...] = (29, 7, 40)):
    """Rows of random ids, some of them longer than three windows; the second half of each is trained."""
    import numpy as np

    from lightning_sft.conversation import Meta
    from lightning_sft.example import Example

    made = []
    for number, length in enumerate(lengths, start=1):
        ids = np.random.default_rng(number).integers(1, VOCABULARY, length).astype(np.int32)
        weights = np.where(np.arange(length) < length // 2, 0.0, 1.0).astype(np.float32)
        made.append(Example(ids, weights, np.zeros(length, np.uint8), Meta(source="rows.jsonl", row=number)))
    return made
