# One image for head, workers and jobs:    docker build --tag ray-cxr:0.1.0 .
# With CUDA's libraries, for GPU workers:  docker build --build-arg LOCK=requirements-gpu.lock --tag ray-cxr:0.1.0-gpu .
# All other versions are the same, so both work in one cluster. Neither contains patient data or tokens.
FROM python:3.11.13-slim-bookworm

ARG LOCK=requirements.lock

ENV PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    PIP_ROOT_USER_ACTION=ignore

# KubeRay's pod probes use wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray

WORKDIR /opt/ray_cxr

# Before the code, so that a changed line of code does not repeat the installation.
COPY requirements.lock requirements-gpu.lock ./
RUN pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement "$LOCK"

COPY pyproject.toml README.md LICENSE ./
COPY ray_cxr ray_cxr
COPY jobs jobs
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation --editable .

USER 1000
CMD ["ray-cxr", "--help"]
