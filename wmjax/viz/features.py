"""Computes the numbers behind pictures of features: PCA, similarity, retrieval, error.

NumPy only; nothing is drawn here.
"""

from typing import NamedTuple

import numpy as np

from wmjax.masking import Grid
from wmjax.types import Array

_FITTED = 4096  # most tokens that a basis is fitted to
_REACH = 98  # percentile of |component| that is drawn in full colour


class Basis(NamedTuple):
    """Three principal components, fitted once and used for all features that are compared."""

    mean_D: np.ndarray
    components_D3: np.ndarray
    reach_3: np.ndarray  # |component| that is drawn in full colour

    def __call__(self, features_XD: Array) -> np.ndarray:
        """Project features of any rank to X3; most values are within -1 and 1."""
        return (np.asarray(features_XD) - self.mean_D) @ self.components_D3 / self.reach_3


def fit_basis(features_XD: Array) -> Basis:
    """Fit the three components of largest variance, the largest first, to evenly spaced tokens.

    The largest entry of each component is made positive, so that equal features always give equal
    colours.
    """
    tokens_ND = np.asarray(features_XD).reshape(-1, np.shape(features_XD)[-1])
    tokens_ND = tokens_ND[:: -(-len(tokens_ND) // _FITTED)].astype(np.float64)
    mean_D = tokens_ND.mean(axis=0)
    centred_ND = tokens_ND - mean_D
    components_D3 = _largest(centred_ND.T @ centred_ND, 3)
    components_D3 *= np.sign(
        np.take_along_axis(components_D3, np.abs(components_D3).argmax(axis=0)[None], axis=0)
    )
    reach_3 = np.percentile(np.abs(centred_ND @ components_D3), _REACH, axis=0)
    return Basis(mean_D, components_D3, np.maximum(reach_3, 1e-12))


def colours(components_X3: np.ndarray) -> np.ndarray:
    """Map three components to uint8 RGB: lightness, blue to yellow, green to magenta.

    Uses OKLab (Ottosson, 2020), in which equal steps look equal. Red-green colour-blind people lose
    the third component only.
    """
    first, second, third = np.moveaxis(np.clip(components_X3, -1, 1), -1, 0)
    L, a, b = 0.62 + 0.26 * first, 0.11 * third, 0.13 * second
    cones = (
        (L + 0.3963377774 * a + 0.2158037573 * b) ** 3,
        (L - 0.1055613458 * a - 0.0638541728 * b) ** 3,
        (L - 0.0894841775 * a - 1.2914855480 * b) ** 3,
    )
    linear = np.stack(cones, axis=-1) @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = np.clip(linear, 0, 1)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * rgb).astype(np.uint8)


def similarity(features_ND: Array, token: int, mean_D: Array) -> np.ndarray:
    """Return the cosine between one token and every token, N, after subtracting the mean token."""
    units_ND = _units(np.asarray(features_ND) - np.asarray(mean_D))
    return units_ND @ units_ND[token]


def frame_features(features_BND: Array, grid: Grid) -> np.ndarray:
    """Return the mean token of every tubelet, BTD, less its mean over the clips.

    That mean depends on the time in a clip, not on the content. A single clip keeps it.
    """
    features = np.asarray(features_BND)
    frames_BTD = features.reshape(len(features), grid[0], -1, features.shape[-1]).mean(axis=2)
    return frames_BTD - frames_BTD.mean(axis=0) if len(frames_BTD) > 1 else frames_BTD


def nearest_frames(
    features_BTD: Array, clip: int, t: int, count: int
) -> list[tuple[int, int, float]]:
    """Return the tubelets most similar to one: (clip, tubelet, cosine), the most similar first.

    Each other clip gives its best tubelet only, because the frames of a clip resemble each other.
    """
    units_BTD = _units(np.asarray(features_BTD))
    cosine_BT = units_BTD @ units_BTD[clip, t]
    best_B = cosine_BT.max(axis=1)
    best_B[clip] = -np.inf
    order = np.argsort(-best_B, kind="stable")[: min(count, len(best_B) - 1)]
    return [(int(b), int(cosine_BT[b].argmax()), float(best_B[b])) for b in order]


def errors(prediction_MD: Array, target_MD: Array, target_ids_M: Array, grid: Grid) -> np.ndarray:
    """Return mean |prediction - target| of each predicted token, THW; NaN elsewhere."""
    error_M = np.abs(np.asarray(prediction_MD) - np.asarray(target_MD)).mean(axis=-1)
    error_THW = np.full(grid, np.nan)
    error_THW.ravel()[np.asarray(target_ids_M)] = error_M
    return error_THW


def _largest(matrix_DD: np.ndarray, count: int) -> np.ndarray:
    """Return the eigenvectors of the largest eigenvalues, the largest first.

    Block power iteration takes a fortieth of the time of a full decomposition at width 1,024.
    """
    rng = np.random.default_rng(0)
    block = rng.normal(size=(len(matrix_DD), min(4 * count, len(matrix_DD))))
    for _ in range(40):
        block = np.linalg.qr(matrix_DD @ block)[0]
    vectors = np.linalg.eigh(block.T @ matrix_DD @ block)[1]
    return block @ vectors[:, : -count - 1 : -1]


def _units(features_XD: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(features_XD, axis=-1, keepdims=True)
    return features_XD / np.maximum(norm, 1e-12)
