# What the scripts of this folder share; they source it.
#     MODEL   folder of the model (adapter or whole), or a hub id of a transformers model
#     BASE    the language model under an adapter, if it has moved
#     DATA    data folder in LLaVA's layout              (playground/data/eval)
#     OUTPUT  folder for answers, scores and the report  (results/<model's name>)
#     NPROC   processes, each with a GPU of its own      (as many as there are GPUs, at least 1)
#     BATCH   questions answered at once                 (16)
# Extra arguments of a script go on to `sqllava eval run`.
set -euo pipefail

: "${MODEL:?set MODEL to the folder of the model}"
DATA=${DATA:-playground/data/eval}
OUTPUT=${OUTPUT:-results/$(basename "$MODEL")}
BATCH=${BATCH:-16}

gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
    else
        { nvidia-smi -L 2>/dev/null || true; } | grep -c . || true
    fi
}

# run_task TASK [ARGUMENT...]: answers the task's questions, and scores where the answers are public.
run_task() {
    local task=$1 count
    shift
    count=${NPROC:-$(gpus)}
    local command=(python -m sqllava.eval.cli)
    if ((count > 1)); then
        command=(torchrun --standalone --nproc_per_node "$count" -m sqllava.eval.cli)
    fi
    "${command[@]}" run "$task" --model "$MODEL" ${BASE:+--base "$BASE"} \
        --data "$DATA" --output "$OUTPUT" --batch-size "$BATCH" "$@"
}

# submit TASK QUESTIONS: writes what the benchmark's server wants.
submit() {
    python -m sqllava.eval.cli submit "$1" --answers "$OUTPUT/$1.jsonl" --questions "$2" \
        ${3:+--annotations "$3"}
}
