#!/bin/bash
# A run on several machines under Slurm. When SIGTERM warns it of its time limit or of preemption, it writes a checkpoint and
# stops with a code other than 0. The job then queues itself again, and the same command resumes. Submit it in the repository's
# root, with `accelerate` on the PATH, and with the lines below as your machines and queues need them (docs/launching.md):
#   sbatch --nodes 4 accelerate_configs/slurm.sh recipes/imagenet1k/moco_vit_b16.yaml [key=value ...]
# `scancel --batch --signal=TERM JOB` warns it by hand; `scancel JOB` ends it for good.
#SBATCH --job-name=hf_accel
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# shellcheck disable=SC2016,SC2317 # variables in single quotes are the tasks'; functions are called by `trap`
set -u
gpus_per_node=${SLURM_GPUS_ON_NODE:-8}
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}} # the first is unset without --cpus-per-task
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((10000 + SLURM_JOB_ID % 20000)) # jobs may share machines
# Seconds in which the run must have saved, within those of --signal: torch's launcher would kill it after 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

still_runs() { # true if the job runs and `scontrol show job` matches $1
    [[ $(scontrol show job "$SLURM_JOB_ID") =~ JobState=(RUNNING|SIGNALING).*$1 ]]
}

again='PreemptTime=[0-9]' # after preemption with a grace time, of which Slurm informs the steps but not this script
warned() {
    trap '' TERM
    still_runs '' || return # Slurm is ending the job and has already sent a signal to the steps
    echo "warned: saving, then queueing again"
    again=''
    scancel --signal=TERM "$SLURM_JOB_ID" # the steps only
}
trap warned TERM

# The launcher of a single process ends at SIGTERM while the run saves, and Slurm would then kill the run. So each step
# waits for the end of its output, which comes when the last process of the run has ended. From Slurm 22.05 on, srun does
# not take the number of CPUs from sbatch.
srun --kill-on-bad-exit=1 --cpus-per-task="$cpus" bash -c '
    trap : TERM
    set -o pipefail
    accelerate launch --config_file accelerate_configs/multi_node_ddp.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$1" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$2" --main_process_port "$3" hf_accel/run.py "${@:4}" 2>&1 | (trap "" TERM; exec cat)
' run $((SLURM_NNODES * gpus_per_node)) "$head_node" "$port" "$@" &
steps=$!
wait "$steps" # until the steps end, or a warning comes
wait "$steps"
code=$?

if ((code)) && still_runs "$again"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
