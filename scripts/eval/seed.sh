#!/usr/bin/env bash
# SEED-Bench: answers and scores. Settings: common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_task seed "$@"
