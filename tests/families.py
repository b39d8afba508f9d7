"""Families of transformers in small, made from their configurations."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip
EXPERTS = dict(
    num_experts=8, num_local_experts=8, n_routed_experts=8, moe_num_experts=8, num_experts_per_tok=2, moe_k=2,
    moe_topk=2, moe_intermediate_size=16, n_shared_experts=1, shared_expert_intermediate_size=16, n_group=2,
    topk_group=1, first_k_dense_replace=1, decoder_sparse_step=1, moe_layer_start_index=0,
)  # fmt: skip
LATENT = dict(
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4
)
STATES = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
LINEAR = dict(
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=4, linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)  # fmt: skip
CONVOLUTIONS = dict(layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False)

#: model_type -> what its configuration has beside SHAPE and EXPERTS, as far as it knows these
KEEPS_TEXTS_APART = {
    "llama": {},
    "mistral": dict(sliding_window=4),
    "gemma3_text": dict(sliding_window=4),
    "smollm3": {},
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=256, n_inner=48),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, init_std=0.2),
    "falcon": dict(alibi=True),
    "mixtral": {},
    "qwen3_moe": {},
    "deepseek_v2": dict(LATENT, topk_method="group_limited_greedy"),
    "deepseek_v3": LATENT,
    "glm4_moe": {},
    "dots1": {},
    "ernie4_5_moe": dict(moe_layer_end_index=2),
    "hunyuan_v1_moe": {},
    "llama4_text": dict(
        intermediate_size_mlp=48, layer_types=["chunked_attention", "chunked_attention", "full_attention"]
    ),
}
LEAKS = {
    "gpt_oss": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "bloom": dict(n_layer=3, n_head=4),
    "mpt": dict(d_model=32, n_layers=3, n_heads=4),
    "xglm": dict(d_model=32, num_layers=3, attention_heads=4, ffn_dim=48, init_std=0.2),
    "mamba": dict(state_size=8),
    "falcon_mamba": dict(state_size=8),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    "jamba": dict(
        mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "bamba": dict(STATES, attn_layer_indices=[1]),
    "granitemoehybrid": dict(STATES, layer_types=["mamba", "attention", "mamba"], shared_intermediate_size=16),
    "qwen3_next": LINEAR,
    "falcon_h1": dict(STATES, mamba_d_ssm=64),
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": dict(CONVOLUTIONS, num_dense_layers=1),
    "nemotron_h": dict(
        layers_block_type=["mamba", "moe", "attention"], mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8,
        n_groups=1, chunk_size=8, moe_shared_expert_intermediate_size=16,
    ),
    "recurrent_gemma": dict(lru_width=32, attention_window_size=8),
}  # fmt: skip
FAMILIES = KEEPS_TEXTS_APART | LEAKS


def configured(family, **changes):
    own = FAMILIES.get(family, {})
    known = AutoConfig.for_model(family)
    shape = {name: value for name, value in (SHAPE | EXPERTS).items() if hasattr(known, name)}
    if family == "falcon":
        shape.pop("head_dim")  # which it works out
    return AutoConfig.for_model(family, **shape | own | changes)


def made(family, seed=0, dtype=torch.float32, **changes):
    """A model of random weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(configured(family, **changes), dtype=dtype).eval()
    model.config.use_cache = False
    return model
