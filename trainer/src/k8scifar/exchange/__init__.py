"""How ranks combine gradients or weights, and divide a step's work.

May import: the single modules, config, ranks.
"""
