#!/usr/bin/env bash
# Stage 1, feature alignment: trains the prototype extractor, the MLP and ViT-LoRA on captions, with
# DeepSpeed ZeRO-2. Every value below can be set from the environment; further arguments are passed on:
#     BATCH=16 bash scripts/pretrain_clu.sh --report_to wandb
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL=${MODEL:-lmsys/vicuna-7b-v1.5}
VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
# For the 558K captions of LLaVA: DATA_PATH=mixTraindata/blip_laion_cc_sbu_558k.json
#                                 IMAGE_FOLDER=mixTraindata/llava/llava_pretrain/images
DATA_PATH=${DATA_PATH:-mixTraindata/share-captioner_coco_lcs_sam_1246k_1107.json}
IMAGE_FOLDER=${IMAGE_FOLDER:-mixTraindata}
OUTPUT_DIR=${OUTPUT_DIR:-checkpoints/sqllava-7b-pretrain}

PROJECTOR_TYPE=${PROJECTOR_TYPE:-cluster}
NUM_LATENTS=${NUM_LATENTS:-256}
LORA_R_VIT=${LORA_R_VIT:-64}
LORA_ALPHA_VIT=${LORA_ALPHA_VIT:-128}
GLOBAL_BATCH=${GLOBAL_BATCH:-256}
BATCH=${BATCH:-32}
EPOCHS=${EPOCHS:-1}
LR=${LR:-1e-3}
VIT_LR=${VIT_LR:-2e-4}
MAX_LENGTH=${MAX_LENGTH:-2048}
CHECKPOINTING=${CHECKPOINTING:-True}
SAVE_STEPS=${SAVE_STEPS:-500}
WORKERS=${WORKERS:-4}
ZERO=${ZERO:-$REPO/scripts/zero2.json}

need_model "$MODEL" "the language model"
need_model "$VISION_TOWER" "the vision tower"
need "$DATA_PATH" "stage 1's data" "Fetch it with 'bash download_data.sh' (docs/data.md)."
need "$IMAGE_FOLDER" "the image folder" "Fetch it with 'bash download_data.sh' (docs/data.md)."

launch "$ZERO" \
    --model_name_or_path "$MODEL" \
    --vision_tower "$VISION_TOWER" \
    --version plain \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
    --image_aspect_ratio pad \
    --mm_projector_type "$PROJECTOR_TYPE" \
    --num_latents "$NUM_LATENTS" \
    --mm_vision_select_layer -2 \
    --tune_mm_mlp_adapter True \
    --vit_lora_enable True \
    --lora_r_vit "$LORA_R_VIT" \
    --lora_alpha_vit "$LORA_ALPHA_VIT" \
    --output_dir "$OUTPUT_DIR" \
    --num_train_epochs "$EPOCHS" \
    --learning_rate "$LR" \
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
