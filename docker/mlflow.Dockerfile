# MLflow's server of the version that training uses, with PostgreSQL:
#   docker build --file docker/mlflow.Dockerfile --tag clotline-mlflow .
# PYTHON_DIGEST pins the base; leave it empty (--build-arg PYTHON_DIGEST=) for the newest image of the tag.
ARG PYTHON_TAG=3.11-slim-bookworm
ARG PYTHON_DIGEST=@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

FROM python:${PYTHON_TAG}${PYTHON_DIGEST} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/mlflow \
    && /opt/mlflow/bin/python -m pip install --constraint constraints.txt mlflow psycopg2-binary==2.9.13

FROM python:${PYTHON_TAG}${PYTHON_DIGEST}
LABEL org.opencontainers.image.title="clotline-mlflow" \
      org.opencontainers.image.description="MLflow tracking server and registry on PostgreSQL" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin clotline \
    && install --directory --owner=clotline --group=clotline /artifacts
COPY --from=build /opt/mlflow /opt/mlflow
COPY --chown=root:root docker/start_mlflow.py /opt/mlflow/start_mlflow.py
ENV PATH=/opt/mlflow/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
WORKDIR /tmp
USER 1000:1000
VOLUME ["/artifacts"]
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5000/health', timeout=4)"]
ENTRYPOINT ["python", "/opt/mlflow/start_mlflow.py"]
