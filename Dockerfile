# opensora-dist in a container; docs/docker.md says how to build and run it.
#
# BASE_IMAGE: one with torch in setup.py's range, whose torch is kept, or any Debian or Ubuntu with Python 3.11 or newer, its own or to
# be installed, which then gets torch as pip finds it.
ARG BASE_IMAGE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime
FROM ${BASE_IMAGE}
USER 0
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# NCCL looks for these at run time, for InfiniBand and RoCE. A Python that can't make environments (Debian's) gets what it lacks.
# hadolint and a lock file would have versions pinned; here they are the base image's choice (.hadolint.yaml).
RUN apt-get update \
    && packages=(ibverbs-providers libibverbs1 librdmacm1) \
    && if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then packages+=(python3 python3-venv); fi \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}" \
    && rm -rf /var/lib/apt/lists/*

# A fixed uid, so that folders can be given to it. Any other uid works as well (docker run --user): home and work are open to all.
ENV HOME=/home/opensora USER=opensora
RUN useradd --uid 10001 --user-group --create-home --shell /bin/bash opensora \
    && install -d -m 1777 -o opensora -g opensora /workspace \
    && chmod 1777 /home/opensora

# The environment sees what the base has installed; the constraint keeps torch as it is there.
RUN python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; take another BASE_IMAGE")' \
    && python3 -m venv --system-site-packages /opt/venv \
    && /opt/venv/bin/python -c 'from importlib.metadata import distributions as all; \
names = ("torch", "triton"); \
print(*sorted({f"{d.name}=={d.version}" for d in all() if d.name in names}), sep="\n")' > /opt/venv/base.txt
ENV PATH=/opt/venv/bin:$PATH

# Dependencies: a layer that setup.py and the version alone decide, so that another line of code installs none of them anew. A pip.conf
# (private index, certificates) comes as the secret "pip", which no layer keeps.
ARG EXTRAS=prepare,hf,track
WORKDIR /opt/opensora-dist
COPY setup.py ./
COPY opensora_dist/__init__.py opensora_dist/
RUN --mount=type=secret,id=pip \
    mkdir -p kernels/opensora_kernels && touch README.md \
    && export PIP_CONFIG_FILE=/run/secrets/pip DS_BUILD_OPS=0 \
    && python -m pip install --no-cache-dir -c /opt/venv/base.txt 'setuptools>=68' wheel ".${EXTRAS:+[$EXTRAS]}"

# The code, built with what is there: this needs no network.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY kernels kernels/
COPY launch launch/
COPY opensora_dist opensora_dist/
RUN python -m pip install --no-cache-dir --no-index --no-deps --no-build-isolation . \
    && rm -rf build ./*.egg-info

# Which source this is, for environment.json and for nodes that compare theirs: --build-arg COMMIT="$(git rev-parse HEAD)".
ARG COMMIT=
ENV OPENSORA_COMMIT=$COMMIT
LABEL org.opencontainers.image.title=opensora-dist \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.revision=$COMMIT

WORKDIR /workspace
COPY configs configs/
COPY launch launch/
# A checkout under a strict umask is readable by its owner alone.
RUN chmod -R a+rX configs launch
USER 10001:10001
HEALTHCHECK --interval=60s --timeout=20s --start-period=20s --retries=3 CMD ["/workspace/launch/docker/health.sh"]
ENTRYPOINT ["opensora-dist"]
CMD ["--help"]
