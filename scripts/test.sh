#!/usr/bin/env bash
# Checks the project: lint, format, types, tests.
#     scripts/test.sh [--all] [pytest arguments]      --all runs the slow tests too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_environment train,eval,serve,test
cd "$REPO"

selection="not slow"
if [ "${1:-}" = --all ]; then
    selection=""
    shift
fi
# No test asks the Hub; without this, one that names no local folder would try to, again and again.
export HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
mypy
exec python -m pytest -n 2 -m "$selection" "$@"
