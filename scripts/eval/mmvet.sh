#!/usr/bin/env bash
# MM-Vet: answers and the upload; with OPENAI_API_KEY set, grades by JUDGE_MODEL and scores. Settings: common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FOLDER=$DATA/mm-vet
run_task mmvet "$@"
submit mmvet "$FOLDER/llava-mm-vet.jsonl"
if [ -n "${OPENAI_API_KEY:-}" ]; then
    python -m sqllava.eval.cli judge mmvet --answers "$OUTPUT/mmvet.jsonl" \
        --annotations "$FOLDER" --prompts "$FOLDER/mm-vet_evaluator.py" \
        --out "$OUTPUT/mmvet.grades.json" ${JUDGE_MODEL:+--judge "$JUDGE_MODEL"}
    python -m sqllava.eval.cli score mmvet --answers "$OUTPUT/mmvet.jsonl" \
        --annotations "$FOLDER" --grades "$OUTPUT/mmvet.grades.json" \
        --out "$OUTPUT/mmvet.score.json"
fi
