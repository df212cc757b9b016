#!/bin/bash
# Written by zoo slurm. Relative paths are those of the directory from which it is submitted.
#SBATCH --job-name=large
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=1-12:00:00
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --comment="two words"
#SBATCH --qos=long

trap : TERM  # who preempts the job sends it to this shell too, which has to wait for the processes to save

module load cuda
export HF_HOME=/scratch/$USER

run='runs/it'"'"'s'
command=(/opt/venv/bin/python -m zoo finetune hf:org/name --data 'my data.jsonl' --out 'runs/it'"'"'s' --devices 4)
if [ -e "$run/recipe.yaml" ]; then
    command+=(--resume)
fi

# The first process to end must not have the others killed: they may be writing what was trained.
srun --kill-on-bad-exit=0 --wait=0 --cpu-bind=cores '--container-image=/images/a b.sqsh' "${command[@]}"
code=$?

# 75: a signal came, and the run is saved. A job that somebody cancelled stays so.
if [ "$code" -eq 75 ] && [[ "$(scontrol show job "$SLURM_JOB_ID")" != *JobState=CANCELLED* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
