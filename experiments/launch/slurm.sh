#!/bin/bash
# Slurm: one process per GPU, four nodes of eight. Submit with `sbatch experiments/launch/slurm.sh`.
# JAX reads the processes and the coordinator from Slurm's variables. Two minutes before the time
# limit SIGTERM saves the state (exit code 143); a lost node ends all processes (exit code 4). In
# both cases the job is queued again, and resumes from the newest checkpoint.
#SBATCH --job-name=paramshare
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

srun paramshare train experiments/recipes/imagenet_swrn50_2.py \
    --workdir "${WORKDIR:?a folder on a disk that all nodes share}" \
    --distributed --init-timeout 600
code=$?
if [ "$code" = 4 ] || [ "$code" = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
