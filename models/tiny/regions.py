"""Boxes from maps: connected components, touching instances, the box that holds most evidence, colour refinement.

Pure numpy on small grids (a side of at most about 100 cells). Boxes are x0, y0, x1, y1 in 0..1 of the image.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Box = tuple[float, float, float, float]


def resample(maps: Floats, height: int, width: int) -> Floats:
    """Stretch [h, w, ...] to [height, width, ...], bilinear, both grids covering the same area."""

    def matrix(old: int, new: int) -> Floats:
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.minimum(place.astype(int), max(old - 2, 0))
        weights = np.zeros((new, old), np.float32)
        weights[np.arange(new), low] = 1 - (place - low)
        weights[np.arange(new), np.minimum(low + 1, old - 1)] += place - low
        return weights

    tall = np.tensordot(matrix(maps.shape[0], height), maps, 1)
    return np.asarray(np.moveaxis(np.tensordot(matrix(maps.shape[1], width), tall, (1, 1)), 0, 1), np.float32)


def box_of(mask: Mask) -> Box:
    """Frame the true cells of a mask that has some."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return (
        float(columns[0] / width),
        float(rows[0] / height),
        float((columns[-1] + 1) / width),
        float((rows[-1] + 1) / height),
    )


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    wide, high = (min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1))
    both = max(wide, 0.0) * max(high, 0.0)
    return both / (area(one) + area(other) - both + 1e-9)


def area(box: Box) -> float:
    """Share of the image that a box covers."""
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(one: Box, other: Box) -> float:
    """Intersection over the smaller of two boxes."""
    both = max(min(one[2], other[2]) - max(one[0], other[0]), 0.0) * max(
        min(one[3], other[3]) - max(one[1], other[1]), 0.0
    )
    return both / (min(area(one), area(other)) + 1e-9)


def components(mask: Mask, least: int) -> list[Mask]:
    """Split a mask into its 4-connected parts of at least `least` cells, largest first."""
    parent: list[int] = []

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    runs: list[tuple[int, int, int]] = []  # row, start, end
    above: list[int] = []
    padded = np.pad(mask, ((0, 0), (1, 1)))
    edge_rows, edges = np.nonzero(padded[:, 1:] != padded[:, :-1])
    spans: list[list[tuple[int, int]]] = [[] for _ in range(len(mask))]
    for row, start, end in zip(edge_rows[::2].tolist(), edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        spans[row].append((start, end))
    for row, cells in enumerate(spans):
        here = []
        for start, end in cells:
            node = len(parent)
            parent.append(node)
            runs.append((row, start, end))
            here.append(node)
            for other in above:
                if runs[other][1] < end and start < runs[other][2]:
                    parent[root(other)] = root(node)
        above = here
    parts: dict[int, Mask] = {}
    for node, (row, start, end) in enumerate(runs):
        parts.setdefault(root(node), np.zeros_like(mask))[row, start:end] = True
    return sorted((part for part in parts.values() if part.sum() >= least), key=lambda part: -int(part.sum()))


def instances(mask: Mask, least: int) -> list[Mask]:
    """Split one component where things of its kind touch: at deep valleys of its upper contour, as between heads."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(columns) < 8:
        return [mask]
    low, high = int(columns[0]), int(columns[-1]) + 1
    heights = rows[-1] + 1 - np.argmax(mask[:, low:high], axis=0)
    best, cut = 0.0, 0
    for column in range(2, high - low - 2):
        left, right = int(heights[:column].max()), int(heights[column:].max())
        depth = min(left, right) - int(heights[column])
        halves = [int(half.sum()) for half in (mask[:, : low + column], mask[:, low + column :])]
        # Heads rise by a good part of their shoulders' width; a flat valley or a sliver is no second thing.
        if min(halves) >= max(least, 0.15 * sum(halves)) and depth > best:
            best, cut = depth, low + column
    if best < 0.18 * len(rows):
        return [mask]
    left_half, right_half = mask.copy(), mask.copy()
    left_half[:, cut:] = False
    right_half[:, :cut] = False
    return [*instances(left_half, least), *instances(right_half, least)]


def heaviest(evidence: Floats) -> tuple[Box, float]:
    """Find the box with the largest sum of evidence (which is negative where there is none), and the sum.

    Exact search over all boxes of the grid: all pairs of rows at once, one pass over the columns (Kadane).
    """
    if evidence.shape[0] > evidence.shape[1]:
        (x0, y0, x1, y1), total = heaviest(np.ascontiguousarray(evidence.T))
        return (y0, x0, y1, x1), total
    height, width = evidence.shape
    top, bottom = np.triu_indices(height + 1, 1)
    rows = np.concatenate((np.zeros((1, width), np.float32), evidence.cumsum(0)))
    strips = rows[bottom] - rows[top]
    running, start = np.zeros(len(top), np.float32), np.zeros(len(top), int)
    best, left, right = np.full(len(top), -np.inf, np.float32), np.zeros(len(top), int), np.zeros(len(top), int)
    for column in range(width):
        fresh = running <= 0
        start[fresh] = column
        running = np.where(fresh, 0, running) + strips[:, column]
        better = running > best
        best[better], left[better], right[better] = running[better], start[better], column + 1
    k = int(best.argmax())
    box = (float(left[k] / width), float(top[k] / height), float(right[k] / width), float(bottom[k] / height))
    return box, float(best[k])


def blur(values: Floats, radius: int) -> Floats:
    """Mean over a square of 2 * radius + 1 cells, the border repeated."""
    for axis in (0, 1):
        pad = [(radius + 1, radius) if k == axis else (0, 0) for k in range(values.ndim)]
        sums = np.pad(values, pad, mode="edge").cumsum(axis)
        steps = np.arange(values.shape[axis])
        values = (sums.take(steps + 2 * radius + 1, axis) - sums.take(steps, axis)) / (2 * radius + 1)
    return np.asarray(values, np.float32)


def outline(pixels: npt.NDArray[np.uint8], box: Box) -> Mask | None:
    """Shrink a rough box to the outline of the thing in it: what has colours that the surroundings do not have.

    pixels: [h, w, 3]. Compares colour histograms inside the box and in a ring around it, as GrabCut starts, without its
    graph cut. Returns the largest part, or None if the colours do not tell.
    """
    height, width = pixels.shape[:2]
    rows, columns = window(box, height, width)
    dy, dx = 2 + (rows.stop - rows.start) // 4, 2 + (columns.stop - columns.start) // 4
    inside, around = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    around[max(rows.start - dy, 0) : rows.stop + dy, max(columns.start - dx, 0) : columns.stop + dx] = 1
    around[rows, columns] = 0
    if around.sum() < 0.2 * (rows.stop - rows.start) * (columns.stop - columns.start):
        return None  # the box fills the image: nothing to compare with
    inside[rows, columns] = 1
    bins = (pixels // 32).astype(np.intp)
    codes = (bins[..., 0] * 8 + bins[..., 1]) * 8 + bins[..., 2]
    thing, rest = (np.bincount(codes.ravel(), weights.ravel(), 512) for weights in (inside, around))
    rest = rest * (inside.sum() / around.sum())
    odd = (thing / (thing + rest + 1e-6))[codes].astype(np.float32)
    near = np.zeros((height, width), bool)
    near[
        max(rows.start - dy // 2, 0) : rows.stop + dy // 2, max(columns.start - dx // 2, 0) : columns.stop + dx // 2
    ] = True
    parts = components((blur(odd, 1) > 0.62) & near, 12)
    return parts[0] if parts else None


def window(box: Box, height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns of a grid that a box covers, at least one of each."""
    top, left = min(int(box[1] * height + 0.5), height - 1), min(int(box[0] * width + 0.5), width - 1)
    return slice(top, max(top + 1, int(box[3] * height + 0.5))), slice(left, max(left + 1, int(box[2] * width + 0.5)))


def patches(pixels: npt.NDArray[np.uint8], least: int, colours: tuple[int, ...] = (4, 8)) -> list[Mask]:
    """Parts of one colour: components of the clusters of a k-means over [h, w, 3], at each number of clusters."""
    points = blur(pixels.astype(np.float32), 1).reshape(-1, 3)
    light = points.sum(1, keepdims=True)
    points = np.concatenate((light / 3 * 0.7, points - light / 3), 1)
    found: list[Mask] = []
    for count in colours:
        order = np.argsort(points[:, 0], kind="stable")
        centres = points[order[(np.arange(count) * 2 + 1) * len(order) // (2 * count)]]
        for _ in range(8):
            nearest = ((points[:, None] - centres) ** 2).sum(-1).argmin(1)
            for k in range(count):
                if (nearest == k).any():
                    centres[k] = points[nearest == k].mean(0)
        groups = nearest.reshape(pixels.shape[:2])
        for k in range(count):
            smooth = blur((groups == k).astype(np.float32), 1) > 0.5
            found += [part for part in components(smooth, 2 * least) if part.mean() < 0.7]
    return sorted(found, key=lambda part: -int(part.sum()))[:16]


def head_and_body(mask: Mask) -> list[Mask]:
    """Cut a person's outline at the neck; nothing where the outline has none (lying, seen in part, far away)."""
    widths = mask.sum(1)
    rows = np.flatnonzero(widths)
    top, height = int(rows[0]), len(rows)
    if height < 12:
        return []
    low, high = top + height // 12 + 2, top + int(height * 0.5)
    shoulders = int(widths[top + height // 4 :].max())
    for row in range(low, high):
        head = int(widths[top:row].max())
        if (
            widths[row] <= 0.9 * head
            and widths[row : row + max(3, height // 8)].max() > 1.25 * head
            and head < 0.7 * shoulders
        ):
            neck = row + int(np.argmin(widths[row : row + 3]))
            upper, lower = mask.copy(), mask.copy()
            upper[neck:], lower[:neck] = False, False
            return [upper, lower]
    return []


COLOURS = ("black", "white", "gray", "red", "orange", "brown", "yellow", "green", "blue", "purple", "pink")


def colours(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Name the colour of every pixel of [h, w, 3]: index in COLOURS."""
    rgb = pixels.astype(np.float32) / 255
    value, low = rgb.max(-1), rgb.min(-1)
    chroma = value - low
    saturation = chroma / (value + 1e-6)
    red, green, blue = (rgb[..., k] for k in range(3))
    safe = chroma + 1e-6
    hue = (
        np.where(
            value == red,
            (green - blue) / safe % 6,
            np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
        )
        * 60
    )
    named = np.select(
        [hue < 11, hue < 42, hue < 68, hue < 165, hue < 255, hue < 290, hue < 340],
        [3, 4, 6, 7, 8, 9, 10],
        3,
    )
    named = np.where((named == 4) & ((value < 0.6) | (saturation < 0.55)), 5, named)
    named = np.where((named == 3) & (saturation < 0.45) & (value > 0.7), 10, named)
    named = np.where(saturation < 0.2, np.where(value > 0.78, 1, 2), named)
    return np.where(value < 0.22, 0, named).astype(np.int8)
