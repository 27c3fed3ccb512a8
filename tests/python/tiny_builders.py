"""Builders of tiny pipelines of diffusers: the real classes, random weights, no download."""

from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDTH = 16  # of every text embedding
TOKENS = 7


def ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        **BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(make: type[nn.Module], last: str = "", **settings: Any) -> Any:
    """A model with the same weights every time, and a louder last layer: prompts then differ."""
    torch.manual_seed(0)
    model = make(**settings).eval()
    for parameter in model.parameters():  # blocks that begin as the identity would hide bugs
        if not parameter.any() and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    if last:
        model.get_submodule(last).weight.data.mul_(4)
    return model


# -- UNets --------------------------------------------------------------------------------------

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 12,
}
UNET_3D: dict[str, Any] = {
    **UNET,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}


def tiny_unet(**settings: Any) -> nn.Module:
    return seeded(diffusers.UNet2DConditionModel, "conv_out", **UNET, **BLOCKS, **settings)


def tiny_controlnet() -> nn.Module:
    return seeded(
        diffusers.ControlNetModel,
        **{name: value for name, value in UNET.items() if name != "sample_size"},
        down_block_types=BLOCKS["down_block_types"],
        conditioning_embedding_out_channels=(8,),  # pictures of the size of the latents
    )


def tiny_stable_diffusion(kind: str = "", controlnet: Any = None, **unet: Any) -> Any:
    """Stable Diffusion: "", "Img2Img", "Inpaint", "ControlNet" or "ControlNetImg2Img"."""
    extra = {} if controlnet is None else {"controlnet": controlnet}
    return quiet(
        getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
            vae=tiny_vae() if kind else None,
            text_encoder=None,
            tokenizer=None,
            unet=tiny_unet(**unet),
            scheduler=ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **extra,
        )
    )


def tiny_sdxl(kind: str = "") -> Any:
    """Stable Diffusion XL: "" or "Img2Img"."""
    return quiet(
        getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")(
            vae=tiny_vae() if kind else None,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=tiny_unet(**TEXT_TIME),
            scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
            add_watermarker=False,
        )
    )


def tiny_text_to_video() -> Any:
    unet = seeded(
        diffusers.UNet3DConditionModel,
        "conv_out",
        **UNET_3D,
    )
    return quiet(
        diffusers.TextToVideoSDPipeline(
            vae=tiny_vae(), text_encoder=None, tokenizer=None, unet=unet, scheduler=ddim()
        )
    )


def tiny_i2vgen() -> Any:
    unet = seeded(
        diffusers.I2VGenXLUNet,
        "conv_out",
        **UNET_3D,
    )
    vae = tiny_vae()
    vae.quant_conv.weight.data[4:] = 0  # the pipeline draws from its posterior without a generator
    vae.quant_conv.bias.data[4:] = -100
    return quiet(
        diffusers.I2VGenXLPipeline(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            image_encoder=tiny_image_encoder(),
            feature_extractor=transformers.CLIPImageProcessor(crop_size=32, size=32),
            unet=unet,
            scheduler=ddim(),
        )
    )


def tiny_video_diffusion() -> Any:
    unet = seeded(
        diffusers.UNetSpatioTemporalConditionModel,
        "conv_out",
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        num_frames=3,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    vae = seeded(
        diffusers.AutoencoderKLTemporalDecoder,
        block_out_channels=(32,),
        down_block_types=("DownEncoderBlock2D",),
        layers_per_block=1,
        latent_channels=4,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS, prediction_type="v_prediction", timestep_type="continuous",
        use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
    )  # fmt: skip
    return quiet(
        diffusers.StableVideoDiffusionPipeline(
            vae=vae,
            image_encoder=tiny_image_encoder(),
            unet=unet,
            scheduler=scheduler,
            feature_extractor=transformers.CLIPImageProcessor(crop_size=32, size=32),
        )
    )


def tiny_latent_diffusion() -> Any:
    config = diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion.LDMBertConfig(
        vocab_size=99, encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2,
        d_model=WIDTH, head_dim=8, max_position_embeddings=77,
    )  # fmt: skip
    torch.manual_seed(0)
    bert = diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion.LDMBertModel(config)
    return quiet(
        diffusers.LDMTextToImagePipeline(
            vqvae=tiny_vae(),
            bert=bert.eval(),
            tokenizer=tiny_tokenizer(),
            unet=tiny_unet(),
            scheduler=ddim(),
        )
    )


# -- transformers -------------------------------------------------------------------------------


def tiny_sd3(layers: int = 2) -> Any:
    transformer = seeded(
        diffusers.SD3Transformer2DModel,
        "proj_out",
        sample_size=8, patch_size=1, in_channels=4, num_layers=layers, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=WIDTH,
        pooled_projection_dim=12, out_channels=4,
    )  # fmt: skip
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(),
            **dict.fromkeys(
                ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2",
                 "text_encoder_3", "tokenizer_3"]
            ),
        )
    )  # fmt: skip


def tiny_flux(layers: int = 1, single: int = 1) -> Any:
    transformer = seeded(
        diffusers.FluxTransformer2DModel,
        "proj_out",
        patch_size=1, in_channels=16, num_layers=layers, num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return quiet(
        diffusers.FluxPipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=None,
            **dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]),
        )
    )


def tiny_pixart(layers: int = 2) -> Any:
    transformer = seeded(
        diffusers.PixArtTransformer2DModel,
        "proj_out",
        sample_size=8, num_layers=layers, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=WIDTH, in_channels=4, cross_attention_dim=16, out_channels=8,
        norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip
    return quiet(
        diffusers.PixArtSigmaPipeline(
            transformer=transformer,
            scheduler=diffusers.DPMSolverMultistepScheduler(),
            vae=tiny_vae(),
            text_encoder=None,
            tokenizer=None,
        )
    )


def tiny_dit(layers: int = 2) -> Any:
    transformer = seeded(
        diffusers.DiTTransformer2DModel,
        "proj_out_2",
        sample_size=8, num_layers=layers, patch_size=4, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, attention_bias=True, num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )  # fmt: skip
    return quiet(diffusers.DiTPipeline(transformer=transformer, vae=tiny_vae(), scheduler=ddim()))


def tiny_wan(second: bool = False) -> Any:
    def transformer() -> Any:
        return seeded(
            diffusers.WanTransformer3DModel,
            "proj_out",
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
            out_channels=4, text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=2,
            cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        )  # fmt: skip

    extra: dict[str, Any] = {}
    if second:
        extra = {"transformer_2": transformer(), "boundary_ratio": 0.9}
        extra["transformer_2"].proj_out.weight.data.mul_(0.5)  # not the first one again
    return quiet(
        diffusers.WanPipeline(
            transformer=transformer(),
            vae=None,
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            text_encoder=None,
            tokenizer=None,
            **extra,
        )
    )


# -- what surrounds them ------------------------------------------------------------------------


def tiny_vae() -> Any:
    """Eight pixels and four latents are as wide as each other."""
    return seeded(
        diffusers.AutoencoderKL,
        block_out_channels=(4,),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
    )


def tiny_image_encoder() -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, projection_dim=WIDTH, num_hidden_layers=1,
        num_attention_heads=2, image_size=32, patch_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.CLIPVisionModelWithProjection(config).eval()


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[PAD]": 0, "[UNK]": 1, **{f"p{n}": n + 2 for n in range(90)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=77
    )


def tiny_ip_adapter() -> Any:
    """Stable Diffusion with the weights of an IP-Adapter in its UNet."""
    pipe = tiny_stable_diffusion()
    torch.manual_seed(1)
    layers: dict[str, Tensor] = {}
    index = 1
    for name in pipe.unet.attn_processors:
        if not name.endswith("attn2.processor"):
            continue
        size = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{index}.{part}.weight"] = torch.randn(size, WIDTH) * 0.3
        index += 2
    projection = {
        "proj.weight": torch.randn(4 * WIDTH, WIDTH) * 0.3,
        "proj.bias": torch.zeros(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    pipe.image_encoder = None
    return pipe
