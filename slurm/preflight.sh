#!/bin/bash
# Checks nodes, container, network, files and keys before a run is spent on them; trains nothing.
#   sbatch --nodes=16 slurm/preflight.sh recipes/nemotron_ultra_550b.yaml
# Without a recipe it is the tiny one. docs/preflight.md explains each line of the table.
# Partition, account, image and mounts are facts of the site: $MOE_CLUSTER or clusters/local.yaml (docs/slurm.md).
#SBATCH --job-name=preflight
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=00:15:00
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@120
#SBATCH --export=PATH,LD_LIBRARY_PATH,HOME,USER,LOGNAME,LANG,MOE_CLUSTER,MOE_SHAKEDOWN,MOE_WORK,MOE_PYTHON

# sbatch runs a copy of this file, so the repository is the folder from which it was submitted.
inside=${SLURM_SUBMIT_DIR:=$PWD}/moe_recipes/launch/slurm/inside.sh
[[ -x $inside ]] || { echo "moe-recipes: error: $SLURM_SUBMIT_DIR is no clone of moe-recipes" >&2; exit 66; }
exec "$inside" --work preflight --cluster "${MOE_CLUSTER:-$SLURM_SUBMIT_DIR/clusters/local.yaml}" \
  "${@:-recipes/tiny_slurm.yaml}"
