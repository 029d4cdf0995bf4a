"""Pictures of masks, features, predictions and runs: numbers first, drawn thinly.

    features.py, frames.py, curves.py    the numbers, in NumPy
    look.py                              what a model makes of some clips
    draw.py, video.py, page.py           PNG, mp4 and one HTML page of them
    validation.py                        the same pictures of a run, while it trains

Matplotlib is the extra `viz`; it is loaded where something is drawn.
"""
