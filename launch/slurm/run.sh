# The rest of the batch script: plain shell, which reads the values above it.
set -uo pipefail
# The number of an array's last task is that of the whole array.
own=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
own=${own:-$SLURM_JOB_ID}
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

# Slurm asks this script alone to stop, by USR1 some time before the time limit or a preemption, and by TERM when it ends the job; so does
# `opensora-dist cancel`, by TERM. It is passed on to the job's steps until they have ended, since a process that is just starting loses it.
asked=
passing=
pass_on() {
  local signal=$1 until
  until=$(last_moment "$signal")
  while [ "$(date +%s)" -lt "$until" ]; do
    if [ -n "$alone" ]; then kill -s "$signal" "$child"; else scancel --signal="$signal" "$own"; fi
    sleep 5
  done
  echo "asked to stop by $signal, and still running: killed" >&2
  # Step by step: KILL to the job as a whole would end this script, too.
  squeue --noheader --steps --jobs="$own" --format=%i | grep '[.][0-9]*$' | xargs -r scancel
}
# Until when they may save, in seconds: before a time limit, so long that this script can still ask for another start.
last_moment() {
  local limit
  limit=$(known EndTime) # Unknown where there is none
  if [ "$1" = TERM ]; then
    echo $(($(date +%s) + save_s))
  elif limit=$(date -d "${limit:-Unknown}" +%s 2> /dev/null); then
    echo $((limit - (save_s < 60 ? save_s / 3 : 20)))
  else
    echo 9999999999
  fi
}
# Once, and not while a process is being started: `$!` would be that of pass_on.
tell() {
  if [ -z "$asked" ] || [ -n "$passing" ] || [ -n "$starting" ]; then return; fi
  pass_on "$asked" &
  passing=$!
}
stop() {
  interrupted=yes
  [ -n "$asked" ] || echo "asked to stop, by $1"
  asked=${asked:-$1}
  tell
}
on_usr1() { stop USR1; }
on_term() {
  ended_by_slurm=yes
  stop TERM
}
alone=
child=
starting=
interrupted=
ended_by_slurm=
trap on_usr1 USR1
trap on_term TERM
trap '[ -z "$passing" ] || kill "$passing" 2> /dev/null' EXIT

# Runs a command, and returns its exit code, whatever signals come meanwhile: a shell hears none while it waits for a command in the foreground.
run() {
  local code last=0
  starting=yes
  "$@" &
  child=$!
  starting=
  tell
  while :; do
    interrupted=
    wait "$child"
    code=$?
    [ "$code" -ne 127 ] || return "$last"
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

# Jobs of this submission that wait for this one.
waiting() {
  squeue --noheader --user="$(id -u)" --states=PENDING --format='%A %k' | awk -v name="$job_name" '$2 == name { print $1 }'
}

# Nothing goes on after this job: the rest of a chain, which would start when this job has failed, is taken back.
end_chain() {
  local ids
  if [ "$restarts" = chain ] && mapfile -t ids < <(waiting) && [ -n "${ids[*]}" ]; then scancel "${ids[@]}"; fi
}

# What Slurm says of this job.
known() {
  scontrol --oneliner show job "$own" | grep -o "\b$1=[^ ]*" | head -n 1 | cut -d= -f2
}

# Slurm ends this job, and not for its time, its nodes or another job.
cancelled() {
  [ -n "$ended_by_slurm" ] && [ "$(known Reason)" = None ] && case $(known PreemptTime) in "" | None) true ;; *) false ;; esac
}

# Does what the end of an attempt means; the exit code of this job.
end() {
  local next
  alone= # what runs from here on isn't to be stopped
  [ -z "$passing" ] || kill "$passing" 2> /dev/null
  opensora node end "$submission" --attempt "$attempt" "${task[@]}" --code "$1"
  next=$?
  # The ranks don't know who sent a TERM: a user, who means it, or Slurm, which then starts the job again or should be asked to.
  if [ "$next" -eq 12 ] && [ -n "$ended_by_slurm" ] && ! cancelled; then next=10; fi
  if [ "$next" -eq 10 ] && ! cancelled; then
    again
    return 10
  fi
  end_chain
  case $next in 0 | 12) return 0 ;; *) return 1 ;; esac
}

again() {
  [ "$restarts" = requeue ] || return
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
  excluded=$(known ExcNodeList)
  case $excluded in "" | "(null)") excluded=$1 ;; *) excluded="$excluded,$1" ;; esac
  echo "goes on without $excluded"
  if [ "$restarts" = chain ]; then
    while read -r id; do
      scontrol update JobId="$id" ExcNodeList="$excluded" && next=${next:-$id}
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
  local unfit code
  step --nodes="$num_nodes" --ntasks="$num_nodes" --kill-on-bad-exit=0 --time="$(((preflight_s + 119) / 60))" \
    "${container[@]}" "$python" -m opensora_dist node preflight "$submission" --attempt "$attempt"
  MASTER_PORT=$((port + 1)) step --nodes="$num_nodes" --ntasks="$((num_nodes * links_per_node))" \
    --ntasks-per-node="$links_per_node" --overcommit --kill-on-bad-exit=0 --time="$(((preflight_s + 119) / 60))" \
    "${container[@]}" bash "$submission/network.sh" "$python" -m opensora_dist node links "$submission" --attempt "$attempt" --device "$device"
  unfit=$(opensora node verdict "$submission" --attempt "$attempt" "${nodes[@]}")
  code=$?
  if [ -n "$asked" ]; then
    end 1
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
if [ -n "$asked" ]; then
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
