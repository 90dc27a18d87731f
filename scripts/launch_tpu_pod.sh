#!/usr/bin/env bash
# A run on a Cloud TPU slice, from your own machine, by gcloud.
#
#   scripts/launch_tpu_pod.sh run NAME --zone=ZONE [OPTIONS] -- train --config=configs/dpo_llama3.py \
#       --config.workdir=gs://bucket/run
#   scripts/launch_tpu_pod.sh logs|status|stop|create|delete NAME --zone=ZONE [OPTIONS]
#
#   run      ships this checkout as it stands to all hosts, starts `jaxalign ARGUMENTS` on each, follows the first one's
#            log, and ends with the run's exit status. Hosts start again by themselves after status 75 (preempted and
#            saved), and after no other. With --type the slice is made if it is not there, and again when a spot slice
#            was taken away: the run continues from its workdir, which must then be a bucket. Ctrl-C leaves it running.
#   logs     follows a host's log (--worker, 0) to the end of the run
#   status   of the slice and of every host's run: "running", or its exit status
#   stop     the run saves, exits with 75 and stays so
#   create   makes the slice (--type) as a queued resource and waits for it
#   delete   gives the slice back: nothing else does
#
#   --project=P       as gcloud's
#   --type=v5p-16     accelerator type; --version=V its software, by default the one for JAX; --spot
#   --ship=FILE       one more file or folder, to the top of the checkout (a config or data from elsewhere); repeatable
#   --worker=N        whose log
#   --dry-run         prints every command instead
#
# HF_TOKEN of your environment reaches the hosts as a file that only you can read (HF_TOKEN_PATH), on no command line.
# With several hosts gcloud wants its SSH key in your agent: ssh-add ~/.ssh/google_compute_engine
#
# Flags: gcloud compute tpus queued-resources create, describe, delete; gcloud compute tpus tpu-vm ssh, scp
# (https://cloud.google.com/sdk/gcloud/reference/compute/tpus); states: https://cloud.google.com/tpu/docs/queued-resources;
# software: https://cloud.google.com/tpu/docs/runtimes; docs/pods.md quotes the page of each.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() {
    echo "launch_tpu_pod: $*" >&2
    exit 2
}

[[ ${BASH_VERSINFO[0]} -ge 5 ]] || fail "bash $BASH_VERSION is too old: 5 or newer (macOS: brew install bash)"
[[ $# -ge 2 ]] || fail "expected COMMAND NAME --zone=ZONE; see the top of ${BASH_SOURCE[0]}"
command=$1 name=$2
shift 2
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "NAME is '$name', expected small letters, digits and '-'"

zone='' project='' type='' version='' worker=0 spot=() ships=() dry_run=''
while [[ $# -gt 0 ]]; do
    case $1 in
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --ship=*) ships+=("${1#*=}") ;;
    --spot) spot=(--spot) ;;
    --dry-run) dry_run=yes ;;
    --)
        shift
        break
        ;;
    *) fail "unknown option $1 (what jaxalign gets stands after --)" ;;
    esac
    shift
done
[[ -n $zone ]] || fail "--zone is missing"
place=("--zone=$zone")
[[ -z $project ]] || place+=("--project=$project")
folder=jaxalign-runs/$name # under the home folder of each host

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
tpus() { call gcloud compute tpus "$@" "${place[@]}"; }
on() { tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2"; }
host_script() { on "$1" "bash $folder/on_tpu_host.sh $2"; }

# The queued resource's state; empty where there is none.
state() { tpus queued-resources describe "$name" "--format=value(state.state)" 2>/dev/null || true; }

software() {
    case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
    esac
}

delete() { tpus queued-resources delete "$name" --force --quiet; }

# Makes the slice, unless it is there, and waits for it.
create() {
    [[ -n $type ]] || fail "--type is missing, such as --type=v5p-16"
    local now
    now=$(state)
    case $now in
    SUSPENDING | SUSPENDED | FAILED)
        echo "$name is $now: it is made anew" >&2
        delete
        now=''
        ;;
    esac
    if [[ -z $now ]]; then
        tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
            "--runtime-version=${version:-$(software)}" "${spot[@]}"
    fi
    [[ -z $dry_run ]] || return 0
    until [[ $now == ACTIVE ]]; do
        sleep "${POLL_SECONDS:-30}"
        now=$(state)
        echo "$name is ${now:-not there yet}" >&2
        [[ $now != FAILED ]] || fail "$name could not be made: see gcloud compute tpus queued-resources describe $name"
    done
}

# Sends code, other files and the token to all hosts, and starts the run on each.
start() {
    local scratch files arguments
    scratch=$(mktemp -d) # of mode 700
    # shellcheck disable=SC2064 # this very folder
    trap "rm -rf '$scratch'" EXIT
    call "$here/pack_code.sh" "$scratch/code.tar.gz" "${ships[@]}"
    files=("$scratch/code.tar.gz" "$here/on_tpu_host.sh")
    if [[ -n ${HF_TOKEN:-} ]]; then
        (umask 077 && printf '%s' "$HF_TOKEN" >"$scratch/token") # by the shell itself: no process shows it
        files+=("$scratch/token")
    fi
    on all "umask 077 && mkdir -p $folder"
    tpus tpu-vm scp "${files[@]}" "$name:$folder/" --worker=all
    arguments=$(printf ' %q' "$@")
    host_script all "start$arguments"
    rm -rf "$scratch"
}

# Follows the run's log over broken connections; returns its exit status, 255 if the slice is gone.
follow() {
    local status lines=+1
    while true; do
        host_script 0 "log $lines" || true
        [[ -z $dry_run ]] || return 0
        lines=5 # those before the connection broke
        if status=$(host_script 0 status 2>/dev/null) && [[ $status =~ ^[0-9]+$ ]]; then return "$status"; fi
        case $(state) in
        SUSPENDING | SUSPENDED | FAILED | DELETING) return 255 ;;
        esac
        sleep "${POLL_SECONDS:-30}"
    done
}

case $command in
run)
    [[ $# -gt 0 ]] || fail "what should run? give jaxalign's arguments after --, such as -- train --config=..."
    while true; do
        [[ -z $type ]] || create
        start "$@"
        status=0
        follow || status=$?
        [[ $status == 255 && -n $type ]] || break
        echo "$name was taken away: it is made anew, and the run continues" >&2
    done
    [[ -n $dry_run ]] || echo "$name: the run exited with $status; the slice stays until you delete it" >&2
    exit "$status"
    ;;
logs) host_script "$worker" "log +1" ;;
status)
    state
    host_script all status
    ;;
stop) host_script all stop ;;
create) create ;;
delete) delete ;;
*) fail "unknown command $command: run, logs, status, stop, create or delete" ;;
esac
