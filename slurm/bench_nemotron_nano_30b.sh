#!/bin/bash
# Nemotron 3 Nano 30B-A3B's shape on one node of 8 GPUs, random weights and tokens: this package, Transformers and,
# where it is installed, NeMo AutoModel; under the conditions of its published figures (one row of 4096 tokens a GPU, a
# balanced gate) and with the real router. The figures: bench.json in the run folder bench_nemotron_nano_30b_8gpu.
#   sbatch slurm/bench_nemotron_nano_30b.sh
#   sbatch slurm/bench_nemotron_nano_30b.sh --gates real --sweep   words of `moe-recipes bench`, which win
# Partition, account, image and mounts are facts of the site: $MOE_CLUSTER or clusters/local.yaml (docs/slurm.md).
#SBATCH --job-name=bench_nemotron_nano_30b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@120
#SBATCH --export=PATH,LD_LIBRARY_PATH,HOME,USER,LOGNAME,LANG,MOE_CLUSTER,MOE_SHAKEDOWN,MOE_WORK,MOE_PYTHON

# sbatch runs a copy of this file, so the repository is the folder from which it was submitted.
inside=${SLURM_SUBMIT_DIR:=$PWD}/moe_recipes/launch/slurm/inside.sh
[[ -x $inside ]] || { echo "moe-recipes: error: $SLURM_SUBMIT_DIR is no clone of moe-recipes" >&2; exit 66; }
exec "$inside" --work bench --cluster "${MOE_CLUSTER:-$SLURM_SUBMIT_DIR/clusters/local.yaml}" \
  recipes/nemotron_nano_30b_8gpu.yaml --arms ours,transformers,automodel --gates balanced,real --batches 1,4 "$@"
