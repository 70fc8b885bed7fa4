# What a batch script does when it is told to stop, from its first line on: plain shell, which reads the values above it.
# The number of an array's last task is that of the whole array.
own=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
own=${own:-$SLURM_JOB_ID}

# What Slurm says of this job.
known() {
  scontrol --oneliner show job "$own" | grep -o "\b$1=[^ ]*" | head -n 1 | cut -d= -f2
}

# Slurm ends this job, and not for its time, its nodes or another job.
cancelled() {
  [ -n "$ended_by_slurm" ] && [ "$(known Reason)" = None ] && case $(known PreemptTime) in "" | None) true ;; *) false ;; esac
}

# Jobs of this submission that wait for this one, the last first.
waiting() {
  squeue --noheader --user="$(id -u)" --states=PENDING --format='%A %k' | awk -v name="$job_name" '$2 == name { print $1 }' | sort -rn
}

# Nothing goes on after this job: the rest of a chain, which would start when this job has failed, is taken back, one by one from its end, so
# that none sees the end of the one before.
end_chain() {
  [ "$restarts" != chain ] || waiting | xargs -r -n 1 scancel
}

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
# Once, and not while a process is being started: `$!` would be that of pass_on; nor what tells how the job ended.
tell() {
  if [ -z "$asked" ] || [ -n "$passing" ] || [ -n "$starting" ] || [ -n "$ending" ]; then return; fi
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
  # At once: this script may be killed before it comes to its end.
  if cancelled; then end_chain; fi
}
on_exit() {
  [ -z "$passing" ] || kill "$passing" 2> /dev/null
  # Modules or lines of setup ended it, and would end the next of a chain; unless they were ended themselves, by what isn't their fault.
  if [ -z "$set_up" ] && { [ -z "$asked" ] || cancelled; }; then end_chain; fi
}
alone=
child=
starting=
ending=
interrupted=
ended_by_slurm=
set_up=
trap on_usr1 USR1
trap on_term TERM
trap on_exit EXIT
