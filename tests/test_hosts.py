"""Which environments are those of several processes. (How they fail together: test_multiprocess.py.)"""

import pytest

from jaxalign import hosts

TPU = {"TPU_ML_PLATFORM": "JAX"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, False),
        ({"TPU_SKIP_MDS_QUERY": "1"}, False),  # what JAX sets where there are no chips
        (TPU, True),  # a TPU VM, which asks its metadata server
        (TPU | {"JAX_PLATFORMS": "cpu"}, False),
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, False),  # a notebook's TPU
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        (TPU | {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1"}, True),
        (TPU | {"TPU_PROCESS_ADDRESSES": "local"}, False),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_COORDINATOR_ADDRESS": "b:80"}, True),  # slices of one host
        (SLURM, False),  # sbatch's own script
        (SLURM | {"SLURM_STEP_NODELIST": "n[1-2]"}, True),  # under srun
        (SLURM | {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
)
def test_is_cluster(env, expected):
    assert hosts.is_cluster(env) is expected


def test_a_coordinator_without_numbers_is_refused_before_anything_waits(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(ValueError, match="JAX_PROCESS_ID' is not.*set all three"):
        hosts.connect()
