"""The architecture families of timm: the smallest member of each, on images as small as it takes.

A family is a file of timm and the leading letters of an architecture in it: `byobnet` has `gernet`, `repvgg`, others.
All families of timm 1.0.31 are here, except the `test_*` ones: miniatures of others, made for timm's own tests.
"""

from functools import partial

import timm
import torch

from tools.zoo.examples import Example, Library

CLASSES = 5
SIZE = 64

ANY_SIZE = """
    caformer_s18 convformer_s18 convmixer_768_32 convnext_zepto_rms convnextv2_atto cpubone_nano
    crossvit_tiny_240 cs3darknet_focus_s csatv2 cspdarknet53 cspnext_tiny cspresnet50 cspresnext50 darknet17
    darknetaa53 davit_tiny densenet121 densenetblur121d dla46x_c dm_nfnet_f0 dpn48b eca_nfnet_l0 eca_resnext26ts
    eca_vovnet39b ecaresnet26t ecaresnetlight ecaresnext26t_32x4d edgenext_xx_small efficientnet_lite0
    efficientnetv2_rw_t efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw fasternet_t0
    fastvit_t8 fbnetc_100 fbnetv3_b focalnet_tiny_srf gc_efficientnetv2_rw_t gcresnet33ts gcresnext26ts
    gemma4_vit_167m gernet_s ghostnet_050 ghostnetv3_050 hardcorenas_b hgnet_tiny hgnetv2_b0 hieradet_small
    hrnet_w18_small iformer_t inception_next_atto lambda_resnet26t lcnet_035 lcnetv2_small legacy_seresnet18
    legacy_xception lowformer_b0 mambaout_femto mixnet_s mnasnet_small mobilenet_edgetpu_100 mobilenetv2_035
    mobilenetv3_small_050 mobilenetv5_base mobileone_s1 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
    naflexvit_base_patch16_parfac_gap nasnetalarge nextvit_small nf_regnet_b0 nfnet_l0 pnasnet5large
    poolformer_s12 poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetv_040 regnetx_002 regnety_002
    regnetz_005 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m1 res2next50 resnest14d resnet10t resnet32ts
    resnetaa34d resnetblur18 resnetrs50 resnetv2_18 resnext26ts resnext50_32x4d rexnet_100 rexnetr_100
    sam2_hiera_tiny samvit_base_patch16_224 sedarknet21 selecsls42 semnasnet_050 senet154 sequencer2d_s
    seresnet18 seresnet33ts seresnetaa50d seresnext26t_32x4d seresnext26ts seresnextaa101d_32x8d shvit_s1
    skresnet18 skresnext50_32x4d spnasnet_100 starnet_s050 swiftformer_xs tf_mixnet_s tf_mobilenetv3_small_075
    tiny_vit_5m_224 tinynet_e tresnet_m twins_svt_small vgg11 vit_tiny_patch16_dinov3_qkvb vovnet39a
    wide_resnet50_2 xception41p xcit_nano_12_p8_224
"""

TOLD_ITS_SIZE = """
    aimv2_large_patch14_224 beit3_base_patch16_224 beit_base_patch16_224 beitv2_base_patch16_224 botnet26t_256
    cait_xxs24_224 coat_tiny coatnet_pico_rw_224 coatnext_nano_rw_224 convit_tiny deit_tiny_patch16_224
    eca_botnext26ts_256 efficientformerv2_s0 eva02_tiny_patch14_224 eva_large_patch14_196 flexivit_small
    gcvit_xxtiny gmixer_12_224 gmlp_ti16_224 hiera_tiny_224 levit_128s maxvit_pico_rw_256
    maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 mixer_s16_224 nest_tiny pit_ti_224 resmlp_12_224
    sebotnet33ts_256 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window16_256
    tnt_s_legacy_patch16_224 visformer_tiny vit_srelpos_small_patch16_224 vit_tiny_patch16_224
    vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
"""

OTHER_SIZES = {  # windows, blocks, patches or position embeddings that 64 pixels do not suit
    "bat_resnext26ts": (256, False),
    "deepseek_vit_412m": (56, False),
    "efficientformer_l1": (224, False),
    "halo2botnet50ts_256": (128, True),
    "halonet_h1": (256, False),
    "haloregnetz_b": (224, False),
    "inception_resnet_v2": (96, False),
    "inception_v3": (96, False),
    "inception_v4": (96, False),
    "lamhalobotnet50ts_256": (128, True),
    "sehalonet33ts": (256, False),
}


def library() -> Library:
    """Return one model of each family; those that this version of timm does not have are skipped."""
    sized = dict.fromkeys(ANY_SIZE.split(), (SIZE, False)) | dict.fromkeys(TOLD_ITS_SIZE.split(), (SIZE, True))
    entries = sized | OTHER_SIZES
    known = set(timm.list_models())
    models = {name: partial(_build, name, *entry) for name, entry in sorted(entries.items()) if name in known}
    missing = dict.fromkeys(sorted(entries.keys() - known), f"timm {timm.__version__} does not have it")
    return Library("timm", models, missing, ("torch", "timm"))


def _build(name: str, size: int, told: bool) -> Example:
    """Return the model for images of a size, which it is told if its parameters depend on it."""
    given = {"img_size": size} if told else {}
    model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **given)
    return Example(model, (torch.randn(2, 3, size, size),))
