# Both stages with the miniature world's values, through the scripts of the real system; source it from
# the repository's root:
#     train_stage1 OUTPUT_DIR DATA_PATH IMAGE_FOLDER [FLAGS...]
#     train_stage2 OUTPUT_DIR DATA_PATH IMAGE_FOLDER PRETRAIN [FLAGS...]

train_stage1() {
    local values=(OUTPUT_DIR="$1" DATA_PATH="$2" IMAGE_FOLDER="$3" LR=1e-3 VIT_LR=1e-4)
    shift 3
    with_values "${values[@]}" bash scripts/pretrain_clu.sh "$@"
}

train_stage2() {
    local values=(OUTPUT_DIR="$1" DATA_PATH="$2" IMAGE_FOLDER="$3" PRETRAIN="$4"
        LORA_R=32 LORA_ALPHA=64 LR=3e-3 PROJECTOR_LR=2e-4 VIT_LR=2e-5)
    shift 4
    with_values "${values[@]}" bash scripts/finetune_lora_clu_sq.sh --lora_dropout 0 "$@"
}

# with_values NAME=VALUE... bash SCRIPT FLAGS...: these values, and those that both stages share.
with_values() {
    local processes=${NPROC:-2}
    env MODEL=demo/shapes/base/lm VISION_TOWER=demo/shapes/base/tower NPROC="$processes" WORKERS=0 \
        PROJECTOR_TYPE=cluster NUM_LATENTS=9 LORA_R_VIT=16 LORA_ALPHA_VIT=32 MAX_LENGTH=512 \
        GLOBAL_BATCH=16 BATCH=$((16 / processes)) EPOCHS=1 CHECKPOINTING=False SAVE_STEPS=100000 \
        "$@" --lora_dropout_vit 0 --adam_beta2 0.95
}
