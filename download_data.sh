#!/usr/bin/env bash
# Fetches the recipe's data into mixTraindata/ (or --root FOLDER); run it again to go on:
#     bash download_data.sh --list
#     bash download_data.sh annotations coco gqa
# docs/data.md says what each set is, how big, and where a person must help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/env.sh"
use_environment train
exec sqllava data download "$@"
