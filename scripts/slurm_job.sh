#!/usr/bin/env bash
# The job that scripts/launch_slurm.sh submits, in the run's folder: `jaxalign ARGUMENTS` in one process per GPU.
#
#   slurm_job.sh PYTHON ARGUMENTS
#
# srun ends with the highest exit status of all processes (https://slurm.schedmd.com/srun.html, RETURN VALUE): 75 means
# that all were told to stop and saved, and nothing worse. Then, and only then, the job goes back to the queue; JAX finds
# the other processes by SLURM's variables.
set -euo pipefail

python=$1
shift
folder=$PWD
mkdir -p runs
if [[ -s token ]]; then export HF_TOKEN_PATH=$folder/token; fi
export PYTHONPATH=$folder/code${PYTHONPATH:+:$PYTHONPATH}
# Since SLURM 22.05 srun does not take the job's --cpus-per-task by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# A process that fails ends the others itself (they hear of it through JAX within a minute), with their own statuses;
# --kill-on-bad-exit would kill those that are still saving, and hide the 75. --wait bounds how long stragglers stay.
status=0
cd code
srun --kill-on-bad-exit=0 --wait=600 --label "$python" -m jaxalign.cli "$@" || status=$?
cd "$folder"
echo "$status" >status
echo "jaxalign exited with $status"
if [[ $status == 75 && ! -e stop ]]; then
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # the requeue ends this script
fi
exit "$status"
