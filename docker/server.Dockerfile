# NVIDIA's Triton with what Clotline's models need, supervised by `serving`:
#   docker build --file docker/server.Dockerfile --tag clotline-server .
# TRITON_DIGEST, e.g. @sha256:..., pins the base: `docker buildx imagetools inspect nvcr.io/nvidia/tritonserver:26.07-py3`.
ARG TRITON_TAG=26.07-py3
ARG TRITON_DIGEST=
# Of the image in which slides/native and serving/native are compiled.
ARG PYTHON_TAG=3.11-slim-bookworm
ARG PYTHON_DIGEST=@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

# The compiled fast path for JPEG tiles (slides/native); where it cannot be had, libjpeg-turbo gives the same pixels. And what
# tritonserver loads first (serving/native); without it bad JSON is answered 500, and the memory of large requests is kept.
FROM python:${PYTHON_TAG}${PYTHON_DIGEST} AS native
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --constraint constraints.txt numpy simplejpeg ziglang
COPY slides slides
COPY serving/__init__.py serving/
COPY serving/native serving/native
RUN python -m slides.native || true; python -m serving.native || true

FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG}${TRITON_DIGEST}

LABEL org.opencontainers.image.title="clotline-server" \
      org.opencontainers.image.description="Triton Inference Server with Clotline's preprocessing, supervised" \
      org.opencontainers.image.licenses="Apache-2.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

# For the stubs, beside the container's own NumPy: the versions that decode to the same pixels everywhere.
WORKDIR /opt/clotline
COPY serving/server-requirements.txt constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    grep -E '^(simplejpeg|pillow|opencv-python-headless)==' server-requirements.txt > stubs.txt \
    && python3 -m pip install --no-deps --requirement stubs.txt \
    && echo /opt/clotline/stubs > "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/clotline.pth"

# For the launcher alone, which takes PYTHONPATH away from tritonserver and its stubs.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip install --target launcher --constraint constraints.txt 'tritonclient[http,grpc]' numpy

COPY --from=native /build/slides stubs/slides
COPY serving launcher/serving
COPY --from=native /build/serving/native launcher/serving/native
COPY deploy launcher/deploy
COPY docker/start_server.py launcher/start_server.py
RUN install --directory --owner=1000 --group=1000 --mode=0700 /live /run/clotline

ENV PYTHONPATH=/opt/clotline/launcher:/opt/clotline/stubs \
    PYTHONUNBUFFERED=1 \
    CLOTLINE_TRITON_HOME=/run/clotline \
    CLOTLINE_LIVE=/live
USER 1000:1000
VOLUME ["/live"]
EXPOSE 8000 8001 8002 8003
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8003/ready', timeout=4)"]
ENTRYPOINT ["python3", "/opt/clotline/launcher/start_server.py"]
