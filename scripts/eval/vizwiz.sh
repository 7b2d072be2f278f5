#!/usr/bin/env bash
# VizWiz: answers, and the upload. Settings: common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_task vizwiz "$@"
submit vizwiz "$DATA/vizwiz/llava_test.jsonl"
