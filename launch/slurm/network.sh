#!/bin/bash
# Before what talks to other nodes: gloo listens at the address of this node's own name, which may be loopback; so where the site names no
# interface, it is told the one that leads to the first node, on the first node the one that has its address.
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && command -v ip > /dev/null; then
  own=$(ip -o route get "$MASTER_ADDR" | sed -n 's/.* src \([^ ]*\).*/\1/p')
  interface=$(ip -o -4 address show to "${own:-0.0.0.0}" | awk 'NR == 1 { print $2 }')
  [ -z "$interface" ] || export GLOO_SOCKET_IFNAME="$interface"
fi
exec "$@"
