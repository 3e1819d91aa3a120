"""python start_mlflow.py: becomes `mlflow server` on PostgreSQL, whose password it reads from a file.

libpq takes the password from PGPASSWORD: it is in no command line, and in no address that MLflow could write down.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PASSWORD_FILE = Path(os.environ.get("MLFLOW_DATABASE_PASSWORD_FILE", "/run/secrets/mlflow_database_password"))
DATABASE = os.environ.get("MLFLOW_DATABASE", "postgresql+psycopg2://mlflow@postgres:5432/mlflow")
ALLOWED_HOSTS = os.environ.get("MLFLOW_ALLOWED_HOSTS", "mlflow:5000,127.0.0.1:*,localhost:*")

if __name__ == "__main__":
    password = PASSWORD_FILE.read_text().strip()
    if not password:
        sys.exit(f"error: {PASSWORD_FILE} is empty: it holds the password of the database.")
    command = ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--workers", "1"]  # noqa: S104  # nosec B104
    command += ["--backend-store-uri", DATABASE, "--artifacts-destination", "/artifacts"]
    command += ["--allowed-hosts", ALLOWED_HOSTS]
    os.execvpe(command[0], command, {**os.environ, "PGPASSWORD": password})  # noqa: S606
