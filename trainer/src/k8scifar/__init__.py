"""K8sCIFAR: one image classifier trained by two machines at once.

Data flows one way: config -> data -> training (ranks) -> results; launch and inference stand beside it.
"""

__version__ = "0.1.0"
