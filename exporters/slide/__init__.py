"""Slide models and model ensembles as Triton models: encoders, one head graph, and `slide_classifier`.

A slide's answer is made in two steps, whatever stands behind it: every tile becomes an embedding a member (batched over
the tiles of many slides), then one small ONNX graph turns the embeddings of a slide into its answer: the members' heads,
and the combination that a definition of `training.ensembles` asks for, weights inside. A single network is an
ensemble of one; a tile network is a member whose embedding is its probabilities and whose head is their mean.
"""
