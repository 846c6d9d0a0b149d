# What the batch files share: three lines to edit, the checks before training, and the way back after a failure.
# shellcheck shell=bash

# ---- Edit these three lines, or set the variables before sbatch.
: "${QTRAIN_PYTHON:=${SLURM_SUBMIT_DIR:-$PWD}/.venv/bin/python}"   # a Python that has qtrain, at the same path on each node
: "${QTRAIN_OUTPUT:=${SLURM_SUBMIT_DIR:-$PWD}/outputs}"            # where runs go: a folder that all nodes share
: "${QTRAIN_DATA:=}"                                               # a folder with images that all nodes see; empty: none

: "${QTRAIN_RESTARTS:=10}"   # so many times a job starts again by itself after a failure that is not the user's

export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"   # newer SLURMs do not hand it on to srun
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"            # compute nodes rarely have internet; without this each look-up
export PYTHONUNBUFFERED=1                               # waits for it
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"   # a dead peer is an error, not a wait

# How scontrol calls this job: the last task of an array has the number of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

notes=$QTRAIN_OUTPUT/.jobs/$SLURM_JOB_ID   # of an array's task: its own
export QTRAIN_EXIT_FILE=$notes.exit

# A job that starts again goes on, whatever its first start was asked to do with what it found.
# shellcheck disable=SC2034  # for the files that source this one
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then go_on=(resume=true overwrite=false); else go_on=(); fi

say() { echo "qtrain: $*"; }

# Run on each node by check: prints what is wrong there, nothing if all is well.
check_node() {
    local here at
    here=$(hostname -s)
    "$QTRAIN_PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("qtrain") is None)' 2>/dev/null ||
        echo "$here: $QTRAIN_PYTHON is no Python that has qtrain; edit QTRAIN_PYTHON in slurm/env.sh"
    [ -e "$QTRAIN_OUTPUT/.jobs/$SLURM_JOB_ID.check" ] ||
        echo "$here: does not see what the first node wrote to $QTRAIN_OUTPUT; QTRAIN_OUTPUT in slurm/env.sh must be a folder that all nodes share"
    at=$QTRAIN_OUTPUT/.jobs/$SLURM_JOB_ID.check-$here
    (: >"$at") 2>/dev/null || echo "$here: cannot write to $QTRAIN_OUTPUT; edit QTRAIN_OUTPUT in slurm/env.sh"
    rm -f "$at"
    if [ -n "$QTRAIN_DATA" ] && ! ls "$QTRAIN_DATA/" >/dev/null 2>&1; then
        echo "$here: no folder $QTRAIN_DATA; edit QTRAIN_DATA in slurm/env.sh"
    fi
    if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && ! nvidia-smi --list-gpus >/dev/null 2>&1; then
        echo "$here: SLURM gave the job $SLURM_GPUS_ON_NODE GPUs, but nvidia-smi finds none"
    fi
}

# Whether each node has what a run needs; what it lacks is said in one line each, and the job ends with code 2.
check() {
    local wrong
    if [ "${SLURM_NTASKS:-1}" -gt 1 ] && [ -z "${SLURM_NTASKS_PER_NODE:-}" ]; then
        say "error: give --ntasks-per-node, one task for each device, instead of --ntasks" && exit 2
    fi
    mkdir -p "$QTRAIN_OUTPUT/.jobs" 2>/dev/null
    rm -f "$QTRAIN_EXIT_FILE"
    (: >"$notes.check") 2>/dev/null
    export QTRAIN_PYTHON QTRAIN_OUTPUT QTRAIN_DATA
    export -f check_node
    # What else is said, of a locale that a node lacks for instance, goes to the log and is no fault.
    wrong=$(srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -c check_node)
    local code=$?
    rm -f "$notes.check"
    if [ -n "$wrong" ]; then
        while read -r line; do say "error: $line"; done <<<"$wrong"
        exit 2
    fi
    if [ "$code" -ne 0 ]; then
        say "error: srun could not look at the nodes (code $code); its own words stand above" && exit 2
    fi
    say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NNODES nodes ($SLURM_JOB_NODELIST)," \
        "${SLURM_NTASKS:-1} ranks, ${SLURM_GPUS_ON_NODE:-no} GPUs on a node, output in $QTRAIN_OUTPUT"
}

# Run a command to its end, although SLURM also signals this shell. Its code is left in $code.
persist() {
    trap : TERM USR1
    "$@" &
    local child=$!
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        code=$?
    done
    trap - TERM USR1
}

# End with $code; or start the job anew where a node, a rank or the network failed, and not the user. srun's code does not
# tell: it is the highest of all ranks, and those that srun itself ends have 143. A run that wants its end to be final,
# since something is to be mended or somebody stopped it, leaves its code in $QTRAIN_EXIT_FILE.
finish() {
    local failures shown
    shown=$(scontrol show job --oneliner "$job")
    if [[ $shown == *JobState=RUNNING* && $shown == *PreemptTime=2* ]]; then
        say "preempted; requeued"
        again
    fi
    if [ -e "$QTRAIN_EXIT_FILE" ]; then
        code=$(cat "$QTRAIN_EXIT_FILE")
        rm -f "$notes".*
        exit "$code"
    fi
    if [ "$code" -eq 0 ]; then
        rm -f "$notes".*
        exit 0
    fi
    [[ $shown == *JobState=RUNNING* ]] || exit "$code"   # cancelled, or requeued already
    echo "$code" >>"$notes.failures"
    failures=$(wc -l <"$notes.failures")
    if [ "$failures" -gt "$QTRAIN_RESTARTS" ]; then
        say "ended with code $code after $QTRAIN_RESTARTS restarts, no more (QTRAIN_RESTARTS in slurm/env.sh)"
        rm -f "$notes".*
        exit "$code"
    fi
    say "ended with code $code; requeued, to go on from the last resume point"
    again
}

# Have SLURM start this job anew, and wait for the end of this start.
again() {
    scontrol requeue "$job" || exit "$code"
    sleep 600
    exit "$code"
}
