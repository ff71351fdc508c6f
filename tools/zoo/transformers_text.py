"""Families of transformers that read text: classes, and the settings that make them tiny."""

from typing import Any

Entry = tuple[Any, ...]  # the arguments of a Family

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False, "pad_token_id": 0}
MASKED = {"input_ids": None, "attention_mask": None}
IDS = {"input_ids": None}
PAIR = {"input_ids": None, "decoder_input_ids": None}
SEQUENCES = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "use_cache": False,
}
T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "use_cache": False, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False}
MOE = {**DECODER, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def encoder(stem: str, head: str = "SequenceClassification", inputs: dict[str, Any] = MASKED, **more: Any) -> Entry:
    """Return the entry of an encoder."""
    return f"{stem}Config", f"{stem}For{head}", {**SIZES, **more}, inputs


def decoder(stem: str, head: str = "ForCausalLM", **more: Any) -> Entry:
    """Return the entry of a decoder with rotary positions."""
    return f"{stem}Config", f"{stem}{head}", {**DECODER, **more}, IDS


def pair(stem: str, head: str = "ForConditionalGeneration", base: dict[str, Any] = SEQUENCES, **more: Any) -> Entry:
    """Return the entry of an encoder with a decoder."""
    return f"{stem}Config", f"{stem}{head}", {**base, **more}, PAIR


ENCODERS: dict[str, Entry] = {
    "bert": encoder("Bert"),
    "roberta": encoder("Roberta"),
    "xlm-roberta": encoder("XLMRoberta", "MaskedLM"),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification",
                   {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, MASKED),
    "albert": encoder("Albert", embedding_size=16),
    "deberta": encoder("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=32),
    "deberta-v2": encoder("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
    "electra": encoder("Electra", embedding_size=16),
    "mobilebert": encoder("MobileBert", embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16),
    "longformer": encoder("Longformer", attention_window=[8, 8]),
    "big_bird": encoder("BigBird", attention_type="original_full"),
    "camembert": encoder("Camembert", "TokenClassification"),
    "convbert": encoder("ConvBert", embedding_size=16),
    "ernie": encoder("Ernie"),
    "esm": encoder("Esm", "MaskedLM", position_embedding_type="rotary", pad_token_id=1, mask_token_id=4),
    "fnet": encoder("FNet", "SequenceClassification", IDS),
    "funnel": ("FunnelConfig", "FunnelForSequenceClassification",
               {"vocab_size": 99, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1],
                "num_decoder_layers": 1}, MASKED),
    "ibert": encoder("IBert"),
    "layoutlm": encoder("LayoutLM", inputs={"input_ids": None, "bbox": (2, 16, 4)}),
    "megatron-bert": encoder("MegatronBert"),
    "modernbert": encoder("ModernBert", "MaskedLM", pad_token_id=0, global_attn_every_n_layers=2, local_attention=8),
    "mpnet": encoder("MPNet"),
    "nystromformer": encoder("Nystromformer", segment_means_seq_len=16, num_landmarks=4),
    "rembert": encoder("RemBert", input_embedding_size=16, output_embedding_size=24),
    "roformer": encoder("RoFormer"),
    "splinter": encoder("Splinter", "QuestionAnswering"),
    "squeezebert": encoder("SqueezeBert", embedding_size=32),
    "xlm": ("XLMConfig", "XLMForSequenceClassification",
            {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}, MASKED),
    "xlnet": ("XLNetConfig", "XLNetForSequenceClassification",
              {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, MASKED),
    "canine": encoder("Canine", local_transformer_stride=4, downsampling_rate=4, num_hash_buckets=64),
}  # fmt: skip

DECODERS: dict[str, Entry] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2, MASKED),
    "openai-gpt": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", GPT2, MASKED),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT2, IDS),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**GPT2, "rotary_dim": 4}, IDS),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**GPT2, "rotary_dim": 4}, IDS),
    "ctrl": ("CTRLConfig", "CTRLLMHeadModel", {**GPT2, "dff": 64}, IDS),
    "gpt_neo": ("GPTNeoConfig", "GPTNeoForCausalLM",
                {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
                 "attention_types": [[["global", "local"], 1]], "window_size": 8, "use_cache": False}, IDS),
    "gpt_neox": decoder("GPTNeoX"),
    "opt": ("OPTConfig", "OPTForCausalLM",
            {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16, "pad_token_id": 1, "use_cache": False}, MASKED),
    "bloom": ("BloomConfig", "BloomForCausalLM",
              {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False}, MASKED),
    "llama": decoder("Llama"),
    "mistral": decoder("Mistral", sliding_window=8),
    "qwen2": decoder("Qwen2"),
    "qwen3": decoder("Qwen3"),
    "gemma": decoder("Gemma"),
    "gemma2": decoder("Gemma2", sliding_window=8),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM",
              {**DECODER, "sliding_window": 8}, IDS),
    "phi": decoder("Phi"),
    "phi3": decoder("Phi3"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", MOE, IDS),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 32}, IDS),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", MOE, IDS),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**SIZES, "use_cache": False}, IDS),
    "mpt": ("MptConfig", "MptForCausalLM",
            {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "use_cache": False}, IDS),
    "mamba": ("MambaConfig", "MambaForCausalLM",
              {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "use_cache": False}, IDS),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM",
               {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8,
                "head_dim": 8, "n_groups": 1, "chunk_size": 8, "use_cache": False}, IDS),
    "recurrent_gemma": decoder("RecurrentGemma", lru_width=32, attention_window_size=8, num_hidden_layers=3,
                               block_types=["recurrent", "recurrent", "attention"]),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM",
             {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64, "use_cache": False},
             IDS),
    "stablelm": decoder("StableLm"),
    "starcoder2": decoder("Starcoder2"),
    "olmo": decoder("Olmo"),
    "olmo2": decoder("Olmo2"),
    "granite": decoder("Granite"),
    "cohere": decoder("Cohere"),
    "glm": decoder("Glm"),
    "nemotron": decoder("Nemotron"),
    "persimmon": decoder("Persimmon"),
    "smollm3": decoder("SmolLM3"),
    "biogpt": ("BioGptConfig", "BioGptForCausalLM", {**SIZES, "pad_token_id": 1, "use_cache": False}, IDS),
    "xglm": ("XGLMConfig", "XGLMForCausalLM",
             {"vocab_size": 99, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64,
              "max_position_embeddings": 64, "use_cache": False}, IDS),
    "deepseek_v3": decoder("DeepseekV3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                           qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
                           topk_group=1, first_k_dense_replace=1, moe_intermediate_size=32),
}  # fmt: skip

PAIRS: dict[str, Entry] = {
    "t5": pair("T5", base=T5),
    "mt5": pair("MT5", base=T5),
    "umt5": pair("UMT5", base=T5),
    "longt5": pair("LongT5", base=T5, encoder_attention_type="local", local_radius=4),
    "switch_transformers": pair("SwitchTransformers", base=T5, num_experts=4, num_sparse_encoder_layers=1,
                                num_sparse_decoder_layers=1),
    "bart": pair("Bart"),
    "mbart": pair("MBart"),
    "pegasus": pair("Pegasus"),
    "pegasus_x": pair("PegasusX", num_global_tokens=4, block_size=8),
    "marian": pair("Marian", "MTModel", decoder_start_token_id=1),
    "blenderbot": pair("Blenderbot"),
    "m2m_100": pair("M2M100"),
    "led": pair("LED", attention_window=[8, 8], max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    "prophetnet": ("ProphetNetConfig", "ProphetNetForConditionalGeneration",
                   {"vocab_size": 99, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2,
                    "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64,
                    "decoder_ffn_dim": 64, "max_position_embeddings": 64, "ngram": 2, "use_cache": False}, PAIR),
}  # fmt: skip

TEXT: dict[str, Entry] = {**ENCODERS, **DECODERS, **PAIRS}
