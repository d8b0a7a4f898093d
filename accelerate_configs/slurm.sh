#!/bin/bash
# A run on several machines under Slurm that survives preemption: Slurm sends SIGTERM some minutes before the end, the run
# writes a checkpoint and stops, the job queues itself again, and the same command resumes.
#   sbatch --nodes 4 accelerate_configs/slurm.sh recipes/imagenet1k/moco_vit_b16.yaml [key=value ...]
#SBATCH --job-name=hf_accel
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u
gpus_per_node=${SLURM_GPUS_ON_NODE:-8}
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file accelerate_configs/multi_node_ddp.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$1" --machine_rank "$SLURM_NODEID" --main_process_ip "$2" \
        hf_accel/run.py "${@:3}"
' run $((SLURM_NNODES * gpus_per_node)) "$head_node" "$@" &
steps=$!

requeue() {
    echo "preempted or out of time: saving, then queueing again"
    scancel --signal=TERM "$SLURM_JOB_ID" # to the steps; the batch script itself has had its own
    wait "$steps"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue TERM

wait "$steps"
