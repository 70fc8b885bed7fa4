#!/bin/bash
# Whether this container can work: the command starts, and a GPU that was given to it answers. Training that hangs or loses a rank ends by
# itself (docs/reliability.md), and with it the container.
set -uo pipefail

opensora-dist --version > /dev/null || exit 1
# The runtime puts nvidia-smi into containers that are given GPUs, and into no others.
if command -v nvidia-smi > /dev/null; then
  gpus=$(timeout 10 nvidia-smi --list-gpus) || { echo "nvidia-smi fails: ${gpus:-no answer}"; exit 1; }
  [[ $gpus == GPU* ]] || { echo "no GPU answers: $gpus"; exit 1; }
fi
