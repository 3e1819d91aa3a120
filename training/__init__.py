"""Training: slides or tiles to a Checkpoint that rebuilds the model with nothing else.

`accelerate launch training/train.py --recipe demo --data DIR --out runs/x` is the way in; `training.checkpoint.load`
is the way out.
"""
