#!/bin/bash
# Serves an exported checkpoint over HTTP with vLLM or SGLang, on all GPUs of the job's nodes, until the job ends.
#   sbatch slurm/serve.sh /shared/me/runs/qwen3_30b                         a run, or a folder with config.json
#   sbatch --nodes=2 slurm/serve.sh RUN engine=sglang port=8000             one server over two nodes
#   sbatch slurm/serve.sh RUN wait_s=7200 --max-model-len 32768             words that start with - go to the engine
# MOE_SERVE_IMAGE: the engine's container image, for pyxis; without it the nodes' own MOE_SERVE_PYTHON has the engine.
# The address is printed and kept in RUN/serve/JOB.url while the server is healthy. docs/serve-and-evaluate.md
#SBATCH --job-name=serve
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --signal=B:TERM@120
#SBATCH --export=PATH,LD_LIBRARY_PATH,HOME,USER,LOGNAME,LANG,HF_HOME,MOE_SERVE_IMAGE,MOE_SERVE_PYTHON

fail() { echo "moe-recipes: error: $2" >&2; exit "$1"; }

# What is served, by which engine, where.
[[ -n ${SLURM_JOB_ID:-} ]] || fail 64 "this is no batch job; submit the script: sbatch slurm/serve.sh RUN"
[[ $# -ge 1 ]] || fail 64 "serve needs the folder of a run or of a checkpoint: sbatch slurm/serve.sh RUN"
run=$(realpath -m -- "$1"); shift
model=$run
[[ -d $run/export ]] && model=$run/export
[[ -f $model/config.json ]] || fail 66 "$model: no config.json, so no checkpoint; write one with slurm/export.sh"
family=$(sed -n 's/^ *"model_type": *"\([a-z0-9_]*\)".*/\1/p' "$model/config.json" | head -n 1)
engine=vllm gpus=${SLURM_GPUS_ON_NODE:-0} port=$((20000 + SLURM_JOB_ID % 12000)) wait_s=3600 mounts=
while [[ ${1:-} == [a-z]* ]]; do
  case $1 in
    engine=*) engine=${1#*=} ;;
    gpus=*) gpus=${1#*=} ;;
    port=*) port=${1#*=} ;;
    wait_s=*) wait_s=${1#*=} ;;
    mounts=*) mounts=${1#*=} ;;
    *) fail 64 "'$1' must be engine=, gpus=, port=, wait_s= or mounts=, or start with - to go to the engine" ;;
  esac
  shift
done
[[ $gpus,$port,$wait_s =~ ^[0-9]+,[0-9]+,[0-9]+$ ]] ||
  fail 64 "gpus=$gpus, port=$port and wait_s=$wait_s must be numbers"
python=${MOE_SERVE_PYTHON:-python3}
nodes=${SLURM_JOB_NUM_NODES:-1}
host=$(hostname)
out=$run/serve log=$run/serve/$SLURM_JOB_ID.log url=$run/serve/$SLURM_JOB_ID.url
mkdir -p "$out" || fail 73 "$out cannot be made; serve from a folder that you may write"
command -v curl >/dev/null || fail 78 "$host has no curl, by which a server's health is asked"

# The GPUs of a node each hold a slice of every tensor and whole experts; nodes hold layers. More slices than GPUs of a
# node are slow, and Nemotron's eight groups of Mamba heads cannot be cut into sixteen.
slices=$((gpus ? gpus : 1))
case $engine in
  vllm)
    # The second form knows --headless; the first also runs in the build for CPUs.
    words=(-m vllm.entrypoints.openai.api_server --model "$model")
    ((nodes > 1)) && words=(-m vllm.entrypoints.cli.main serve "$model")
    words+=(--served-model-name "$(basename "$run")"
      --host 0.0.0.0 --port "$port" --tensor-parallel-size "$slices")
    ((slices > 1)) && words+=(--enable-expert-parallel)
    ((nodes > 1)) && words+=(--pipeline-parallel-size "$nodes" --distributed-executor-backend mp
      --nnodes "$nodes" --master-addr "$host" --master-port "$((port + 1))")
    # The state of Mamba layers is summed over the whole text: bfloat16 loses it.
    [[ $family == nemotron_h ]] && words+=(--mamba-ssm-cache-dtype float32)
    ;;
  sglang)
    words=(-m sglang.launch_server --model-path "$model" --served-model-name "$(basename "$run")"
      --host 0.0.0.0 --port "$port" --tp-size "$slices" --ep-size "$slices")
    ((nodes > 1)) && words+=(--pp-size "$nodes" --nnodes "$nodes" --dist-init-addr "$host:$((port + 1))")
    [[ $family == nemotron_h ]] && words+=(--mamba-ssm-dtype float32)
    ;;
  *) fail 64 "engine=$engine must be vllm or sglang" ;;
esac

# One task a node; with several, each learns its number, and all but the first only compute.
# shellcheck disable=SC2016  # expanded by the task
several='more=(--node-rank "$SLURM_NODEID")
[[ $0 == vllm && $SLURM_NODEID != 0 ]] && more+=(--headless)
exec "$@" "${more[@]}"'
task=("$python" "${words[@]}" "$@")
((nodes > 1)) && task=(bash -c "$several" "$engine" "${task[@]}")
container=()
if [[ -n ${MOE_SERVE_IMAGE:-} ]]; then
  container=(--container-image="$MOE_SERVE_IMAGE" --no-container-mount-home
    --container-mounts="$run:$run${HF_HOME:+,$HF_HOME:$HF_HOME}${mounts:+,$mounts}")
fi
stopping=
# srun is told from outside: its tasks get the signal, have a minute to end, and are ended.
stop() {
  stopping=1
  scancel --signal=TERM "$SLURM_JOB_ID.0" 2>/dev/null
  for _ in $(seq 60); do kill -0 "$server" 2>/dev/null || return; sleep 1; done
  scancel --signal=KILL "$SLURM_JOB_ID.0" 2>/dev/null
}
trap 'stop' TERM INT USR2
trap 'rm -f "$url"' EXIT
echo "moe-recipes: $engine starts on $nodes node(s) x $gpus GPU(s); its output: $log"
asked=()
((gpus)) && asked=(--gres="gpu:$gpus")
srun --nodes="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --mpi=none --input=none "${asked[@]}" \
  "${container[@]}" "${task[@]}" >>"$log" 2>&1 &
server=$!

# Healthy, ended, or neither in time.
deadline=$((SECONDS + wait_s))
until curl --silent --fail --max-time 10 --output /dev/null "http://$host:$port/health"; do
  [[ -n $stopping ]] && break
  if ! kill -0 "$server" 2>/dev/null; then
    wait "$server"
    fail 78 "$engine ended with $? before it was healthy: $(grep -a Error "$log" | tail -n 1) (log: $log)"
  fi
  if ((SECONDS > deadline)); then
    stop
    fail 70 "$engine was not healthy after $wait_s s (wait_s); log: $log"
  fi
  sleep 2 & wait $!
done
if [[ -z $stopping ]]; then
  echo "http://$host:$port/v1" >"$url.tmp" && mv "$url.tmp" "$url"
  echo "moe-recipes: $(basename "$run") is served at http://$host:$port/v1"
fi

wait "$server"; code=$?
# A signal interrupts a wait: the server itself may still be ending.
while kill -0 "$server" 2>/dev/null; do wait "$server"; code=$?; done
if [[ -n $stopping ]]; then
  echo "moe-recipes: $engine was stopped"
  exit 0
fi
fail 69 "$engine ended with $code while it served; log: $log"
