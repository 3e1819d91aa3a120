"""Evaluation: what checkpoints answer about patients they have not learnt from, scored, drawn and told in one report.

`python -m training evaluate CHECKPOINT... --data DIR --out DIR` is the way in (`training.evaluation.command`).
"""
