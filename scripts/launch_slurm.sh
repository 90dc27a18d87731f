#!/usr/bin/env bash
# A run on the GPUs of a SLURM cluster, from its login node.
#
#   scripts/launch_slurm.sh run NAME --nodes=2 --gpus-per-node=8 [OPTIONS] -- train --config=configs/dpo_llama3.py \
#       --config.workdir=/shared/run
#   scripts/launch_slurm.sh logs|status|stop NAME
#
#   run      copies this checkout as it stands to the run's folder (what is edited later does not reach a queued run),
#            submits `jaxalign ARGUMENTS` and follows the log; ends with the run's exit status. After status 75
#            (preempted, or the time limit is near, and saved) the job requeues itself, after no other. Ctrl-C leaves it.
#   logs     follows the log to the end of the job
#   status   the job in the queue, and the run's last exit status
#   stop     the run saves, exits with 75 and is not requeued; a queued job is cancelled
#
#   --nodes=N (1)  --gpus-per-node=N (8)  --cpus-per-task=N (8)
#   --sbatch=FLAG     any other flag of sbatch, such as --sbatch=--partition=gpu or --sbatch=--time=12:00:00; repeatable
#   --python=PATH     with jaxalign's dependencies; by default the `python` that runs here
#   --ship=FILE       one more file or folder, to the top of the checkout; repeatable
#   --dry-run         prints every command instead
#
# One process per GPU: that is what JAX expects of SLURM (jax.distributed.initialize takes the GPU of number SLURM_LOCALID
# for each task), and why no task is bound to a GPU of its own (--gpus-per-task would do it): each must see all of its
# node's. Runs lie in ${JAXALIGN_RUNS:-~/jaxalign-runs}, which all nodes must see. HF_TOKEN of your environment reaches the
# nodes as a file that only you can read (HF_TOKEN_PATH); sbatch never sees it.
#
# Flags: https://slurm.schedmd.com/sbatch.html, scancel.html, squeue.html; docs/pods.md says which stands on what.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() {
    echo "launch_slurm: $*" >&2
    exit 2
}

[[ $# -ge 2 ]] || fail "expected COMMAND NAME; see the top of ${BASH_SOURCE[0]}"
command=$1 name=$2
shift 2
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] || fail "NAME is '$name', expected letters, digits, '_', '.' and '-'"

nodes=1 gpus=8 cpus=8 python='' sbatch=() ships=() dry_run=''
while [[ $# -gt 0 ]]; do
    case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus-per-node=*) gpus=${1#*=} ;;
    --cpus-per-task=*) cpus=${1#*=} ;;
    --sbatch=*) sbatch+=("${1#*=}") ;;
    --python=*) python=${1#*=} ;;
    --ship=*) ships+=("${1#*=}") ;;
    --dry-run) dry_run=yes ;;
    --)
        shift
        break
        ;;
    *) fail "unknown option $1 (what jaxalign gets stands after --)" ;;
    esac
    shift
done
folder=${JAXALIGN_RUNS:-$HOME/jaxalign-runs}/$name
exec 3>&2
if [[ -n $dry_run ]]; then exec 3>&1; fi

# Says the command, and runs it unless --dry-run.
call() {
    local word
    printf '+' >&3
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=@%,+-]+$ ]] || word=${word@Q}
        printf ' %s' "$word" >&3
    done
    echo >&3
    if [[ -z $dry_run ]]; then "$@"; fi
}

job() {
    [[ -s $folder/job ]] || fail "there is no run $name in ${folder%/*}"
    cat "$folder/job"
}
in_queue() { [[ -n $(squeue --noheader --jobs="$1" --format=%T 2>/dev/null) ]]; }

# Copies the code, keeps the token, submits the job.
submit() {
    local id
    call mkdir -p -m 700 "$folder"
    call "$here/pack_code.sh" "$folder/code.tar.gz" "${ships[@]}"
    call rm -rf "$folder/code" "$folder/stop" "$folder/status"
    call mkdir "$folder/code"
    call tar -xzf "$folder/code.tar.gz" -C "$folder/code"
    call ln -s ../runs "$folder/code/runs" # relative workdirs stay when the code is copied anew
    if [[ -n ${HF_TOKEN:-} && -z $dry_run ]]; then
        (umask 077 && printf '%s' "$HF_TOKEN" >"$folder/token") # by the shell itself: no process shows it
    fi
    # --signal without "B:" goes to the job's steps, not to its script, 300 s before the time limit.
    id=$(call env -u HF_TOKEN -u HUGGING_FACE_HUB_TOKEN sbatch --parsable "--job-name=$name" "--nodes=$nodes" \
        "--gpus-per-node=$gpus" "--ntasks-per-node=$gpus" "--cpus-per-task=$cpus" "--chdir=$folder" \
        "--output=$folder/log" --open-mode=append --requeue --signal=TERM@300 "${sbatch[@]}" \
        "$folder/code/scripts/slurm_job.sh" "$python" "$@")
    if [[ -z $dry_run ]]; then echo "${id%%;*}" >"$folder/job"; fi
}

# Follows the log while the job is queued or runs.
follow() {
    local id tail_pid
    id=$(job)
    touch "$folder/log"
    tail -n +1 -F "$folder/log" 2>/dev/null &
    tail_pid=$!
    while in_queue "$id"; do sleep "${POLL_SECONDS:-10}"; done
    sleep 1 # for the last lines
    kill "$tail_pid"
}

case $command in
run)
    [[ $# -gt 0 ]] || fail "what should run? give jaxalign's arguments after --, such as -- train --config=..."
    python=${python:-$(command -v python || true)}
    [[ -n $python ]] || fail "there is no python here: give --python, one with jaxalign's dependencies"
    if [[ -s $folder/job ]] && in_queue "$(job)"; then fail "job $(job) of $name is in the queue: stop it first"; fi
    submit "$@"
    [[ -z $dry_run ]] || exit 0
    echo "$name is job $(job); its folder is $folder" >&2
    follow
    [[ -s $folder/status ]] || fail "job $(job) ended without a status of the run: was it cancelled? See $folder/log"
    echo "$name: the run exited with $(cat "$folder/status")" >&2
    exit "$(cat "$folder/status")"
    ;;
logs) follow ;;
status)
    call squeue "--jobs=$(job)"
    if [[ -s $folder/status ]]; then echo "last exit status: $(cat "$folder/status")"; fi
    ;;
stop)
    id=$(job)
    call touch "$folder/stop"
    call scancel --quiet --state=PENDING "$id"
    call scancel --quiet --state=RUNNING --signal=TERM "$id" # to the steps, not to the script
    ;;
*) fail "unknown command $command: run, logs, status or stop" ;;
esac
