"""Families of transformers that see, hear or read pictures: classes, and the settings that make them tiny."""

from typing import Any

from tools.zoo.transformers_text import SIZES, Entry

VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
STAGES = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
PICTURE = {"pixel_values": (2, 3, 32, 32)}
LARGER = {"pixel_values": (2, 3, 64, 64)}
CLIP = {"pixel_values": (2, 3, 32, 32), "input_ids": None}
WAVE = {"input_values": (2, 4000)}
HEARING = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 4, 4], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_length": 2,
}  # fmt: skip
RESNET: Any = ("ResNetConfig", {
    "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
})  # fmt: skip
LAST_OF_RESNET: Any = ("ResNetConfig", {**RESNET[1], "out_features": ["stage4"]})
DETECTOR = {
    "backbone_config": LAST_OF_RESNET, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
    "num_queries": 5, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
TOWERS = {"projection_dim": 16}


def vision(stem: str, head: str = "ForImageClassification", inputs: Any = PICTURE, **more: Any) -> Entry:
    """Return the entry of a vision transformer with patches of one size."""
    return f"{stem}Config", f"{stem}{head}", {**VISION, **more}, inputs


def hearing(stem: str, head: str = "ForSequenceClassification", **more: Any) -> Entry:
    """Return the entry of a model on waveforms."""
    return f"{stem}Config", f"{stem}{head}", {**HEARING, **more}, WAVE


def towers(stem: str, **more: Any) -> Entry:
    """Return the entry of a model with a tower for pictures and one for text."""
    text = {**SIZES, "eos_token_id": 2, "projection_size": 32, "projection_dim": 16}
    vision_settings = {**VISION, "projection_dim": 16}
    return f"{stem}Config", f"{stem}Model", {"text_config": text, "vision_config": vision_settings, **more}, CLIP


SEEING: dict[str, Entry] = {
    "vit": vision("ViT"),
    "deit": vision("DeiT"),
    "beit": vision("Beit", use_relative_position_bias=True, use_mask_token=False),
    "data2vec-vision": vision("Data2VecVision", use_relative_position_bias=True),
    "dinov2": vision("Dinov2"),
    "dinov2_with_registers": vision("Dinov2WithRegisters"),
    "dinov3_vit": vision("DINOv3ViT", "Model"),
    "ijepa": vision("IJepa"),
    "vit_mae": vision("ViTMAE", "ForPreTraining", decoder_hidden_size=16, decoder_num_hidden_layers=1,
                      decoder_num_attention_heads=2, decoder_intermediate_size=32),
    "vit_msn": vision("ViTMSN"),
    "yolos": vision("Yolos", "ForObjectDetection", image_size=[32, 32], num_detection_tokens=4),
    "dpt": vision("DPT", "ForDepthEstimation", num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3],
                  neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, is_hybrid=False),
    "swin": ("SwinConfig", "SwinForImageClassification", STAGES, PICTURE),
    "swinv2": ("Swinv2Config", "Swinv2ForImageClassification", STAGES, PICTURE),
    "swin2sr": ("Swin2SRConfig", "Swin2SRForImageSuperResolution",
                {**STAGES, "image_size": 16, "patch_size": 1, "upscale": 2}, {"pixel_values": (2, 3, 16, 16)}),
    "focalnet": ("FocalNetConfig", "FocalNetForImageClassification",
                 {"embed_dim": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "focal_levels": [2, 2],
                  "focal_windows": [3, 3], "image_size": 32, "patch_size": 2}, PICTURE),
    "convnext": ("ConvNextConfig", "ConvNextForImageClassification",
                 {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}, LARGER),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2ForImageClassification",
                   {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}, LARGER),
    "segformer": ("SegformerConfig", "SegformerForSemanticSegmentation",
                  {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
                   "decoder_hidden_size": 16}, LARGER),
    "glpn": ("GLPNConfig", "GLPNForDepthEstimation",
             {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
              "decoder_hidden_size": 16}, LARGER),
    "pvt": ("PvtConfig", "PvtForImageClassification",
            {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
             "image_size": 64}, LARGER),
    "poolformer": ("PoolFormerConfig", "PoolFormerForImageClassification",
                   {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}, LARGER),
    "cvt": ("CvtConfig", "CvtForImageClassification",
            {"embed_dim": [8, 16, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 4]}, LARGER),
    "levit": ("LevitConfig", "LevitForImageClassification",
              {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
               "key_dim": [8, 8, 8], "image_size": 64, "mlp_ratio": [2, 2, 2],
               "attention_ratio": [2, 2, 2]}, LARGER),
    "mobilevit": ("MobileViTConfig", "MobileViTForImageClassification",
                  {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "image_size": 64},
                  LARGER),
    "mobilenet_v1": ("MobileNetV1Config", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}, LARGER),
    "mobilenet_v2": ("MobileNetV2Config", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25}, LARGER),
    "resnet": ("ResNetConfig", "ResNetForImageClassification", {**RESNET[1], "layer_type": "bottleneck"}, LARGER),
    "regnet": ("RegNetConfig", "RegNetForImageClassification",
               {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
               LARGER),
    "bit": ("BitConfig", "BitForImageClassification",
            {"embedding_size": 32, "hidden_sizes": [32, 64, 64, 128], "depths": [1, 1, 1, 1], "num_groups": 8}, LARGER),
    "efficientnet": ("EfficientNetConfig", "EfficientNetForImageClassification",
                     {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 64},
                     LARGER),
    "hiera": ("HieraConfig", "HieraForImageClassification",
              {"embed_dim": 8, "image_size": [64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}, LARGER),
    "upernet": ("UperNetConfig", "UperNetForSemanticSegmentation",
                {"backbone_config": ("ResNetConfig", {**RESNET[1], "out_features": ["stage1", "stage2", "stage3",
                                                                                    "stage4"]}),
                 "hidden_size": 16, "auxiliary_in_channels": 16, "auxiliary_channels": 8, "pool_scales": [1, 2]},
                LARGER),
    "detr": ("DetrConfig", "DetrForObjectDetection", DETECTOR, LARGER),
    "conditional_detr": ("ConditionalDetrConfig", "ConditionalDetrForObjectDetection", DETECTOR, LARGER),
    "deformable_detr": ("DeformableDetrConfig", "DeformableDetrForObjectDetection",
                        {**DETECTOR, "backbone_config": RESNET, "num_feature_levels": 3}, LARGER),
    "table-transformer": ("TableTransformerConfig", "TableTransformerForObjectDetection", DETECTOR, LARGER),
    "sam": ("SamConfig", "SamModel",
            {"vision_config": {**VISION, "output_channels": 16, "mlp_dim": 64, "window_size": 2, "image_size": 64,
                               "global_attn_indexes": [1], "num_pos_feats": 8},
             "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
             "mask_decoder_config": {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 32,
                                     "iou_head_hidden_dim": 16, "attention_downsample_rate": 2}},
            {"pixel_values": (1, 3, 64, 64), "input_points": (1, 1, 2, 2)}),
    "timesformer": vision("Timesformer", "ForVideoClassification", {"pixel_values": (2, 4, 3, 32, 32)}, num_frames=4),
    "videomae": vision("VideoMAE", "ForVideoClassification", {"pixel_values": (2, 4, 3, 32, 32)}, num_frames=4),
    "vivit": vision("Vivit", "ForVideoClassification", {"pixel_values": (2, 4, 3, 32, 32)}, num_frames=4,
                    tubelet_size=[2, 8, 8]),
}  # fmt: skip

HEARD: dict[str, Entry] = {
    "wav2vec2": hearing("Wav2Vec2"),
    "wav2vec2-conformer": hearing("Wav2Vec2Conformer", "ForCTC"),
    "wav2vec2-bert": ("Wav2Vec2BertConfig", "Wav2Vec2BertForCTC",
                      {**HEARING, "feature_projection_input_dim": 16}, {"input_features": (2, 20, 16)}),
    "hubert": hearing("Hubert"),
    "wavlm": hearing("WavLM"),
    "unispeech": hearing("UniSpeech"),
    "data2vec-audio": hearing("Data2VecAudio"),
    "sew": hearing("SEW", squeeze_factor=2),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration",
                {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                 "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
                 "decoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64,
                 "use_cache": False, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
                 "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
                {"input_features": (2, 8, 40), "decoder_input_ids": None}),
    "speech_to_text": ("Speech2TextConfig", "Speech2TextForConditionalGeneration",
                       {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
                        "decoder_ffn_dim": 64, "input_feat_per_channel": 8, "conv_channels": 16,
                        "max_source_positions": 40, "max_target_positions": 64, "use_cache": False},
                       {"input_features": (2, 40, 8), "decoder_input_ids": None}),
    "audio-spectrogram-transformer": ("ASTConfig", "ASTForAudioClassification",
                                      {**VISION, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 4,
                                       "time_stride": 4}, {"input_values": (2, 32, 16)}),
}  # fmt: skip

JOINED: dict[str, Entry] = {
    "clip": towers("CLIP", **TOWERS),
    "chinese_clip": towers("ChineseCLIP", **TOWERS),
    "siglip": towers("Siglip"),
    "blip": ("BlipConfig", "BlipModel",
             {"text_config": {**SIZES, "encoder_hidden_size": 32}, "vision_config": VISION, **TOWERS}, CLIP),
    "clipseg": ("CLIPSegConfig", "CLIPSegForImageSegmentation",
                {"text_config": {**SIZES, "eos_token_id": 2}, "vision_config": VISION, **TOWERS,
                 "extract_layers": [0, 1], "reduce_dim": 16, "decoder_num_attention_heads": 2,
                 "decoder_intermediate_size": 32, "conditional_layer": 0}, CLIP),
    "owlvit": ("OwlViTConfig", "OwlViTModel",
               {"text_config": {**SIZES, "max_position_embeddings": 16, "eos_token_id": 2}, "vision_config": VISION,
                **TOWERS}, CLIP),
    "git": ("GitConfig", "GitForCausalLM", {**SIZES, "vision_config": VISION, "use_cache": False}, CLIP),
    "vilt": ("ViltConfig", "ViltForQuestionAnswering", {**SIZES, **VISION, "max_image_length": -1}, CLIP),
    "perceiver": ("PerceiverConfig", "PerceiverForMaskedLM",
                  {"vocab_size": 99, "num_latents": 8, "d_latents": 32, "d_model": 16, "num_self_attends_per_block": 2,
                   "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 32, "v_channels": 32,
                   "max_position_embeddings": 16}, {"inputs": None}),
    "decision_transformer": ("DecisionTransformerConfig", "DecisionTransformerModel",
                             {"state_dim": 4, "act_dim": 2, "hidden_size": 32, "n_layer": 2, "n_head": 4,
                              "max_ep_len": 32},
                             {"states": (2, 8, 4), "actions": (2, 8, 2), "rewards": (2, 8, 1),
                              "returns_to_go": (2, 8, 1), "timesteps": (2, 8), "attention_mask": (2, 8)}),
    "patchtst": ("PatchTSTConfig", "PatchTSTForPrediction",
                 {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 16,
                  "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 32, "prediction_length": 4},
                 {"past_values": (2, 32, 2)}),
    "patchtsmixer": ("PatchTSMixerConfig", "PatchTSMixerForPrediction",
                     {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8,
                      "d_model": 16, "num_layers": 2, "prediction_length": 4}, {"past_values": (2, 32, 2)}),
}  # fmt: skip

MEDIA: dict[str, Entry] = {**SEEING, **HEARD, **JOINED}
