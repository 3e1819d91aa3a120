# Training and export: PyTorch (with CUDA), Accelerate, MLflow's client, the exporters:
#   docker build --file docker/training.Dockerfile --tag clotline-training .
# PYTHON_DIGEST pins the base; leave it empty (--build-arg PYTHON_DIGEST=) for the newest image of the tag.
ARG PYTHON_TAG=3.11-slim-bookworm
ARG PYTHON_DIGEST=@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

FROM python:${PYTHON_TAG}${PYTHON_DIGEST} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/clotline \
    && /opt/clotline/bin/python -m pip install --constraint constraints.txt torch torchvision
COPY docker/requirements_of.py docker/
RUN --mount=type=cache,target=/root/.cache/pip \
    python docker/requirements_of.py train track export > requirements.txt \
    && /opt/clotline/bin/python -m pip install --constraint constraints.txt --requirement requirements.txt

# The compiled fast path for JPEG tiles (slides/native); where it cannot be had, libjpeg-turbo gives the same pixels.
FROM python:${PYTHON_TAG}${PYTHON_DIGEST} AS native
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --constraint constraints.txt numpy simplejpeg ziglang
COPY slides slides
RUN python -m slides.native || true

FROM python:${PYTHON_TAG}${PYTHON_DIGEST}
LABEL org.opencontainers.image.title="clotline-training" \
      org.opencontainers.image.description="Trains slide classifiers, exports them and proves what was exported" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 1000 --create-home --shell /bin/bash clotline
COPY --from=build /opt/clotline /opt/clotline
WORKDIR /workspace
COPY --chown=root:root pyproject.toml README.md LICENSE ./
COPY --chown=root:root --from=native /build/slides slides
COPY --chown=root:root clients clients
COPY --chown=root:root serving serving
COPY --chown=root:root exporters exporters
COPY --chown=root:root training training
# What the exporters put into each release.
COPY --chown=root:root model_repository model_repository
RUN install --directory --owner=clotline --group=clotline runs
ENV PATH=/opt/clotline/bin:$PATH PYTHONPATH=/workspace PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=passive MLFLOW_DISABLE_TELEMETRY=true \
    CLOTLINE_TRITON_HOME=/workspace/runs/triton
USER 1000:1000
VOLUME ["/workspace/runs"]
# A training that ends has no health.
HEALTHCHECK NONE
CMD ["accelerate", "launch", "training/train.py", "--help"]
