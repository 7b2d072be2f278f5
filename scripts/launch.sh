# Starts training on whatever the machine has; source it, then call `launch ZERO_CONFIG FLAGS...`.
#
# GPUs are counted (or NPROC processes run on the CPU where there is none), and accumulation is set so
# that the global batch is GLOBAL_BATCH whatever their number. Several nodes: HOSTFILE=... for
# DeepSpeed's own launcher over ssh, or NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT with the same
# command on every node, as a scheduler does it.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPO/scripts/processes.sh"

fail() {
    echo "error: $*" >&2
    exit 1
}

# need PATH WHAT HOW: stops with one line if a file or folder is missing.
need() {
    [ -e "$1" ] || fail "$2 is missing: $1. $3"
}

# need_model NAME WHAT: local folders must be there; anything else is an id that the hub resolves.
need_model() {
    case $1 in
        /* | ./* | ../* | checkpoints/* | demo/*)
            need "$1/config.json" "$2" "Fetch it with 'hf download ID --local-dir $1', or give an id." ;;
    esac
}

gpu_count() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        [ -z "$CUDA_VISIBLE_DEVICES" ] && echo 0 && return
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    else
        { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

# Processes over all nodes.
world_size() {
    if [ -n "${HOSTFILE:-}" ]; then
        need "$HOSTFILE" "the hostfile" "It has one line 'host slots=8' a node."
        sed -n 's/^[^#].*slots=\([0-9]*\).*/\1/p' "$HOSTFILE" | awk '{ total += $1 } END { print total + 0 }'
    else
        echo $((NPROC * ${NNODES:-1}))
    fi
}

# Sets BATCH and ACCUMULATION so that BATCH x ACCUMULATION x processes = GLOBAL_BATCH.
fit_batch() {
    local world=$1 wanted=$BATCH
    ((world > 0)) || fail "no processes: the hostfile has no line 'host slots=N'"
    ((GLOBAL_BATCH % world == 0)) ||
        fail "GLOBAL_BATCH=$GLOBAL_BATCH cannot be split over $world processes; set it to a multiple, such as $((GLOBAL_BATCH / world * world + world))"
    while ((GLOBAL_BATCH % (BATCH * world))); do BATCH=$((BATCH - 1)); done
    ACCUMULATION=$((GLOBAL_BATCH / (BATCH * world)))
    echo "global batch $GLOBAL_BATCH = $BATCH per device x $ACCUMULATION accumulation x $world processes"
    ((BATCH == wanted)) || echo "(BATCH=$wanted does not divide it; using $BATCH)"
}

# run_launcher COMMAND...: the training processes end with this script, and what the first of them died
# of stands last, after all that the others and the launcher say.
run_launcher() {
    local status=0 words word begun
    words=$(mktemp -d)
    export SQLLAVA_LAST_WORDS=$words SQLLAVA_SCRIPT=$$
    as_one "$@" || status=$?
    word=$(find "$words" -name '*.word' | sort | head -n 1)
    if [ -n "$word" ]; then
        echo "error: $(sed '1s/^error: //' "$word") (process $(basename "${word##*-}" .word))" >&2
    elif ((status == 0)); then
        # DeepSpeed's runner calls it a success when its launcher is killed.
        for begun in "$words"/*.begun; do
            if [ -e "$begun" ] && [ ! -e "${begun%.begun}.done" ]; then
                echo "error: the training processes ended before their end" >&2
                status=1
                break
            fi
        done
    elif ((status > 192)); then
        echo "error: a training process was killed by signal $((256 - status)) (9 comes from the kernel when memory runs out)" >&2
    fi
    rm -rf "$words"
    return "$status"
}

launch() {
    local config=$1
    shift
    command -v deepspeed >/dev/null ||
        fail "deepspeed is not found: activate the environment ('source .venv/bin/activate'), or install it (docs/install.md)"
    local gpus device=()
    gpus=$(gpu_count)
    if [ -z "${HOSTFILE:-}" ] && ((gpus == 0)); then
        NPROC=${NPROC:-1}
        echo "no GPU: training on the CPU in float32 with $NPROC processes"
        device=(--use_cpu True)
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    else
        NPROC=${NPROC:-$gpus}
        device=(--bf16 True --tf32 True)
    fi
    fit_batch "$(world_size)"
    local flags=(--deepspeed "$config" --per_device_train_batch_size "$BATCH"
        --gradient_accumulation_steps "$ACCUMULATION" "${device[@]}" "$@")
    local port=${MASTER_PORT:-$((20000 + RANDOM % 20000))}
    export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
    if [ -n "${HOSTFILE:-}" ]; then
        run_launcher deepspeed --hostfile "$HOSTFILE" --module sqllava.train "${flags[@]}"
    elif ((${NNODES:-1} > 1)); then
        run_launcher torchrun --nnodes "$NNODES" --nproc_per_node "$NPROC" \
            --node_rank "${NODE_RANK:?set NODE_RANK on every node}" \
            --master_addr "${MASTER_ADDR:?set MASTER_ADDR to the first node}" \
            --master_port "${MASTER_PORT:-29500}" -m sqllava.train "${flags[@]}"
    elif ((gpus == 0)); then
        run_launcher deepspeed --num_gpus 0 --num_accelerators "$NPROC" --master_port "$port" \
            --module sqllava.train "${flags[@]}"
    elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        # DeepSpeed's launcher takes devices by --include, which must agree with the variable.
        run_launcher deepspeed --include "localhost:$CUDA_VISIBLE_DEVICES" --master_port "$port" \
            --module sqllava.train "${flags[@]}"
    else
        run_launcher deepspeed --num_gpus "$NPROC" --master_port "$port" \
            --module sqllava.train "${flags[@]}"
    fi
}
