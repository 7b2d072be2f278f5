#!/usr/bin/env bash
# LLaVA-Bench: answers; with OPENAI_API_KEY set, reviews by JUDGE_MODEL and scores. Settings: common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FOLDER=$DATA/llava-bench-in-the-wild
run_task llavabench "$@"
if [ -n "${OPENAI_API_KEY:-}" ]; then
    python -m sqllava.eval.cli judge llavabench --answers "$OUTPUT/llavabench.jsonl" \
        --annotations "$FOLDER" --prompts "$FOLDER/rule.json" \
        --out "$OUTPUT/llavabench.reviews.jsonl" ${JUDGE_MODEL:+--judge "$JUDGE_MODEL"}
    python -m sqllava.eval.cli score llavabench --answers "$OUTPUT/llavabench.jsonl" \
        --annotations "$FOLDER" --reviews "$OUTPUT/llavabench.reviews.jsonl" \
        --out "$OUTPUT/llavabench.score.json"
fi
