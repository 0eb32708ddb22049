#!/bin/bash
# GPT-OSS-20B, full fine-tune on one node of 8 H100.
#   sbatch slurm/gpt_oss_20b.sh                                  or: moe-recipes launch gpt_oss_20b
#   sbatch slurm/gpt_oss_20b.sh train.steps=100 optim.lr=2e-5    keys of the recipe, replaced
#   MOE_SHAKEDOWN=1 sbatch slurm/gpt_oss_20b.sh                  the same nodes with few layers, in minutes
# Partition, account, image and mounts are facts of the site: $MOE_CLUSTER or clusters/local.yaml (docs/slurm.md).
#SBATCH --job-name=gpt_oss_20b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@120
#SBATCH --export=PATH,LD_LIBRARY_PATH,HOME,USER,LOGNAME,LANG,MOE_CLUSTER,MOE_SHAKEDOWN,MOE_WORK,MOE_PYTHON

# sbatch runs a copy of this file, so the repository is the folder from which it was submitted.
inside=${SLURM_SUBMIT_DIR:=$PWD}/moe_recipes/launch/slurm/inside.sh
[[ -x $inside ]] || { echo "moe-recipes: error: $SLURM_SUBMIT_DIR is no clone of moe-recipes" >&2; exit 66; }
exec "$inside" --cluster "${MOE_CLUSTER:-$SLURM_SUBMIT_DIR/clusters/local.yaml}" \
  recipes/gpt_oss_20b.yaml "$@"
