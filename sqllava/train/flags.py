"""The flags of training that are ours, as data; their help imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Literal

from sqllava.conversation import TEMPLATES

Pack = Literal["off", "rows", "shared"]


@dataclass
class ModelArguments:
    """Which model, and which of its parts train."""

    model_name_or_path: str = field(metadata={"help": "Language model (Vicuna): folder or id."})
    vision_tower: str | None = field(
        default=None, metadata={"help": "Vision tower (CLIP ViT-L/14-336): folder or id."}
    )
    version: str = field(
        default="v1_sq", metadata={"help": f"Conversation template: {', '.join(TEMPLATES)}."}
    )
    mm_projector_type: str = field(
        default="cluster",
        metadata={"help": "cluster, cluster_soft, linear, mlp{n}x_gelu or identity."},
    )
    num_latents: int = field(
        default=256, metadata={"help": "Centres of the cluster projector's prototype extractor."}
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Stage 1's result: its folder, or its mm_projector.bin. The projector and the "
            "ViT-LoRA both start from it."
        },
    )
    tune_mm_mlp_adapter: bool = field(
        default=False,
        metadata={"help": "Stage 1: train the projector (and ViT-LoRA), not the language model."},
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Keep the language model frozen."}
    )
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Freeze the projector."})
    mm_vision_select_layer: int = field(
        default=-2, metadata={"help": "Hidden state of the tower that is read."}
    )
    mm_vision_select_feature: str = field(
        default="patch", metadata={"help": "patch, or cls_patch to keep the class token."}
    )
    mm_use_im_start_end: bool = field(
        default=False, metadata={"help": "Not supported: no SQ-LLaVA model was trained with it."}
    )
    mm_use_im_patch_token: bool = field(
        default=False, metadata={"help": "Accepted for old scripts; has no effect."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "sdpa, flash_attention_2, flex_attention or eager. By default what suits "
            "--pack and is there: on a GPU FlexAttention for rows that share images, "
            "FlashAttention 2 for other rows and rectangles; else sdpa."
        },
    )


@dataclass
class DataArguments:
    """Which data, and what to do with records that cannot be used."""

    data_path: str = field(metadata={"help": "Records: LLaVA JSON, JSONL or Parquet."})
    image_folder: str | None = field(default=None, metadata={"help": "Where image names start."})
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Records for a validation loss."}
    )
    image_aspect_ratio: str = field(
        default="pad", metadata={"help": "pad to a square with the mean colour, or crop."}
    )
    sq_r: float | None = field(
        default=None,
        metadata={
            "help": "Share of later human turns that the model learns to ask; for v1_sq, where it "
            "is 0.3 by default (the recipe has 0.5)."
        },
    )
    pack: Pack | None = field(
        default=None,
        metadata={
            "help": "How records stand in a micro-batch: rows, one after another without padding, "
            "dealt out to ranks and micro-batches by cost; shared, rows in which records about one "
            "image read it once; off, padded rectangles. The batch size is the average number of "
            "records in a row, so the global batch is the same. By default shared, and rows in "
            "stage 1."
        },
    )
    bad_samples: Literal["fail", "skip", "replace"] = field(
        default="fail",
        metadata={
            "help": "A missing or corrupt image, a malformed record: fail, skip it (it weighs "
            "nothing), or replace it by another record. Skips are counted and listed."
        },
    )
    max_bad_samples: int = field(
        default=1000, metadata={"help": "Stop when more than this many were skipped or replaced."}
    )
    jpeg_draft: bool = field(
        default=False,
        metadata={
            "help": "Decode large JPEG files at a half, a quarter or an eighth of their size: "
            "faster, but not the published pixels."
        },
    )
    lazy_preprocess: bool = field(
        default=True, metadata={"help": "Accepted for old scripts; records are always lazy."}
    )
    data_aug: bool = field(
        default=False, metadata={"help": "Accepted for old scripts; has no effect."}
    )


@dataclass
class RecipeArguments:
    """How training goes; beside these stand all of transformers' TrainingArguments."""

    model_max_length: int = field(
        default=2048, metadata={"help": "Longest sequence, image tokens included."}
    )
    lora_enable: bool = field(default=False, metadata={"help": "LoRA on the language model."})
    lora_r: int = field(default=128, metadata={"help": "Rank of LLM-LoRA."})
    lora_alpha: int = field(default=256, metadata={"help": "Alpha of LLM-LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LLM-LoRA."})
    lora_bias: str = field(default="none", metadata={"help": "Only none: Llama has no biases."})
    vit_lora_enable: bool = field(default=False, metadata={"help": "LoRA on the vision tower."})
    lora_r_vit: int = field(default=64, metadata={"help": "Rank of ViT-LoRA."})
    lora_alpha_vit: int = field(default=128, metadata={"help": "Alpha of ViT-LoRA."})
    lora_dropout_vit: float = field(default=0.2, metadata={"help": "Dropout of ViT-LoRA."})
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "Projector's learning rate (default: --learning_rate)."}
    )
    vision_tower_lr: float | None = field(
        default=None, metadata={"help": "ViT-LoRA's learning rate (default: --learning_rate)."}
    )
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Batches of one modality and of like lengths."}
    )
    group_by_length: bool = field(default=False, metadata={"help": "Batches of like lengths."})
    bits: int = field(
        default=16, metadata={"help": "16, or 8 or 4 to quantise the language model."}
    )
    warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps that warm up (or --warmup_steps)."}
    )
    evaluation_strategy: str | None = field(
        default=None, metadata={"help": "Older name of --eval_strategy."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Start anew in --output_dir: this program's checkpoints and result there go."
        },
    )
    # An opt-in: a batch job must never stop at a login prompt.
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "tensorboard, wandb, ...; none by default."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always false."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Workers per rank."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Always false: a loss that is no number must be seen."}
    )
