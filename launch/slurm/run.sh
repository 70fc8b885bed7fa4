# The rest of the batch script: plain shell, which reads the values above it.
set_up=yes
set -uo pipefail
attempt="$own.${SLURM_RESTART_COUNT:-0}"
task=()
if [ "$parts" -gt 0 ]; then
  # Each round of an array has tasks of its own.
  task=(--task "$(((${1:-1} - 1) * parts + SLURM_ARRAY_TASK_ID))")
  program+=(--part "$SLURM_ARRAY_TASK_ID/$parts")
fi
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
num_nodes=$SLURM_JOB_NUM_NODES
export OPENSORA_LOGS="$run_dir/logs/$attempt"
mkdir -p "$OPENSORA_LOGS"

# Runs a command, and returns its exit code, whatever signals come meanwhile: a shell hears none while it waits for a command in the foreground.
run() {
  local code last=
  starting=yes
  "$@" &
  child=$!
  starting=
  tell
  while :; do
    interrupted=
    wait "$child"
    code=$?
    # 127 is that of a command that isn't there, or of a child that an interrupted wait has told the end of already.
    [ "$code" -ne 127 ] || return "${last:-127}"
    [ -n "$interrupted" ] || return "$code"
    last=$code
  done
}

# A step of the job, with or without its container.
step() {
  run srun --cpu-bind=none "${step_options[@]}" "$@"
}

# opensora-dist on one node.
opensora() {
  run "${head[@]}" "$python" -m opensora_dist "$@"
}

# Does what the end of an attempt means; the exit code of this job.
end() {
  local by=()
  ending=yes # what runs from here on isn't to be stopped
  [ -z "$passing" ] || kill "$passing" 2> /dev/null
  if cancelled; then by=(--stopped-by user); elif [ -n "$asked" ]; then by=(--stopped-by scheduler); fi
  opensora node end "$submission" --attempt "$attempt" "${task[@]}" "${by[@]}" --code "$1"
  case $? in
    0 | 12)
      end_chain
      return 0
      ;;
    11)
      end_chain
      return 1
      ;;
    *)
      # 10, or it could not say: then `node begin` of the next attempt does, and ends it where that is of no use.
      again
      return 10
      ;;
  esac
}

again() {
  [ "$restarts" = requeue ] || return
  if cancelled; then return; fi # since it was asked how it ended
  # Slurm itself starts a job again that it preempts, or whose nodes fail; one whose time is up it doesn't.
  [ -z "$ended_by_slurm" ] || [ "$(known Reason)" = TimeLimit ] || return
  trap - TERM USR1
  if scontrol requeue "$own"; then
    sleep 60 # until Slurm takes it down
  else
    echo "error: the job can't be requeued; where the site forbids it, set slurm.requeue=chain and submit again" >&2
  fi
}

# Goes on without nodes that are unfit, in another job.
without() {
  local excluded next=
  ending=yes # the note of it isn't to be stopped
  excluded=$(known ExcNodeList)
  case $excluded in "" | "(null)") excluded=$1 ;; *) excluded="$excluded,$1" ;; esac
  echo "goes on without $excluded"
  if [ "$restarts" = chain ]; then
    while read -r id; do
      scontrol update JobId="$id" ExcNodeList="$excluded" && next=$id
    done < <(waiting)
  else
    # Of this job's environment, what Slurm has put there is not for the next.
    next=$(
      config=${SLURM_CONF:-}
      unset "${!SLURM_@}"
      [ -z "$config" ] || export SLURM_CONF="$config"
      sbatch --parsable --chdir="$submission" --exclude="$excluded" "$submission/job.sbatch"
    )
  fi
  if [ -n "$next" ]; then opensora node resubmitted "$submission" "${next%%;*}"; else end 30; fi
}

check_nodes() {
  local unfit code links
  step --nodes="$num_nodes" --ntasks="$num_nodes" --kill-on-bad-exit=0 --time="$(((preflight_s + 119) / 60))" \
    "${container[@]}" "$python" -m opensora_dist node preflight "$submission" --attempt "$attempt"
  MASTER_PORT=$((port + 1)) step --nodes="$num_nodes" --ntasks="$((num_nodes * links_per_node))" \
    --ntasks-per-node="$links_per_node" --overcommit --kill-on-bad-exit=0 --time="$(((preflight_s + 119) / 60))" \
    "${container[@]}" bash "$submission/network.sh" "$python" -m opensora_dist node links "$submission" --attempt "$attempt" --device "$device"
  links=$?
  unfit=$(opensora node verdict "$submission" --attempt "$attempt" "${nodes[@]}")
  code=$?
  if [ -n "$asked" ]; then
    end 1
    false
  elif [ "$code" -eq 0 ] && [ "$links" -ne 0 ]; then
    echo "error: links between the nodes could not be tried (exit code $links), which no node can be blamed for; see above" >&2
    end 31
    false
  elif [ "$code" -eq 30 ]; then
    without "$unfit"
    false
  elif [ "$code" -ne 0 ]; then
    end "$code"
    false
  fi
}

opensora node begin "$submission" --attempt "$attempt" "${task[@]}"
code=$?
if [ -n "$asked" ] && [ "$code" -ne 20 ] && [ "$code" -ne 21 ]; then
  end 1
  exit
elif [ "$code" -ne 0 ]; then
  end_chain
  exit $((code != 20))
fi

# An address of the first node that the others can reach. A node alone is its own.
address=127.0.0.1
if [ "$num_nodes" -gt 1 ]; then
  address=$(getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 { print $1 }')
  case "$address" in
    "" | 127.*)
      echo "error: ${nodes[0]} is '${address:-unknown}' to itself, where no other node finds it; mend its name in /etc/hosts or DNS" >&2
      end 2
      exit
      ;;
  esac
fi
port=$((first_port + SLURM_JOB_ID % 1000))
export MASTER_ADDR="$address"

# A node that was cut off, and comes back just as the job is started again, can be taken from it (Slurm 22.05): steps then wait for ever.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && ! step --nodes="$num_nodes" --ntasks="$num_nodes" --immediate=60 true; then
  end 1
  exit
fi
[ "$preflight_s" -eq 0 ] || check_nodes || exit
case $start in
  torchrun)
    # torchrun dies by USR1, and gives its ranks half a minute when it is sent TERM: both are for the ranks alone (node.sh).
    export OPENSORA_ENDINGS="$submission/endings/$attempt"
    mkdir -p "$OPENSORA_ENDINGS"
    step --nodes="$num_nodes" --ntasks="$num_nodes" --kill-on-bad-exit=0 --wait="$save_s" --label bash "$submission/node.sh" \
      "${container[@]}" bash "$submission/network.sh" "$python" -m torch.distributed.run --nnodes="$num_nodes" --nproc-per-node="$ranks_per_node" \
      --master-addr="$address" --master-port="$port" --signals-to-handle=SIGINT --no-python \
      bash "$submission/rank.sh" "$python" -m opensora_dist "${program[@]}"
    ;;
  step)
    step --nodes=1 --ntasks=1 bash "$submission/rank.sh" "${container[@]}" "$python" -m opensora_dist "${program[@]}"
    ;;
  script)
    # It starts the steps of this job itself.
    alone=yes
    run bash "$submission/rank.sh" "${container[@]}" "$python" -m opensora_dist "${program[@]}"
    ;;
esac
end $?
