#!/bin/bash
# Submits the jobs of one submission, each of which waits for the one before, and prints their ids. The first is held until all are
# there: so either all of them can start, or none does.
set -uo pipefail
folder=/runs/clips/launch/0001
ids=()
take_back() {
  # The last first: none is to see the end of the one before.
  [ -z "${ids[*]}" ] || printf '%s\n' "${ids[@]}" | tac | xargs -n 1 scancel
  exit 1
}
submit() {
  local id
  id=$(sbatch --parsable --chdir="$folder" "$@") || take_back
  ids+=("${id%%;*}")
}

submit --hold "$folder"/job.sbatch 1
submit --dependency=afterok:"${ids[-1]}" --kill-on-invalid-dep=yes "$folder"/job.sbatch 2
submit --dependency=afterok:"${ids[-1]}" --kill-on-invalid-dep=yes "$folder"/last.sbatch 
scontrol release "${ids[0]}" >&2 || take_back
printf '%s\n' "${ids[@]}"
