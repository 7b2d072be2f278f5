#!/usr/bin/env bash
# MMBench-CN: answers, scores and the upload. Settings: common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_task mmbench_cn "$@"
submit mmbench_cn "$DATA/mmbench/mmbench_dev_cn_20231003.tsv" "$DATA/mmbench/mmbench_dev_cn_20231003.tsv"
