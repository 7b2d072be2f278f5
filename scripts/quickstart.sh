#!/usr/bin/env bash
# From a fresh clone to a trained model and a report, on two CPU cores in some ten minutes:
#     bash scripts/quickstart.sh              the miniature world, in checkpoints/shapes
#     QUICK=1 bash scripts/quickstart.sh      a smoke run of two minutes, in checkpoints/shapes-quick
# OUTPUT_DIR=FOLDER puts it elsewhere: a new or empty folder, or one that this script has made. A step is
# skipped when its result is there; what it prints goes to the folder's logs/. To start over, remove the
# folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$REPO"
source scripts/processes.sh
source demo/shapes/train.sh

folder=checkpoints/shapes
SCENES=(--scenes-pretrain 6400 --scenes-finetune 5120 --eval-scenes 600)
ASKED_SCENES=100
BRIEF=()
if [ "${QUICK:-0}" = 1 ]; then
    folder=checkpoints/shapes-quick
    SCENES=(--scenes-pretrain 256 --scenes-finetune 256 --eval-scenes 40)
    ASKED_SCENES=10
    BRIEF=(--max_steps 4 --logging_steps 1)
fi
OUT=${OUTPUT_DIR:-$folder}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# In the order of the steps; each step's result is a folder in $OUT.
RESULTS=(data stage1 stage2 eval demo report)
MARK=.quickstart # lies in the folder, and in each result that this script has begun
skipped_seconds=0 # what steps took that an earlier run has done

main() {
    trap unfollow EXIT
    claim_folder
    mkdir -p "$OUT/logs" "$OUT/done"
    drop_stale_results
    header "environment"
    use_environment train,eval
    step data "drawing scenes, writing captions, conversations and questions" make_data
    step stage1 "stage 1, alignment: 2 processes, ZeRO-2" align
    step stage2 "stage 2, self-questioning: 2 processes, ZeRO-3" finetune
    step eval "evaluation on held-out scenes" evaluate
    step demo "the demo on held-out scenes" run_demo
    step report "report" write_report
    cat "$OUT/demo/demo.txt"
    python demo/shapes/report.py --output "$OUT/report" --print
    header "done; open $OUT/report/index.html"
}

# Nothing is written or removed in a folder that holds what is not ours.
claim_folder() {
    local result found
    if [ ! -e "$OUT/$MARK" ]; then
        found=$(ls -A "$OUT" 2>/dev/null | head -n 3 | xargs) || true
        if [ -n "$found" ]; then
            fail "OUTPUT_DIR=$OUT holds what this script has not made ($found): give a new or empty folder"
        fi
        mkdir -p "$OUT"
        touch "$OUT/$MARK"
    fi
    for result in "${RESULTS[@]}"; do
        if [ -e "$OUT/$result" ] && [ ! -e "$OUT/$result/$MARK" ]; then
            fail "$OUT/$result is not what this script has made there: move it, or give another OUTPUT_DIR"
        fi
    done
}

fail() {
    echo "error: $*" >&2
    exit 1
}

# drop RESULT...: removes results of ours.
drop() {
    local result
    for result in "$@"; do
        rm -f "$OUT/done/$result"
        [ ! -e "$OUT/$result/$MARK" ] || rm -rf "${OUT:?}/$result"
    done
}

# Results belong to the base models, the world and the values that made them.
drop_stale_results() {
    local made_from
    made_from=$(cat demo/shapes/base/*/* demo/shapes/{world,make_data}.py demo/shapes/train.sh \
        scripts/{quickstart,launch,pretrain_clu,finetune_lora_clu_sq}.sh | sha256sum)
    if [ "$(cat "$OUT/made_from" 2>/dev/null)" != "$made_from" ]; then
        drop "${RESULTS[@]}"
        echo "$made_from" >"$OUT/made_from"
    fi
}

make_data() {
    python demo/shapes/make_data.py --out "$1" "${SCENES[@]}"
}

align() {
    train_stage1 "$1" "$OUT/data/mixTraindata/shapes_pretrain.json" "$OUT/data/mixTraindata" "${BRIEF[@]}"
}

finetune() {
    train_stage2 "$1" "$OUT/data/mixTraindata/shapes_finetune.json" "$OUT/data/mixTraindata" "$OUT/stage1" \
        "${BRIEF[@]}"
}

evaluate() {
    OMP_NUM_THREADS=$(nproc) python demo/shapes/evaluate.py --model "$OUT/stage2" --data "$OUT/data" \
        --output "$1" --asked-scenes "$ASKED_SCENES"
}

run_demo() {
    local images
    images=("$OUT"/data/eval/images/00000[0-3].jpg)
    python demo/visual_questioning.py --model_path "$OUT/stage2" --n_shot 3 --seed 0 \
        --max_new_tokens 40 \
        --image "${images[@]}" >"$1/demo.txt"
}

write_report() {
    python demo/shapes/report.py --run "$OUT" --output "$1" --seconds $((SECONDS + skipped_seconds))
}

header() {
    printf '[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"
}

# step NAME TITLE FUNCTION: calls FUNCTION FOLDER, unless an earlier run has done so. A step that runs
# makes the results of all later ones stale: they go.
step() {
    local name=$1 title=$2 work=$3 result later="" status started=$SECONDS
    if [ -e "$OUT/done/$name" ]; then
        header "$title: skipped, the result is there ($OUT/$name)"
        skipped_seconds=$((skipped_seconds + $(cat "$OUT/done/$name")))
        return
    fi
    header "$title (log: $OUT/logs/$name.log)"
    for result in "${RESULTS[@]}"; do
        [ -z "$later" ] || drop "$result"
        [ "$result" != "$name" ] || later=yes
    done
    mkdir -p "$OUT/$name"
    touch "$OUT/$name/$MARK"
    follow "$OUT/logs/$name.log"
    # Not within `if`, where bash would not stop at the first failing command.
    set +e
    (set -e && "$work" "$OUT/$name") >"$OUT/logs/$name.log" 2>&1
    status=$?
    set -e
    unfollow
    if ((status)); then
        tail -n 30 "$OUT/logs/$name.log" >&2
        echo "error: '$title' failed; the whole log is $OUT/logs/$name.log" >&2
        exit "$status"
    fi
    echo $((SECONDS - started)) >"$OUT/done/$name"
}

# On a terminal, shows the newest line of a log, such as a progress bar, until `unfollow`.
follow() {
    [ -t 1 ] || return 0
    while sleep 1; do
        printf '\r\033[K    %.90s' "$(tail -c 400 "$1" 2>/dev/null | tr '\r' '\n' | grep . | tail -n 1)"
    done &
    follower=$!
}

unfollow() {
    [ -n "$follower" ] || return 0
    kill "$follower"
    follower=
    printf '\r\033[K'
}

follower=
as_one main "$@"
