#!/bin/bash
# Writes RUN/export, a Hugging Face checkpoint, from a run's newest checkpoint, on as many tasks as it has ranks.
#   sbatch slurm/export.sh /scratch/me/runs/qwen3_30b
#   sbatch --nodes=16 slurm/export.sh /scratch/me/runs/nemotron_ultra_550b
# Partition, account, image and mounts are facts of the site: $MOE_CLUSTER or clusters/local.yaml (docs/slurm.md).
#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@120
#SBATCH --export=PATH,LD_LIBRARY_PATH,HOME,USER,LOGNAME,LANG,MOE_CLUSTER,MOE_SHAKEDOWN,MOE_WORK,MOE_PYTHON

# sbatch runs a copy of this file, so the repository is the folder from which it was submitted.
inside=${SLURM_SUBMIT_DIR:=$PWD}/moe_recipes/launch/slurm/inside.sh
[[ -x $inside ]] || { echo "moe-recipes: error: $SLURM_SUBMIT_DIR is no clone of moe-recipes" >&2; exit 66; }
exec "$inside" --work export --cluster "${MOE_CLUSTER:-$SLURM_SUBMIT_DIR/clusters/local.yaml}" \
  "$@"
