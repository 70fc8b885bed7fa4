#!/bin/bash
# On each node: a torchrun that leaves signals to its ranks, which set their own handlers. Who is ignored here, exec keeps ignored.
trap '' USR1 TERM
export PET_NODE_RANK="$SLURM_NODEID"
exec "$@"
