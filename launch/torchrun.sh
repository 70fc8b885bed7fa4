#!/bin/bash
# torchrun for opensora-dist, on one host or on several; docs/torchrun.md.
set -uo pipefail
trap 'exit 143' TERM  # until there are ranks; as a container's first process it would not be heard otherwise

usage() {
  cat << 'TEXT'
usage: launch/torchrun.sh [option ...] VERB ...

  launch/torchrun.sh train CONFIG                                              one host, a rank per GPU
  launch/torchrun.sh --nnodes 2 --node-rank 0 --head node1 train CONFIG        on node1
  launch/torchrun.sh --nnodes 2 --node-rank 1 --head node1 train CONFIG        on the other

Each option may stand in the environment instead, under the name behind it.

  --nnodes N           NNODES        hosts (1)
  --nproc P            NPROC         ranks on this host (one per GPU; 1 without GPUs)
  --head HOST          HEAD          name or IPv4 address of the host that the others meet at
  --port P             PORT          of the head (29500)
  --node-rank R        NODE_RANK     this host's number, 0 on the head; static rendezvous
  --rendezvous KIND    RENDEZVOUS    static (default) or c10d, which numbers the hosts itself
  --max-restarts K     MAX_RESTARTS  how often the ranks are started again after a failure (0)
  --id NAME            RUN_ID        of a c10d rendezvous; the same on all hosts (opensora)
  --python PROGRAM     PYTHON        (python3)

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP make all ranks, on all hosts, save and end with code 0; a second Ctrl-C doesn't wait.
TEXT
}

refuse() {
  echo "error: $1" >&2
  exit 2
}

while (($# > 0)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --nnodes) NNODES=${2:-} ;;
    --nproc) NPROC=${2:-} ;;
    --head) HEAD=${2:-} ;;
    --port) PORT=${2:-} ;;
    --node-rank) NODE_RANK=${2:-} ;;
    --rendezvous) RENDEZVOUS=${2:-} ;;
    --max-restarts) MAX_RESTARTS=${2:-} ;;
    --id) RUN_ID=${2:-} ;;
    --python) PYTHON=${2:-} ;;
    -*) refuse "no such option: $1; launch/torchrun.sh --help lists them" ;;
    *) break ;;
  esac
  (($# > 1)) || refuse "$1 needs a value; launch/torchrun.sh --help"
  shift 2
done
(($# > 0)) || refuse "nothing to run; give a verb of opensora-dist, such as: train CONFIG"

NNODES=${NNODES:-1} PORT=${PORT:-29500} RENDEZVOUS=${RENDEZVOUS:-static} MAX_RESTARTS=${MAX_RESTARTS:-0} RUN_ID=${RUN_ID:-opensora}
python=${PYTHON:-python3}
whole() { [[ $2 =~ ^[0-9]{1,6}$ ]] || refuse "$1=$2 is no whole number; launch/torchrun.sh --help"; }
whole NNODES "$NNODES" && whole PORT "$PORT" && whole MAX_RESTARTS "$MAX_RESTARTS"
((NNODES > 0)) || refuse "NNODES=$NNODES: at least 1"
NPROC=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')} || refuse "$python has no torch; set PYTHON"
whole NPROC "$NPROC"
((NPROC > 0)) || refuse "NPROC=$NPROC: at least 1"

# Prints the head's address, this host's own on the way there, and the interface of that.
route() {
  "$python" - "$HEAD" << 'CODE'
import fcntl, ipaddress, socket, struct, sys

name = sys.argv[1]
try:
    head = socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0]
except OSError as error:
    sys.exit(f"error: HEAD={name} has no IPv4 address here ({error}); give an address, or a name that this host can resolve")
if ipaddress.ip_address(head).is_loopback or head == "0.0.0.0":
    sys.exit(
        f"error: HEAD={name} is {head} here, where no other host finds it; give the head's address in the network of the hosts, "
        "or mend its name in /etc/hosts"
    )
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
        probe.connect((head, 1))  # sends nothing, chooses the way
    except OSError as error:
        sys.exit(f"error: HEAD={name} ({head}) can't be reached from here: {error}")
    mine = probe.getsockname()[0]

    def address(interface):
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, struct.pack("256s", interface.encode()))[20:24])  # SIOCGIFADDR
        except OSError:  # it has none
            return None

    print(head, mine, next((name for _, name in socket.if_nameindex() if address(name) == mine), ""))
CODE
}

# c10d's hosts wait a minute for the head, and those who start them by hand may need longer.
wait_for_head() {
  for ((second = 0; second < 900; second++)); do
    (exec 3<> "/dev/tcp/$1/$PORT") 2> /dev/null && return
    ((second % 30)) || echo "waiting for the head, $1 port $PORT" >&2
    sleep 1
  done
  refuse "no answer from the head, $1 port $PORT, for 15 minutes; start this script on it with the same options"
}

launch=("$python" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS")
# Only SIGTERM ends torchrun: what asks a run to stop comes to this script.
launch+=(--signals-to-handle SIGTERM)
if ((NNODES == 1)); then
  launch+=(--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --rdzv-conf is_host=true --local-addr 127.0.0.1)
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
else
  [[ -n ${HEAD:-} ]] || refuse "NNODES=$NNODES needs HEAD, the name or address of the host that the others meet at"
  found=$(route) || exit 2
  read -r head mine interface <<< "$found"
  # gloo would listen at the address of this host's name, which Debian makes 127.0.1.1.
  [[ -z $interface ]] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
  case $RENDEZVOUS in
    static)
      whole NODE_RANK "${NODE_RANK:-}"
      ((NODE_RANK < NNODES)) || refuse "NODE_RANK=$NODE_RANK must be less than NNODES=$NNODES: hosts are numbered from 0"
      launch+=(--node-rank "$NODE_RANK" --master-addr "$head" --master-port "$PORT")
      ;;
    c10d)
      is_host=false
      if [[ $mine == "$head" ]]; then is_host=true; else wait_for_head "$head"; fi
      launch+=(--rdzv-backend c10d --rdzv-endpoint "$head:$PORT" --rdzv-id "$RUN_ID" --rdzv-conf "is_host=$is_host")
      launch+=(--local-addr "$mine")
      # Else a host that comes back waits for an address that torch (2.13) tells in the first round alone.
      export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
      ;;
    *) refuse "RENDEZVOUS=$RENDEZVOUS: static or c10d" ;;
  esac
fi

# The ranks are told by SIGUSR1, which asks, and again until they have ended: one that is starting doesn't listen yet. They are torchrun's
# children, and found as such, since each has a session of its own.
tell_ranks() {
  local ranks
  while kill -0 "$torchrun" 2> /dev/null; do
    mapfile -t ranks < <(grep -lE "^PPid:[[:space:]]+$torchrun\$" /proc/[0-9]*/status 2> /dev/null | cut -d/ -f3)
    ((${#ranks[@]} == 0)) || kill -USR1 "${ranks[@]}" 2> /dev/null
    sleep 1
  done
}

torchrun='' telling='' interrupts=0
ask() {
  torchrun=${torchrun:-$!}
  [[ -n $torchrun ]] || exit 143
  if [[ -z $telling ]]; then
    echo "asked to stop by SIG$1: the ranks save and end; Ctrl-C twice ends them at once" >&2
    tell_ranks &
    telling=$!
  fi
  [[ $1 != INT ]] || interrupts=$((interrupts + 1))
  ((interrupts < 2)) || kill -TERM "$torchrun"
}
trap 'ask TERM' TERM
trap 'ask INT' INT
trap 'ask USR1' USR1
trap 'ask HUP' HUP

(
  trap '' USR1 HUP  # inherited by the ranks, until they listen themselves
  exec "${launch[@]}" -m opensora_dist "$@"
) &
torchrun=$!
wait "$torchrun"
code=$?
while kill -0 "$torchrun" 2> /dev/null; do  # a signal ended the wait
  wait "$torchrun"
  code=$?
done
wait "$torchrun" 2> /dev/null
last=$?
((last == 127)) || code=$last
(exit "$code")
