#!/bin/bash
# Each rank, with a log of its own. GROUP_RANK and RANK are torchrun's; a process that is no rank is the first.
logs="$OPENSORA_LOGS/node-${GROUP_RANK:-0}"
mkdir -p "$logs"
exec "$@" >> "$logs/rank-${RANK:-0}.log" 2>&1
