#!/usr/bin/env bash
# Merges an adapter (ours or published) into its base: a model directory that loads by itself.
#     bash scripts/merge_lora.sh ADAPTER MERGED [--dtype bfloat16] [--base DIR] ...
# Further arguments are those of `sqllava convert`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if [ $# -lt 2 ]; then
    echo "usage: $0 ADAPTER MERGED [sqllava convert's arguments]" >&2
    exit 2
fi
command -v sqllava >/dev/null || use_environment train
exec sqllava convert "$1" "$2" --to merged "${@:3}"
