"""What a run's figures mean: prediction against a baseline, health of the features, probes.

Pure functions of a model's output and small fits; knows no data format and no configuration.
"""
