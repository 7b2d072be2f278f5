#!/usr/bin/env bash
# Q-Bench in Chinese: answers and scores. Settings: common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_task qbench_zh "$@"
