"""MLflow's registry: checkpoints are taken from it by name and alias, and releases become versions of a model in it."""
