"""Commands of the main door beside training: the demo, and the plan of a run on a pod."""
