"""A package outside wmjax: a model, a source, a mask and an evaluator of somebody else."""
