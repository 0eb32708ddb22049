# The image that trains: an NGC PyTorch base, the package with its hash-locked dependencies, and compiled extensions.
# docs/container.md says how to build it, how to pin another base, and what is not built where there is no nvcc.
#
#   docker build -t moe-recipes .
#   docker build -t moe-recipes --build-arg WITH_CUDA_EXTENSIONS=0 .     no nvcc, no source hosts

ARG BASE_TAG=nvcr.io/nvidia/pytorch:26.06-py3
ARG BASE_DIGEST=sha256:43c018d6a12963f1a1bad85ef8574b5c2a978eec2be0ebcacfb87f69e0d210e1
ARG BASE=${BASE_TAG}@${BASE_DIGEST}
ARG PREFIX=/opt/moe-recipes

# ---- first stage: everything that compiles ----
FROM ${BASE} AS build
ARG PREFIX
ENV PREFIX=${PREFIX} TOOLS=/opt/build-tools WHEELS=/wheels PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
WORKDIR /src

# Our packages live in a virtual environment that sees the base's, so the base's own stay as they are. The base may
# name a constraint file of its own that pins every package in it; only its torch must be held.
COPY docker/torch_pin.py docker/
RUN python3 docker/torch_pin.py write /etc/moe-recipes/constraints.txt \
    && python3 -m venv --without-pip --system-site-packages "${PREFIX}" \
    && python3 -m venv --without-pip --system-site-packages "${TOOLS}"
ENV PIP_CONSTRAINT=/etc/moe-recipes/constraints.txt

COPY docker/build.lock docker/requirements.lock docker/
RUN "${TOOLS}/bin/python" -m pip install --no-deps --ignore-installed --require-hashes -r docker/build.lock \
    && "${PREFIX}/bin/python" -m pip install --no-deps --ignore-installed --require-hashes -r docker/requirements.lock

# Extensions need nvcc and hosts of sources. One layer each: a changed version compiles that one again.
ARG WITH_CUDA_EXTENSIONS=1
ARG CUDA_ARCHS="9.0 10.0"
ARG MAX_JOBS=8
COPY docker/cuda.lock docker/extensions.sh docker/

ARG TRANSFORMER_ENGINE_VERSION=2.16.1
ARG TRANSFORMER_ENGINE_COMMIT=c9877beb87ad7e711e1869dd0b5062167ede447a
RUN if [ "${WITH_CUDA_EXTENSIONS}" = 1 ]; then docker/extensions.sh transformer_engine; fi

ARG NVSHMEM_VERSION=3.6.5
ARG NVSHMEM_SHA256="4001aabc72ead32ecc3c9add3c6781befcb71adcbe286d7f5956042e68668c70 \
94aa0149490be658cf95945ce9f16ba90a90edbd6a564366f996ead7496f2f22"
ARG DEEP_EP_COMMIT=42144303752422ade37f24bca9e2dde12df70e09
RUN if [ "${WITH_CUDA_EXTENSIONS}" = 1 ]; then docker/extensions.sh nvshmem && docker/extensions.sh deep_ep; fi

ARG CAUSAL_CONV1D_VERSION=1.7.0
ARG CAUSAL_CONV1D_SHA256=3202758494eaa7b597ce1c282dfa188889506bfcb92cad3c407d26736bfcd32b
RUN if [ "${WITH_CUDA_EXTENSIONS}" = 1 ]; then docker/extensions.sh causal_conv1d; fi

ARG MAMBA_SSM_VERSION=2.3.1
ARG MAMBA_SSM_SHA256=4d529477ad94753962216d583fc8f1c127c717b7d7c875d6bbb9376366d0d761
RUN if [ "${WITH_CUDA_EXTENSIONS}" = 1 ]; then docker/extensions.sh mamba_ssm \
    && "${PREFIX}/bin/python" -m pip install --no-deps --ignore-installed --require-hashes -r docker/cuda.lock; fi

COPY pyproject.toml README.md LICENSE NOTICE ./
COPY moe_recipes moe_recipes
RUN "${TOOLS}/bin/python" -m pip wheel --no-deps --no-build-isolation --wheel-dir "${WHEELS}" . \
    && "${PREFIX}/bin/python" -m pip install --no-deps --ignore-installed --no-index "${WHEELS}"/*.whl

# ---- second stage: the base and our environment, no sources, no wheels, no tools ----
FROM ${BASE}
ARG PREFIX
COPY --from=build /etc/moe-recipes /etc/moe-recipes
COPY --from=build ${PREFIX} ${PREFIX}
COPY docker/torch_pin.py docker/sbom.py /usr/share/moe-recipes/
# CUDA_HOME: DeepEP compiles its hybrid kernels when a run starts.
ENV VIRTUAL_ENV=${PREFIX} PATH=${PREFIX}/bin:${PATH} CUDA_HOME=/usr/local/cuda \
    PIP_CONSTRAINT=/etc/moe-recipes/constraints.txt

ARG UID=10001
ARG BASE_DIGEST
ARG BASE
RUN python3 /usr/share/moe-recipes/torch_pin.py verify "${PIP_CONSTRAINT}" \
    && python3 /usr/share/moe-recipes/sbom.py /usr/share/moe-recipes/sbom.json \
        --name moe-recipes --base "${BASE}" \
    && groupadd --gid "${UID}" moe \
    && useradd --uid "${UID}" --gid "${UID}" --create-home --shell /bin/bash moe

ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="moe-recipes" \
      org.opencontainers.image.description="Expert-parallel fine-tuning of mixture-of-experts models on Slurm" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"

USER ${UID}:${UID}
WORKDIR /home/moe
CMD ["moe-recipes", "--help"]
