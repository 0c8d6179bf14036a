"""K8sCIFAR: one image classifier trained by two machines at once.

Data flows one way: config -> data -> model -> loop -> (metrics, checkpoints).
"""

__version__ = "0.1.0"
