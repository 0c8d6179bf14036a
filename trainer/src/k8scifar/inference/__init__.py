"""Trained models: opened, evaluated on the test images, asked for single images.

May import: the single modules, config, data, ranks, exchange, results, training.
"""
