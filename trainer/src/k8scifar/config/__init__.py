"""The settings of a training: types, limits, descriptions, and the loading of their values.

May import: the single modules. Imports no torch.
"""
