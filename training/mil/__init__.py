"""Slides as bags of tiles: multiple-instance learning on weak slide labels.

options      what a recipe's [bags] table can say
heads        gated attention and mean pooling, with one interface
network      tile encoder, slide head, and the two together
bags         which tiles of a slide make its bag, and datasets of bags
embeddings   a frozen encoder's answers, kept in a file
checkpoint   encoder and head, saved so that they can be served apart
attention    where a slide checkpoint looks, tile by tile
task         what the training loop trains when a recipe has [bags]

Nothing is imported here: `training.mil.options` is read by recipes and must not load torch.
"""
