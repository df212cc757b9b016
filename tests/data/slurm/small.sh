#!/bin/bash
# Written by zoo slurm. Relative paths are those of the directory from which it is submitted.
#SBATCH --job-name=small
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --no-requeue

trap : TERM  # who preempts the job sends it to this shell too, which has to wait for the processes to save

run=runs/small
command=(python -m zoo pretrain gpt2 --out runs/small)
if [ -e "$run/recipe.yaml" ]; then
    command+=(--resume)
fi

# The first process to end must not have the others killed: they may be writing what was trained.
srun --kill-on-bad-exit=0 --wait=0 "${command[@]}"
code=$?
exit "$code"
