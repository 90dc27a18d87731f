#!/usr/bin/env bash
# One TPU host's part of a run; scripts/launch_tpu_pod.sh copies it there, beside code.tar.gz, and calls it:
#
#   start ARGUMENTS   install what was shipped, then `jaxalign ARGUMENTS` in the background, again after exit status 75
#   stop              SIGTERM: the run saves and exits with 75, and is not started again
#   log LINES         the log from its last LINES lines (+1: from its beginning), followed to the end of the run
#   status            "running", or the exit status of the run
#
# A run's folder on a host holds code/, venv/, runs/ (relative workdirs), log, status and perhaps token. All hosts exit
# with 75 after the same step (JAX's preemption sync point), so each of them starts again by itself.
set -euo pipefail
umask 077
cd "$(dirname "${BASH_SOURCE[0]}")"

is_alive() { [[ -s pid ]] && kill -0 "$(cat pid)" 2>/dev/null; }
is_running() { is_alive && [[ $(cat status) == running ]]; }

install() {
    # The VM images have Python 3.10, older than JAX wants: uv brings another one and leaves theirs alone.
    # https://docs.astral.sh/uv/concepts/python-versions/
    python3 -m pip install --quiet --user uv
    [[ -d venv ]] || python3 -m uv venv --quiet --python 3.12 venv
    # libtpu comes with jax[tpu]: https://docs.jax.dev/en/latest/installation.html
    python3 -m uv pip install --quiet --python venv/bin/python -e "code[tpu,gcs]" -c code/constraints.txt
}

run() {
    local status=75 child
    if [[ -s token ]]; then export HF_TOKEN_PATH=$PWD/token; fi
    while [[ $status == 75 && ! -e stop ]]; do
        status=0
        (cd code && exec ../venv/bin/jaxalign "$@") &
        child=$!
        echo "$child" >child
        wait "$child" || status=$?
        echo "jaxalign exited with $status"
    done
    return "$status"
}

case $1 in
start)
    shift
    if is_running; then
        echo "a run is under way on $(hostname): stop it first" >&2
        exit 1
    fi
    rm -rf code stop child
    mkdir -p code runs
    tar -xzf code.tar.gz -C code
    ln -s ../runs code/runs # relative workdirs stay when the code is shipped anew
    if [[ -e log ]]; then mv log log.before; fi
    touch log
    echo running >status
    setsid nohup bash on_tpu_host.sh supervise "$@" >>log 2>&1 </dev/null &
    echo $! >pid
    ;;
supervise)
    shift
    trap 'echo $? >status' EXIT
    install
    run "$@"
    exit # this file may be another one by now
    ;;
stop)
    touch stop
    if is_running && [[ -s child ]]; then kill -TERM "$(cat child)"; fi
    ;;
log)
    if is_running; then tail --pid="$(cat pid)" -n "$2" -F log; else tail -n "$2" log; fi
    ;;
status)
    # Killed, or the VM was started anew. In this order: a supervisor writes its status before it is gone.
    if ! is_alive && [[ $(cat status) == running ]]; then echo 137 >status; fi
    cat status
    ;;
*)
    echo "unknown command $1" >&2
    exit 2
    ;;
esac
