# The rest of the batch script: plain shell, which reads the values above it.
set -uo pipefail
attempt="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
task=()
if [ "$parts" -gt 0 ]; then
  # Each round of an array has tasks of its own.
  task=(--task "$(((${1:-1} - 1) * parts + SLURM_ARRAY_TASK_ID))")
  program+=(--part "$SLURM_ARRAY_TASK_ID/$parts")
fi
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export OPENSORA_LOGS="$run_dir/logs/$attempt"
mkdir -p "$OPENSORA_LOGS"

# Slurm asks this script alone to stop, by USR1 some time before the time limit or a preemption, and by TERM when it ends the job; so does
# `opensora-dist cancel`, by TERM. It is passed on to the job's steps until they have ended, since a process that is just starting loses it.
asked=
interrupted=
passing=
pass_on() {
  local signal=$1 passed_s=0
  while [ "$passed_s" -lt "$save_s" ]; do
    if [ -n "$alone" ]; then kill -s "$signal" "$alone"; else scancel --signal="$signal" "$SLURM_JOB_ID"; fi
    sleep 15
    passed_s=$((passed_s + 15))
  done
  echo "asked to stop ${save_s} s ago by $signal, and still running: killed" >&2
  scancel --signal=KILL "$SLURM_JOB_ID"
}
stop() {
  interrupted=yes
  if [ -z "$asked" ]; then
    asked=$1
    echo "asked to stop, by $1"
    pass_on "$1" &
    passing=$!
  fi
}
alone=
ended_by_slurm=
trap 'stop USR1' USR1
trap 'ended_by_slurm=yes; stop TERM' TERM

# Waits for a process to end, through signals; its exit code.
finished() {
  local code last=0
  while :; do
    interrupted=
    wait "$1"
    code=$?
    [ "$code" -ne 127 ] || return "$last"
    [ -n "$interrupted" ] || return "$code"
    last=$code
  done
}

# A step of the job, with or without its container.
step() {
  srun --cpu-bind=none "${step_options[@]}" "$@" &
  finished $!
}

# opensora-dist on this node. Not a child that the shell waits for in the foreground: signals are to be heard at once.
opensora() {
  if [ "${#step_options[@]}" -gt 0 ]; then
    srun --cpu-bind=none --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" "${step_options[@]}" "$python" -m opensora_dist "$@" &
  else
    "${container[@]}" "$python" -m opensora_dist "$@" &
  fi
  finished $!
}

# Jobs of this submission that wait for this one.
waiting() {
  squeue --noheader --user="$(id -u)" --states=PENDING --format='%A %k' | awk -v name="$job_name" -v own="$SLURM_JOB_ID" '$2 == name && $1 != own { print $1 }'
}

# Nothing goes on after this job: the rest of a chain, each of which would start where the one before has not come to an end, is taken back.
last() {
  local ids
  [ "$restarts" = chain ] && mapfile -t ids < <(waiting) && [ -n "${ids[*]}" ] && scancel "${ids[@]}"
  exit "$1"
}

# Ends with what the end of an attempt means.
end() {
  opensora node end "$submission" --attempt "$attempt" "${task[@]}" --code "$1"
  local next=$?
  [ -z "$passing" ] || kill "$passing" 2> /dev/null
  case $next in
    0 | 12) last 0 ;;
    10) again ;;
  esac
  last 1
}

again() {
  [ "$restarts" = requeue ] || exit 10
  # Where Slurm ends the job itself, it starts a preempted one again, and a cancelled one never; but not one whose time is up.
  if [ -z "$ended_by_slurm" ] || scontrol show job "$SLURM_JOB_ID" | grep -q 'Reason=TimeLimit'; then
    trap '' TERM
    if scontrol requeue "$SLURM_JOB_ID"; then
      sleep 60 # until it is taken down
    else
      echo "error: the job can't be requeued; where the site forbids it, set slurm.requeue=chain and submit again" >&2
    fi
  fi
  exit 1
}

# Goes on without nodes that are unfit, in another job.
without() {
  local excluded next
  excluded=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
  [ "$excluded" != "(null)" ] && [ -n "$excluded" ] && set -- "$excluded,$1"
  echo "goes on without $1"
  if [ "$restarts" = chain ]; then
    next=
    while read -r id; do
      scontrol update JobId="$id" ExcNodeList="$1" && next=${next:-$id}
    done < <(waiting)
  else
    next=$(sbatch --parsable --chdir="$submission" --exclude="$1" "$submission/job.sbatch")
  fi
  [ -n "$next" ] || end 30
  opensora node resubmitted "$submission" "${next%%;*}"
  exit 1
}

check_nodes() {
  local unfit code
  step --nodes="${#nodes[@]}" --ntasks-per-node=1 --kill-on-bad-exit=0 --time="$(((preflight_s + 119) / 60))" \
    "${container[@]}" "$python" -m opensora_dist node preflight "$submission" --attempt "$attempt"
  MASTER_ADDR=$address MASTER_PORT=$((port + 1)) step --nodes="${#nodes[@]}" --ntasks-per-node="$links_per_node" --overcommit \
    --kill-on-bad-exit=0 --time="$(((preflight_s + 119) / 60))" \
    "${container[@]}" "$python" -m opensora_dist node links "$submission" --attempt "$attempt"
  [ -z "$asked" ] || end 1
  unfit=$(opensora node verdict "$submission" --attempt "$attempt" "${nodes[@]}")
  code=$?
  case $code in
    0) ;;
    30) without "$unfit" ;;
    *) end "$code" ;;
  esac
}

opensora node begin "$submission" --attempt "$attempt" "${task[@]}"
case $? in
  0) ;;
  20) last 0 ;;
  *) last 1 ;;
esac

# An address of the first node that the others can reach. A node alone is its own.
address=127.0.0.1
if [ "${#nodes[@]}" -gt 1 ]; then
  address=$(getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 { print $1 }')
  case "$address" in
    "" | 127.*)
      echo "error: ${nodes[0]} is '${address:-unknown}' to itself, where no other node finds it; mend its name in /etc/hosts or DNS" >&2
      end 2
      ;;
  esac
fi
port=$((first_port + SLURM_JOB_ID % 1000))

[ "$preflight_s" -eq 0 ] || check_nodes
[ -z "$asked" ] || end 1

case $start in
  torchrun)
    # torchrun dies by USR1, and gives its ranks half a minute when it is sent TERM: both are for the ranks alone (node.sh).
    export OPENSORA_ENDINGS="$submission/endings/$attempt"
    mkdir -p "$OPENSORA_ENDINGS"
    step --nodes="${#nodes[@]}" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait="$save_s" --label bash "$submission/node.sh" \
      "${container[@]}" "$python" -m torch.distributed.run --nnodes="${#nodes[@]}" --nproc-per-node="$ranks_per_node" \
      --master-addr="$address" --master-port="$port" --signals-to-handle=SIGINT --no-python \
      bash "$submission/rank.sh" "$python" -m opensora_dist "${program[@]}"
    ;;
  step)
    step --nodes=1 --ntasks=1 bash "$submission/rank.sh" "${container[@]}" "$python" -m opensora_dist "${program[@]}"
    ;;
  script)
    # It starts the steps of this job itself.
    bash "$submission/rank.sh" "${container[@]}" "$python" -m opensora_dist "${program[@]}" &
    alone=$!
    finished "$alone"
    ;;
esac
end $?
