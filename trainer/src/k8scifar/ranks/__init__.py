"""The ranks: how they join, agree, send files, and find a silent one.

May import: the single modules, config.
"""
