#!/usr/bin/env bash
# Every benchmark whose question file is in the data folder, and the report. Settings: common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_task all "$@"
