#!/usr/bin/env bash
# VQAv2: answers, and the upload for every question of test2015. Settings: common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_task vqav2 "$@"
submit vqav2 "$DATA/vqav2/llava_vqav2_mscoco_test2015.jsonl"
