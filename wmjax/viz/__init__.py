"""Pictures of masks, features, predictions and runs. Numbers are computed apart from drawing.

    features.py, frames.py, curves.py    the numbers, in NumPy
    look.py                              features and predictions of a model for some clips
    draw.py, video.py, page.py           PNG, mp4, and one HTML page with all of them
    validation.py                        the evaluator that draws the same pictures in training

Matplotlib is the extra `viz`; it is imported only when something is drawn.
"""
