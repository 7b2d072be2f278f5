#!/usr/bin/env bash
# Do records that the data engine writes train as well as people's? In the miniature world, after
# scripts/quickstart.sh; a quarter of an hour on two cores:
#     bash demo/shapes/compare_self_qa.sh [SEED...]
# The quickstart's model asks and answers about new scenes. Stage 2 is trained on what it wrote, and on as
# many records that the world made about the same scenes, from the same stage 1. What is there is not
# done again; to start over, remove checkpoints/shapes/self_qa. QUICK=1 and OUTPUT_DIR are the quickstart's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/env.sh"
use_environment train,eval
cd "$REPO"
source scripts/processes.sh
source demo/shapes/train.sh

RUN=checkpoints/shapes
SCENES=2000
BRIEF=()
if [ "${QUICK:-0}" = 1 ]; then
    RUN=checkpoints/shapes-quick
    SCENES=40
    BRIEF=(--max_steps 2)
fi
RUN=${OUTPUT_DIR:-$RUN}
OUT=$RUN/self_qa
IMAGES=$OUT/data/mixTraindata
SEEDS=("$@")
[ $# -gt 0 ] || SEEDS=(42 43 44 45)
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

main() {
    if [ ! -e "$RUN/done/stage2" ]; then
        echo "error: no model in $RUN: run scripts/quickstart.sh first" >&2
        exit 1
    fi
    mkdir -p "$OUT/logs"
    echo "drawing scenes, asking about them" >&2
    [ -e "$OUT/people.json" ] || quietly data draw_scenes
    # So many questions are drawn that about as many are kept as people asked: 9 a scene.
    quietly ask sqllava ask --dataset "$OUT/people.json" --image-folder "$IMAGES" --out "$OUT/own.json" \
        --model "$RUN/stage2" -n 14 --max-new-tokens 40 --processes 2
    local seed
    for seed in "${SEEDS[@]}"; do
        echo "training with seed $seed" >&2
        train_and_evaluate people "$seed" &
        train_and_evaluate own "$seed"
        wait $!
    done
    show
}

# quietly LOG COMMAND...: what it prints goes to a log, which is shown if it fails.
quietly() {
    local log=$OUT/logs/$1.log
    shift
    "$@" >"$log" 2>&1 && return
    tail -n 20 "$log" >&2
    echo "error: the whole log is $log" >&2
    return 1
}

# Of another seed than the quickstart's.
draw_scenes() {
    python demo/shapes/make_data.py --out "$OUT/data" --seed 7 \
        --scenes-pretrain 1 --scenes-finetune "$SCENES" --eval-scenes 2 &&
        python - "$IMAGES/shapes_finetune.json" "$OUT/people.json" <<'PYTHON'
import json, sys

records = json.load(open(sys.argv[1]))
json.dump([record for record in records if "image" in record], open(sys.argv[2], "w"), indent=1)
PYTHON
}

# One process each, so that two fit side by side.
train_and_evaluate() {
    local records=$1 seed=$2 output=$OUT/$1-$2
    [ ! -e "$output-eval/figures.json" ] || return 0
    NPROC=1 quietly "$records-$seed" train_stage2 "$output" "$OUT/$records.json" "$IMAGES" "$RUN/stage1" \
        --seed "$seed" "${BRIEF[@]}"
    quietly "$records-$seed-eval" python demo/shapes/evaluate.py --model "$output" --data "$RUN/data" \
        --output "$output-eval" --asked-scenes 10
}

show() {
    python - "$OUT" "${SEEDS[@]}" <<'PYTHON'
import json, statistics, sys

folder, *seeds = sys.argv[1:]
print("right answers to the held-out questions, %")
print(f"{'records':8}", *(f"{'seed ' + seed:>8}" for seed in seeds), f"{'mean':>8}")
for records in ("people", "own"):
    figures = [json.load(open(f"{folder}/{records}-{seed}-eval/figures.json")) for seed in seeds]
    right = [100 * each["vqa_accuracy"] for each in figures]
    print(f"{records:8}", *(f"{value:8.1f}" for value in [*right, statistics.mean(right)]))
PYTHON
}

as_one main
