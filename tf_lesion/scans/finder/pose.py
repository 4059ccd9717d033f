"""From places in MNI space, one for each voxel, to a pose: weighted least squares, robustly."""

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

ROUNDS = 8  # of reweighting
SMALLEST_SCALE_MM = 1.0
NEARBY_MM = 15.0  # standard deviation, of the places that tell where a landmark is
FEW = 10.0  # such places, below which the affine map tells it
RIDGE_MM2 = 100.0  # beside some 1600 of a whole brain along an axis: slabs do not tell a shear


def fit_similarity(
    points: np.ndarray, wanted: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Rotation, scale and shift that best take `points` to `wanted`, in closed form.

    Umeyama, IEEE PAMI 13 (1991), equations 34 to 43, with weights.

    Args:
        points, wanted: [N, 3].
        weights: [N], not all 0; None for equal ones.

    Returns:
        [4, 4]. `rigid_part` gives the best map without scale.
    """
    weights = np.ones(len(points)) if weights is None else np.asarray(weights, dtype=float)
    share = weights / weights.sum()
    middle, wanted_middle = share @ points, share @ wanted
    p, w = points - middle, wanted - wanted_middle
    left, spread, right = np.linalg.svd((w * share[:, None]).T @ p)
    sign = np.ones(3)
    sign[2] = np.sign(np.linalg.det(left @ right))
    turn = left @ np.diag(sign) @ right
    scale = (spread * sign).sum() / max(share @ (p**2).sum(axis=1), 1e-12)
    matrix = np.eye(4)
    matrix[:3, :3] = scale * turn
    matrix[:3, 3] = wanted_middle - scale * turn @ middle
    return matrix


def fit_robustly(
    points: np.ndarray, wanted: np.ndarray, weights: np.ndarray, scale_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`fit_similarity`, with less weight for places that disagree with the others.

    Iteratively reweighted least squares with the weights of a Cauchy distribution.

    Args:
        points: [N, 3] mm.
        wanted: [N, 3] mm.
        weights: [N].
        scale_mm: [N], expected distance between a wanted place and where the fit takes its point.

    Returns:
        (matrix [4, 4], distances [N] mm that are left, weights [N] at the end).
    """
    scale_mm = np.maximum(scale_mm, SMALLEST_SCALE_MM)
    robust = weights / scale_mm**2
    for _ in range(ROUNDS):
        matrix = fit_similarity(points, wanted, robust)
        left = np.linalg.norm(apply(matrix, points) - wanted, axis=1)
        robust = weights / (scale_mm**2 + left**2)
    return matrix, left, robust


def affine_near(
    near: np.ndarray, points: np.ndarray, wanted: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Weighted least-squares affine map [4, 4] of points to wanted [N, 3], drawn towards `near`.

    Ridge regression of what `near` leaves, so that directions in which the points hardly extend
    are those of `near`.
    """
    share = weights / weights.sum()
    middle = share @ points
    p, left = points - middle, wanted - apply(near, points)
    shift = share @ left
    spread = (p * share[:, None]).T
    linear = np.linalg.solve(spread @ p + RIDGE_MM2 * np.eye(3), spread @ (left - shift)).T
    matrix = near.copy()
    matrix[:3, :3] += linear
    matrix[:3, 3] += shift - linear @ middle
    return matrix


def fit_landmarks(
    points: np.ndarray,
    wanted: np.ndarray,
    weights: np.ndarray,
    scale_mm: np.ndarray,
    landmarks: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The similarity that best fits landmarks, from where points all over the brain lie.

    Heads differ in their proportions and in more, so the best similarity of all of their places is
    not that of the landmarks. An affine map says where these are, and what it leaves nearby.

    Args:
        points, wanted, weights, scale_mm: as of `fit_robustly`.
        landmarks: [M, 3] mm, where `wanted` are.

    Returns:
        (matrix [4, 4], distances [N] mm that the robust similarity of the points leaves).
    """
    similarity, left, robust = fit_robustly(points, wanted, weights, scale_mm)
    back = np.linalg.inv(affine_near(similarity, points, wanted, robust))
    off = points - apply(back, wanted)
    apart = np.square(landmarks[:, None] - wanted).sum(axis=-1)
    nearby = robust / np.median(robust) * np.exp(-apart / (2 * NEARBY_MM**2))  # [M, N]
    seen = apply(back, landmarks) + nearby @ off / (nearby.sum(axis=1, keepdims=True) + FEW)
    return fit_similarity(seen, landmarks), left


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Places [..., 3] after an affine map [4, 4]."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def without_scale(matrix: np.ndarray, center: np.ndarray) -> np.ndarray:
    """The rigid map with the rotation of `matrix` that takes `center` [3] where that takes it."""
    left, _, right = np.linalg.svd(matrix[:3, :3])
    rigid = np.eye(4)
    rigid[:3, :3] = left @ right
    rigid[:3, 3] = apply(matrix, np.asarray(center)) - rigid[:3, :3] @ center
    return rigid


def between(first: np.ndarray, second: np.ndarray, center: np.ndarray, share: float) -> np.ndarray:
    """The weighted mean of two rigid maps [4, 4]: of their turns, and of where they take `center`.

    `share` is the weight of the second.
    """
    mean, center = np.eye(4), np.asarray(center)
    turns = Rotation.from_matrix([first[:3, :3], second[:3, :3]])
    mean[:3, :3] = Slerp([0, 1], turns)(share).as_matrix()
    taken = (1 - share) * apply(first, center) + share * apply(second, center)
    mean[:3, 3] = taken - mean[:3, :3] @ center
    return mean
