#!/usr/bin/env bash
# The captioning sets whose question files are in the data folder: answers and scores. Settings: common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

declare -A FOLDERS=([coco]=coco [flickr30k]=flickr [nocaps]=nocaps [conceptual]=conceptual)
for task in coco flickr30k nocaps conceptual; do
    if compgen -G "$DATA/${FOLDERS[$task]}/question*.jsonl" >/dev/null; then
        run_task "$task" "$@"
    else
        echo "$task: no question file in $DATA/${FOLDERS[$task]}: sqllava eval prepare $task" >&2
    fi
done
