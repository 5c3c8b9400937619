"""The arithmetic of the evaluation: ranks, overlaps and bootstrap intervals; numpy alone, called by `evaluate`.

Everything is frozen: a number of one run is comparable to that of another. No result depends on the order of the
candidates, on the size of a block, or on how a matrix product rounds: cosines within TIE of each other are tied.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...transforms.boxes import area, clip

Floats = npt.NDArray[np.floating[Any]]
Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TIE = 1e-6  # of cosines: well above what float32 rounds, well below what any model means
RESAMPLES = 1000
_BLOCK = 1 << 22  # similarities in memory at once


def normalise(text: str) -> str:
    """What decides whether two texts are the same: lower case, single spaces."""
    return " ".join(text.lower().split())


def distinct(texts: Iterable[str]) -> tuple[list[str], Ints]:
    """Texts that differ after `normalise`, sorted by that, each in its first spelling; and for each text its place."""
    first: dict[str, str] = {}
    keys = []
    for text in texts:
        keys.append(normalise(text))
        first.setdefault(keys[-1], text)
    place = {key: i for i, key in enumerate(sorted(first))}
    return [first[key] for key in place], np.fromiter((place[key] for key in keys), np.int64, len(keys))


def evenly(n: int, limit: int | None) -> range | list[int]:
    """`limit` of n positions at equal distances, the first included: floor(i * n / limit). All of them without one."""
    return range(n) if limit is None or limit >= n else [i * n // limit for i in range(limit)]


def unit(rows: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Scale [..., D] to length 1, float32. A row of zeros stays (its cosine to anything is 0); infinity becomes NaN."""
    wide = np.asarray(rows, np.float32)
    with np.errstate(all="ignore"):
        length = np.linalg.norm(wide, axis=-1, keepdims=True)
        return np.where(length == 0, wide, wide / length).astype(np.float32)


def ranks(queries: Floats, candidates: Floats, query: Ints, candidate: Ints) -> Ints:
    """Rank of the best correct candidate of every query: 1 + the wrong candidates that score no less.

    queries [n, D], candidates [c, D]: unit rows. query, candidate [p]: the correct pairs, none twice, at least one a
    query (else ValueError). Returns [n], from 1 to 1 + the query's wrong candidates.
    A tie counts against the model: equal features everywhere rank last, and so does NaN. Other correct candidates are
    not counted, wherever they score. Memory: _BLOCK similarities, never [n, c].
    """
    order = np.argsort(query, kind="stable")
    query, candidate = query[order], candidate[order]
    starts = np.searchsorted(query, np.arange(len(queries) + 1))
    if not np.diff(starts).all():
        raise ValueError("a query without a correct candidate")
    found = np.empty(len(queries), np.int64)
    step = max(1, _BLOCK // max(1, len(candidates)))
    for low in range(0, len(queries), step):
        high = min(low + step, len(queries))
        pairs, first = slice(starts[low], starts[high]), starts[low:high] - starts[low]
        row = query[pairs] - low
        with np.errstate(all="ignore"):
            scores = queries[low:high] @ candidates.T
            right = scores[row, candidate[pairs]]
            floor = np.maximum.reduceat(right, first) - np.float32(TIE)
            ahead = np.count_nonzero(~(scores < floor[:, None]), axis=1)  # not >=: NaN is ahead, too
            ahead -= np.add.reduceat((~(right < floor[row])).astype(np.int64), first)
        found[low:high] = 1 + ahead
    return found


def best_iou(predicted: Floats, boxes: Floats, owner: Ints) -> Float64:
    """The largest intersection over union of each predicted box with the boxes that it may meet.

    predicted [q, 4], boxes [b, 4]: x0, y0, x1, y1 in 0..1; box j belongs to prediction owner[j]. Returns float64 [q]. A
    prediction is clipped to the image first; one that then is no box (NaN, reversed, outside), or that has none: 0.
    """
    a, b = clip(np.asarray(predicted, np.float64))[owner], np.asarray(boxes, np.float64)
    with np.errstate(all="ignore"):
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        inner = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)
        overlap = np.where(inner > 0, inner / (area(a) + area(b) - inner), 0.0)
    best = np.zeros(len(predicted))
    np.maximum.at(best, owner, overlap)
    return best


def estimate(
    scores: Sequence[npt.ArrayLike], image: Ints, group: Ints | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> list[dict[str, float]]:
    """Mean of each score with its 95 % bootstrap interval, as {"value", "low", "high"}.

    scores: k of [n] (a hit as 0 or 1, or an overlap); image [n]: where each comes from; group [n] or None: the mean is
    taken within each group and then over the groups that occur (mAcc: the groups are the classes).
    Bootstrap: the images are drawn with replacement, as many as there are, each with all of its scores; the interval is
    the 2.5 and 97.5 percentile (linear interpolation) of `resamples` such means. Groups that do not occur in a resample
    are left out of it. Ranks are not taken anew: the candidates stay those of the whole set. The resamples depend on
    the seed and the number of images alone, so the metrics of a set share them.
    """
    _, image = np.unique(image, return_inverse=True)
    group = np.zeros_like(image) if group is None else np.unique(group, return_inverse=True)[1]
    n, groups = int(image.max()) + 1, int(group.max()) + 1
    cells, cell = np.unique(image * groups + group, return_inverse=True)  # of scores with one image and one group
    of_image, of_group = cells // groups, cells % groups
    columns = [np.bincount(cell, np.asarray(s, np.float64)) for s in scores]
    counts = np.bincount(cell).astype(np.float64)

    def means(weights: Float64) -> list[float]:
        total = np.bincount(of_group, weights * counts, groups)
        seen = total > 0
        return [float(np.mean(np.bincount(of_group, weights * c, groups)[seen] / total[seen])) for c in columns]

    rng = np.random.default_rng(seed)
    drawn = [
        means(np.bincount(rng.integers(0, n, n), minlength=n)[of_image].astype(np.float64)) for _ in range(resamples)
    ]
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0).tolist()
    values = means(np.ones(len(cells)))
    return [{"value": v, "low": a, "high": b} for v, a, b in zip(values, low, high, strict=True)]
