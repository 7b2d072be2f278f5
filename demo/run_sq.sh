#!/usr/bin/env bash
# Asks questions about images with a trained model:
#     bash demo/run_sq.sh photo.jpg another.jpg
#     MODEL=checkpoints/sqllava-7b-lora N_SHOT=5 bash demo/run_sq.sh photo.jpg --json
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ $# = 0 ]; then
    echo "usage: bash demo/run_sq.sh IMAGE... [flags of demo/visual_questioning.py]" >&2
    exit 2
fi
# The quickstart's model, unless MODEL says otherwise; BASE where an adapter's own base has moved.
MODEL=${MODEL:-$REPO/checkpoints/shapes/stage2}
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" "$REPO/demo/visual_questioning.py" \
    --model_path "$MODEL" \
    ${BASE:+--model_base "$BASE"} \
    --n_shot "${N_SHOT:-3}" \
    --image "$@"
