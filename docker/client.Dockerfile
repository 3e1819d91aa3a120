# The client (`python -m clients`) and the gateway's metrics (`python -m deploy.access_metrics`), without PyTorch:
#   docker build --file docker/client.Dockerfile --tag clotline-client .
# PYTHON_DIGEST pins the base; leave it empty (--build-arg PYTHON_DIGEST=) for the newest image of the tag.
ARG PYTHON_TAG=3.11-slim-bookworm
ARG PYTHON_DIGEST=@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

FROM python:${PYTHON_TAG}${PYTHON_DIGEST} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY pyproject.toml constraints.txt ./
COPY docker/requirements_of.py docker/
RUN --mount=type=cache,target=/root/.cache/pip \
    python docker/requirements_of.py > requirements.txt \
    && python -m venv /opt/clotline \
    && /opt/clotline/bin/python -m pip install --constraint constraints.txt --requirement requirements.txt \
        prometheus-client cryptography

FROM python:${PYTHON_TAG}${PYTHON_DIGEST}
LABEL org.opencontainers.image.title="clotline-client" \
      org.opencontainers.image.description="Asks a Clotline server about slides and tiles; counts a gateway's requests" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin clotline
COPY --from=build /opt/clotline /opt/clotline
COPY --chown=root:root slides /opt/clotline/code/slides
COPY --chown=root:root clients /opt/clotline/code/clients
COPY --chown=root:root serving /opt/clotline/code/serving
COPY --chown=root:root deploy /opt/clotline/code/deploy
COPY --chown=root:root docker/start_access_metrics.py /opt/clotline/start_access_metrics.py
ENV PATH=/opt/clotline/bin:$PATH PYTHONPATH=/opt/clotline/code PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /data
USER 1000:1000
# A command that ends has no health; services made of this image bring a check of their own.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m"]
CMD ["clients", "--help"]
