#!/usr/bin/env bash
# ScienceQA: answers and scores. Settings: common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_task scienceqa "$@"
