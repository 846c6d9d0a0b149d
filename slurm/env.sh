# What the batch files share: three lines to edit, the checks before training, and the way back after a failure.
# shellcheck shell=bash

# ---- Edit these three lines, or set the variables before sbatch.
: "${QTRAIN_PYTHON:=${SLURM_SUBMIT_DIR:-$PWD}/.venv/bin/python}"   # a Python that has qtrain, at the same path on each node
: "${QTRAIN_OUTPUT:=${SLURM_SUBMIT_DIR:-$PWD}/outputs}"            # where runs go: a folder that all nodes share
: "${QTRAIN_DATA:=}"                                               # a folder with images that all nodes see; empty: none

: "${QTRAIN_RESTARTS:=10}"   # so many times a job that failed for no reason of the user's starts again by itself

export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"   # newer SLURMs do not hand it on to srun
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"            # compute nodes rarely have internet; without this each look-up
export PYTHONUNBUFFERED=1                               # waits for it
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"   # a dead peer is an error, not a wait

# How scontrol calls this job: the last task of an array has the number of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

say() { echo "qtrain: $*"; }

# Run on each node by check: prints what is wrong there, nothing if all is well.
check_node() {
    local here at
    here=$(hostname -s)
    "$QTRAIN_PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("qtrain") is None)' 2>/dev/null ||
        echo "$here: $QTRAIN_PYTHON is no Python that has qtrain; edit QTRAIN_PYTHON in slurm/env.sh"
    [ -e "$QTRAIN_OUTPUT/.check-$SLURM_JOB_ID" ] ||
        echo "$here: does not see what the first node wrote to $QTRAIN_OUTPUT; QTRAIN_OUTPUT in slurm/env.sh must be a folder that all nodes share"
    at=$QTRAIN_OUTPUT/.check-$SLURM_JOB_ID-$here
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
    mkdir -p "$QTRAIN_OUTPUT" 2>/dev/null
    (: >"$QTRAIN_OUTPUT/.check-$SLURM_JOB_ID") 2>/dev/null
    export QTRAIN_PYTHON QTRAIN_OUTPUT QTRAIN_DATA
    export -f check_node
    wrong=$(srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -c check_node 2>&1)
    rm -f "$QTRAIN_OUTPUT/.check-$SLURM_JOB_ID"
    if [ -n "$wrong" ]; then
        while read -r line; do say "error: $line"; done <<<"$wrong"
        exit 2
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

# End with $code; or start the job anew where a node, a rank or the network failed, and not the user. Codes that are
# final: 0, 2 (something to mend, said in one line), 130 and 143 (somebody wanted an end).
finish() {
    case $code in
    0 | 2 | 130 | 143) exit "$code" ;;
    esac
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$QTRAIN_RESTARTS" ]; then
        say "ended with code $code, and was restarted $QTRAIN_RESTARTS times (QTRAIN_RESTARTS in slurm/env.sh): no more"
        exit "$code"
    fi
    say "ended with code $code; requeued, to go on from the last resume point"
    scontrol requeue "$job" || exit "$code"
    sleep 600   # SLURM ends the job now
}
