#!/bin/bash
# A run on Slurm: a Ray cluster over the job's nodes for the time of the run. docs/operations.md has the commands:
#   sbatch --nodes=8 jobs/slurm.sh jobs/configs/imagenet_vit_large.yaml --storage /mnt/shared/runs
# Takes what `prelora train` takes. Submit it from a checkout whose environment is activated, on a share.
#SBATCH --job-name=prelora
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -eu

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n') # a new one for each cluster
export RAY_ADDRESS=$(hostname):${RAY_PORT:-6379}
cpus=${SLURM_CPUS_ON_NODE:?run it by sbatch}
on_node=(srun --overlap --cpus-per-task="$cpus" --cpu-bind=none)
ray_start=(ray start --num-cpus="$cpus" --disable-usage-stats --block)

run='' goes_on=false is_cancelled=false
stop_run() { [ -z "$run" ] || kill -TERM "$run" 2> /dev/null || true; }
trap 'goes_on=true; stop_run' USR1       # the time is nearly up, or another job takes the nodes
trap 'is_cancelled=true; stop_run' TERM  # scancel --batch --signal=TERM

# This shell runs on the job's first node.
"${on_node[@]}" --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" \
    "${ray_start[@]}" --head --port="${RAY_ADDRESS#*:}" --include-dashboard=false --temp-dir="/tmp/ray-$SLURM_JOB_ID" &
head=$!
head_lives() { kill -0 $head 2> /dev/null; }
until ray status > /dev/null 2>&1; do
    if $goes_on || $is_cancelled; then break; fi
    head_lives || { echo "slurm.sh: Ray did not start on $SLURMD_NODENAME" >&2; exit 1; }
    sleep 1
done
if ((SLURM_JOB_NUM_NODES > 1)); then
    others=$((SLURM_JOB_NUM_NODES - 1))
    # Ray gives a node 30 s to start, which are few where all of them read one share at once.
    "${on_node[@]}" --nodes=$others --ntasks=$others --exclude="$SLURMD_NODENAME" \
        bash -c 'for _ in 1 2 3; do "$@" && break; done' start "${ray_start[@]}" --address="$RAY_ADDRESS" &
fi
for _ in {1..60}; do # a run begins without a node that does not come
    if $goes_on || $is_cancelled || ! head_lives; then break; fi
    nodes=$(ray status 2> /dev/null | grep -c ' node_' || true)
    ((nodes >= SLURM_JOB_NUM_NODES)) && break || sleep 2
done
head_lives || goes_on=true # another job takes the nodes, which Ray was told alone

status=130
if ! $goes_on && ! $is_cancelled; then
    prelora train "$@" &
    run=$!
    if $goes_on || $is_cancelled; then stop_run; fi # a signal between these lines
    while kill -0 $run 2> /dev/null; do wait $run || true; done # a signal ends a wait
    status=0
    wait $run || status=$?
    if ((status != 0 && status != 2)); then # the run may hear sooner than its Ray is gone
        for _ in {1..5}; do head_lives || break; sleep 1; done
        head_lives || goes_on=true
    fi
fi
# The same command resumes the run; where it was wrong (2), it would be again.
if $goes_on && ! $is_cancelled && ((status != 0 && status != 2)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
