#!/bin/sh
# Compile one CUDA extension into $WHEELS: extensions.sh transformer_engine | deep_ep | causal_conv1d | mamba_ssm
# or install NVSHMEM, which DeepEP links to: extensions.sh nvshmem
#
# Versions, commits and hashes come from the Dockerfile's ARGs, as environment variables. Needs nvcc, git and the
# sources' hosts. Each extension leaves one line "name version source" in $PREFIX/share/extensions.txt for the SBOM.
set -eu
: "${PREFIX:?}" "${TOOLS:?}" "${WHEELS:?}" "${CUDA_ARCHS:?}"
PATH="$TOOLS/bin:$PATH"
export PATH TORCH_CUDA_ARCH_LIST="$CUDA_ARCHS" MAX_JOBS="${MAX_JOBS:-8}"

record() {
  mkdir -p "$PREFIX/share"
  printf '%s %s %s\n' "$1" "$2" "$3" >>"$PREFIX/share/extensions.txt"
}

checkout() { # checkout URL COMMIT FOLDER: exactly that commit, with its submodules
  git init --quiet "$3"
  git -C "$3" fetch --quiet --depth 1 "$1" "$2"
  git -C "$3" checkout --quiet FETCH_HEAD
  git -C "$3" submodule --quiet update --init --recursive --depth 1
}

wheel() { # wheel WHAT...: build against the base's torch, with the pinned tools and nothing fetched beside
  "$TOOLS/bin/python" -m pip wheel --no-deps --no-build-isolation --wheel-dir "$WHEELS" "$@"
}

locked() { # locked NAME VERSION "HASH ...": a requirements file of one line that pip checks
  file=$(mktemp)
  printf '%s==%s' "$1" "$2" >"$file"
  for hash in $3; do printf ' --hash=sha256:%s' "$hash" >>"$file"; done
  echo "$file"
}

from_index() { # from_index NAME VERSION "HASH ...": compile a source archive whose hash is known
  wheel --require-hashes --no-binary :all: -r "$(locked "$1" "$2" "$3")"
  record "$1" "$2" "sha256:$3"
}

case "${1:-}" in
  transformer_engine)
    url=https://github.com/NVIDIA/TransformerEngine.git
    checkout "$url" "$TRANSFORMER_ENGINE_COMMIT" /tmp/te
    # 9.0 10.0 -> 90;100
    NVTE_CUDA_ARCHS=$(printf '%s' "$CUDA_ARCHS" | tr -d . | tr ' ' ';') NVTE_FRAMEWORK=pytorch \
      NVTE_BUILD_THREADS_PER_JOB=8 wheel /tmp/te
    record transformer-engine "$TRANSFORMER_ENGINE_VERSION" "git+$url@$TRANSFORMER_ENGINE_COMMIT"
    rm -rf /tmp/te
    ;;
  nvshmem)
    "$PREFIX/bin/python" -m pip install --no-deps --ignore-installed --require-hashes \
      -r "$(locked nvidia-nvshmem-cu13 "$NVSHMEM_VERSION" "$NVSHMEM_SHA256")"
    # The wheel has the library under its soname only; DeepEP and the linker also ask for the plain name.
    lib=$("$PREFIX/bin/python" -c 'import nvidia.nvshmem as n; print(list(n.__path__)[0])')/lib
    ln -sf libnvshmem_host.so.3 "$lib/libnvshmem_host.so"
    ;;
  deep_ep)
    url=https://github.com/deepseek-ai/DeepEP.git
    checkout "$url" "$DEEP_EP_COMMIT" /tmp/deep_ep
    if [ ! -e /usr/include/infiniband/mlx5dv.h ]; then
      apt-get update && apt-get install --yes --no-install-recommends libibverbs-dev
    fi
    # Its build, and the compiler that it starts at run time, look for rdma-core under one prefix. That lies in ours,
    # so the image that runs has it; the libraries are those of the base there.
    rdma=$PREFIX/rdma-core
    mkdir -p "$rdma/include" "$rdma/lib"
    cp -r /usr/include/infiniband "$rdma/include/"
    for name in ibverbs mlx5; do
      ln -sfn "/usr/lib/$(uname -m)-linux-gnu/lib$name.so.1" "$rdma/lib/lib$name.so"
    done
    # The path of NVSHMEM is linked in (rpath): it is where the image that runs has it too. CUDA 13 keeps its C++
    # core headers in a folder of their own.
    NVSHMEM_DIR=$("$PREFIX/bin/python" -c 'import nvidia.nvshmem as n; print(list(n.__path__)[0])') \
      RDMA_CORE_HOME="$rdma" HYBRID_EP_MULTINODE=1 CPATH=/usr/local/cuda/include/cccl wheel /tmp/deep_ep
    record deep-ep "$DEEP_EP_COMMIT" "git+$url@$DEEP_EP_COMMIT"
    rm -rf /tmp/deep_ep
    ;;
  causal_conv1d)
    CAUSAL_CONV1D_FORCE_BUILD=TRUE from_index causal-conv1d "$CAUSAL_CONV1D_VERSION" "$CAUSAL_CONV1D_SHA256"
    ;;
  mamba_ssm)
    MAMBA_FORCE_BUILD=TRUE from_index mamba-ssm "$MAMBA_SSM_VERSION" "$MAMBA_SSM_SHA256"
    ;;
  *)
    echo "usage: extensions.sh transformer_engine | nvshmem | deep_ep | causal_conv1d | mamba_ssm" >&2
    exit 64
    ;;
esac
