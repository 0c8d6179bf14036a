"""The data set: sources -> packed files -> the order of samples -> augmented batches.

May import: the single modules.
"""
