"""Every setting of a training, typed and documented, and where its values come from.

May import: the single modules. Imports no torch.
"""
