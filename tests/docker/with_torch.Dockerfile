# A base with torch in its own Python, as images of PyTorch and NVIDIA are.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=secret,id=pip \
    PIP_CONFIG_FILE=/run/secrets/pip python3 -m pip install --break-system-packages --no-cache-dir 'torch>=2.11,<2.14'
