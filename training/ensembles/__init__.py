"""Ensembles of networks from tables of their out-of-fold predictions alone; nothing here loads torch.

`python -m training ensemble` is the way in, ensemble.json (`training.ensembles.definition`) the way out.
"""
