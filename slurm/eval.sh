#!/bin/bash
# Scores an exported checkpoint with lm-eval through a server of it: one that this job starts, or one that runs already.
#   sbatch slurm/eval.sh /shared/me/runs/qwen3_30b tasks=mmlu,gsm8k
#   sbatch slurm/eval.sh RUN tasks=gsm8k engine=sglang --max-total-tokens 65536 -- --num_fewshot 8
#   sbatch --gpus-per-node=0 slurm/eval.sh RUN tasks=gsm8k url=http://node3:20123/v1
# Words from the first - on go to the engine, those after -- to lm-eval.
# MOE_EVAL_PYTHON has lm-eval (api extra), on the nodes themselves. MOE_SERVE_IMAGE and others: slurm/serve.sh
# Results: RUN/eval/JOB. docs/serve-and-evaluate.md
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --signal=B:TERM@120
#SBATCH --export=PATH,LD_LIBRARY_PATH,HOME,USER,LOGNAME,LANG,HF_HOME,MOE_SERVE_IMAGE,MOE_SERVE_PYTHON,MOE_EVAL_PYTHON

fail() { echo "moe-recipes: error: $2" >&2; exit "$1"; }

[[ -n ${SLURM_JOB_ID:-} ]] || fail 64 "this is no batch job; submit the script: sbatch slurm/eval.sh RUN tasks=NAMES"
# sbatch runs a copy of this file, so the repository is the folder from which it was submitted.
serve=${SLURM_SUBMIT_DIR:=$PWD}/slurm/serve.sh
[[ -x $serve ]] || fail 66 "$SLURM_SUBMIT_DIR is no clone of moe-recipes"
[[ $# -ge 1 ]] || fail 64 "eval needs a run and tasks: sbatch slurm/eval.sh RUN tasks=mmlu,gsm8k"
run=$(realpath -m -- "$1"); shift
model=$run
[[ -d $run/export ]] && model=$run/export
[[ -f $model/tokenizer_config.json ]] || fail 66 "$model: no tokenizer_config.json, which lm-eval needs"
tasks='' url='' words=()
while [[ ${1:-} == [a-z]* ]]; do
  case $1 in
    tasks=*) tasks=${1#*=} ;;
    url=*) url=${1#*=} ;;
    engine=* | gpus=* | port=* | wait_s=* | mounts=*) words+=("$1") ;;
    *) fail 64 "'$1' must be tasks=, url= or a word of slurm/serve.sh; lm-eval's own come after --" ;;
  esac
  shift
done
while [[ $# -gt 0 && $1 != -- ]]; do words+=("$1"); shift; done
[[ ${1:-} == -- ]] && shift
[[ -n $tasks ]] || fail 64 "eval needs tasks: tasks=mmlu,gsm8k"
python=${MOE_EVAL_PYTHON:-python3}
"$python" -c 'import lm_eval' 2>/dev/null || fail 78 "$python on $(hostname) has no lm-eval; set MOE_EVAL_PYTHON"
out=$run/eval/$SLURM_JOB_ID
mkdir -p "$out" || fail 73 "$out cannot be made"

# The server of this job, and what ends it, whatever happens here.
server=''
end_server() {
  [[ -n $server ]] || return
  kill -TERM "$server" 2>/dev/null
  wait "$server"
  server=''
}
trap end_server EXIT
trap 'echo "moe-recipes: stopped before there were results"; exit 75' TERM INT USR2
if [[ -z $url ]]; then
  "$serve" "$run" "${words[@]}" &
  server=$!
  until [[ -f $run/serve/$SLURM_JOB_ID.url ]]; do
    if ! kill -0 "$server" 2>/dev/null; then
      wait "$server"; code=$?
      server=''
      fail "$code" "no server, so no score; its own line is above"
    fi
    sleep 1 & wait $!
  done
  url=$(<"$run/serve/$SLURM_JOB_ID.url")
fi

name=$(basename "$run")
arguments=model=$name,base_url=$url/completions,tokenizer=$model,num_concurrent=32,max_retries=3
"$python" -m lm_eval --model local-completions --model_args "$arguments" --tasks "$tasks" --output_path "$out" "$@" \
  >"$out/lm_eval.log" 2>&1 &
wait $!; code=$?
said=$(grep -a Error "$out/lm_eval.log" | tail -n 1)
((code == 0)) || fail 70 "lm-eval ended with $code: $said (log: $out/lm_eval.log)"
found=$(find "$out" -name 'results*.json' | head -n 1)
[[ -n $found ]] || fail 70 "lm-eval left no results in $out; log: $out/lm_eval.log"
grep -a '^|' "$out/lm_eval.log"
echo "moe-recipes: $tasks of $name: $found"
