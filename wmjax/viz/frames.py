"""Paints frames by token: roles in a mask, colours, outlines.

NumPy only. Colours are from the palette of Okabe and Ito, which colour-blind people can tell apart.
"""

import numpy as np

from wmjax.masking import Grid
from wmjax.types import Array

NEITHER, CONTEXT, TARGET = 0, 1, 2
COLOURS = np.array([(0, 0, 0), (86, 180, 233), (230, 159, 0)])  # by role: black, blue, orange


def roles(context_ids_K: Array, target_ids_M: Array, grid: Grid) -> np.ndarray:
    """Return the role of every token in a mask, THW: NEITHER, CONTEXT or TARGET."""
    roles_THW = np.full(grid, NEITHER)
    roles_THW.ravel()[np.asarray(context_ids_K)] = CONTEXT
    roles_THW.ravel()[np.asarray(target_ids_M)] = TARGET
    return roles_THW


def spread(cells_THW: np.ndarray, video_THWC: np.ndarray) -> np.ndarray:
    """Repeat the value of each token over its pixels and frames; further axes stay."""
    for axis, size in enumerate(video_THWC.shape[:3]):
        cells_THW = cells_THW.repeat(size // cells_THW.shape[axis], axis=axis)
    return cells_THW


def paint_roles(video_THWC: np.ndarray, roles_THW: np.ndarray) -> np.ndarray:
    """Return frames in grey, tinted by role: uint8 THWC."""
    tint_THWC = COLOURS[spread(roles_THW, video_THWC)]
    return (0.65 * tint_THWC + 0.35 * 255 * _grey(video_THWC)).astype(np.uint8)


def show_context(video_THWC: np.ndarray, roles_THW: np.ndarray) -> np.ndarray:
    """Return what the encoder sees: the frames at context tokens, black elsewhere."""
    return video_THWC * (spread(roles_THW, video_THWC) == CONTEXT)[..., None].astype(np.uint8)


def lay_over(video_THWC: np.ndarray, colours_THWC: np.ndarray, valid_THW: np.ndarray) -> np.ndarray:
    """Return the colours of valid tokens over the frames in dark grey: uint8 THWC."""
    dim_THWC = np.broadcast_to(50 * _grey(video_THWC), video_THWC.shape).astype(np.uint8)
    valid = spread(valid_THW, video_THWC)[..., None]
    return np.where(valid, spread(colours_THWC, video_THWC), dim_THWC)


def outline(video_THWC: np.ndarray, token: int, grid: Grid) -> np.ndarray:
    """Draw a white line with black edges around a token, in the frames that it covers: uint8."""
    line = max(1, video_THWC.shape[1] // grid[1] // 10)
    t, row, column = np.unravel_index(token, grid)
    T, H, W = (size // cells for size, cells in zip(video_THWC.shape[:3], grid, strict=True))
    marked = video_THWC.copy()
    cell = marked[T * t : T * (t + 1), H * row : H * (row + 1), W * column : W * (column + 1)]
    inside = cell.copy()
    cell[:] = 0
    cell[:, line:-line, line:-line] = 255
    line *= 2
    cell[:, line:-line, line:-line] = inside[:, line:-line, line:-line]
    return marked


def busiest(video_THWC: np.ndarray, grid: Grid) -> int:
    """Return the token of the middle tubelet whose pixels change most between frames."""
    T, H, W = grid
    grey_TYX = _grey(video_THWC)[..., 0]
    change_YX = np.abs(np.diff(grey_TYX, axis=0)).reshape(-1, *grey_TYX.shape[1:])
    first = min(T // 2 * (len(video_THWC) // T), len(change_YX) - 1)
    rows, columns = grey_TYX.shape[1] // H, grey_TYX.shape[2] // W
    cells_HW = change_YX[first].reshape(H, rows, W, columns).mean(axis=(1, 3))
    return T // 2 * H * W + int(cells_HW.argmax())


def _grey(video_THWC: np.ndarray) -> np.ndarray:
    """Return the luma of the pixels, one channel from 0 to 1."""
    return np.asarray(video_THWC, np.float32) @ np.array([[0.299], [0.587], [0.114]]) / 255
