"""Around the training on each machine: checks, torchrun under a supervisor, how the machines meet.

May import: the single modules, config, data, ranks, results. Imports no torch until a rank or an agent runs.
"""
