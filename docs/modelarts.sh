#!/bin/bash
# Train on all cards of a ModelArts job by msrun: bash docs/modelarts.sh --preset fashion-mnist ... (see modelarts.md)
cd "$(dirname "$0")/.."
cards=${MA_NUM_GPUS:-1} machines=${MA_NUM_HOSTS:-1} hosts=${VC_WORKER_HOSTS:-127.0.0.1}
msrun --worker_num=$((machines * cards)) --local_worker_num=$cards --master_addr=${hosts%%,*} --master_port=${MASTER_PORT:-8118} \
    --node_rank=${VC_TASK_INDEX:-0} --cluster_time_out=3600 --log_dir=${MA_LOG_DIR:-msrun_logs} --tail_worker_log=0 --join=True \
    train.py "$@" &
job=$!
trap 'pkill -TERM -P $job -f train.py' TERM  # msrun does not pass the signal on
wait $job  # returns at the signal, too, and the ranks then save and upload
wait $job
