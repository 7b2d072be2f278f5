#!/usr/bin/env bash
# Stage 2, self-questioning instruction tuning: trains ViT-LoRA, LLM-LoRA, the prototype extractor and
# the MLP, with DeepSpeed ZeRO-3, starting from stage 1's projector and ViT-LoRA. Every value below
# can be set from the environment; further arguments are passed on:
#     BATCH=8 bash scripts/finetune_lora_clu_sq.sh --report_to wandb
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL=${MODEL:-lmsys/vicuna-7b-v1.5}
VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
PRETRAIN=${PRETRAIN:-checkpoints/sqllava-7b-pretrain}
# For LLaVA's 665K: DATA_PATH=mixTraindata/llava_v1_5_mix665k.json
DATA_PATH=${DATA_PATH:-mixTraindata/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json}
IMAGE_FOLDER=${IMAGE_FOLDER:-mixTraindata}
OUTPUT_DIR=${OUTPUT_DIR:-checkpoints/sqllava-7b-lora}

PROJECTOR_TYPE=${PROJECTOR_TYPE:-cluster}
NUM_LATENTS=${NUM_LATENTS:-256}
SQ_R=${SQ_R:-0.5}
LORA_R=${LORA_R:-128}
LORA_ALPHA=${LORA_ALPHA:-256}
# The same as in stage 1, whose weights go on here.
LORA_R_VIT=${LORA_R_VIT:-64}
LORA_ALPHA_VIT=${LORA_ALPHA_VIT:-128}
GLOBAL_BATCH=${GLOBAL_BATCH:-128}
BATCH=${BATCH:-16}
EPOCHS=${EPOCHS:-1}
LR=${LR:-2e-4}
PROJECTOR_LR=${PROJECTOR_LR:-2e-5}
VIT_LR=${VIT_LR:-2e-5}
MAX_LENGTH=${MAX_LENGTH:-2048}
CHECKPOINTING=${CHECKPOINTING:-True}
SAVE_STEPS=${SAVE_STEPS:-500}
WORKERS=${WORKERS:-4}
ZERO=${ZERO:-$REPO/scripts/zero3.json}

need_model "$MODEL" "the language model"
need_model "$VISION_TOWER" "the vision tower"
need "$PRETRAIN" "stage 1's result" "Run 'bash scripts/pretrain_clu.sh', or set PRETRAIN."
need "$DATA_PATH" "stage 2's data" "Fetch it with 'bash download_data.sh' (docs/data.md)."
need "$IMAGE_FOLDER" "the image folder" "Fetch it with 'bash download_data.sh' (docs/data.md)."

launch "$ZERO" \
    --model_name_or_path "$MODEL" \
    --vision_tower "$VISION_TOWER" \
    --pretrain_mm_mlp_adapter "$PRETRAIN" \
    --version v1_sq \
    --sq_r "$SQ_R" \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --mm_projector_type "$PROJECTOR_TYPE" \
    --num_latents "$NUM_LATENTS" \
    --mm_vision_select_layer -2 \
    --lora_enable True \
    --lora_r "$LORA_R" \
    --lora_alpha "$LORA_ALPHA" \
    --vit_lora_enable True \
    --lora_r_vit "$LORA_R_VIT" \
    --lora_alpha_vit "$LORA_ALPHA_VIT" \
    --output_dir "$OUTPUT_DIR" \
    --num_train_epochs "$EPOCHS" \
    --learning_rate "$LR" \
    --mm_projector_lr "$PROJECTOR_LR" \
    --vision_tower_lr "$VIT_LR" \
    --weight_decay 0 \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --model_max_length "$MAX_LENGTH" \
    --gradient_checkpointing "$CHECKPOINTING" \
    --save_strategy steps \
    --save_steps "$SAVE_STEPS" \
    --save_total_limit 2 \
    --logging_steps 10 \
    --dataloader_num_workers "$WORKERS" \
    "$@"
