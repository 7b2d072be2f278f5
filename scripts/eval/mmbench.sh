#!/usr/bin/env bash
# MMBench: answers, scores and the upload. Settings: common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_task mmbench "$@"
submit mmbench "$DATA/mmbench/mmbench_dev_20230712.tsv" "$DATA/mmbench/mmbench_dev_20230712.tsv"
