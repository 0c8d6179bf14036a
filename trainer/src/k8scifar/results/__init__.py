"""What a run leaves behind and shows: its folder, TensorBoard, progress, summary, report.

May import: the base modules, config, data.
"""
