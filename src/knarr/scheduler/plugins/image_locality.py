"""ImageLocality: prefer nodes that have large images of the pod, scaled by how widespread they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from knarr.scheduler.columns import Ints, Rows
from knarr.scheduler.framework import MAXIMUM_SCORE, Cycle, Plugin

_MEGABYTE = 1024 * 1024
MINIMUM_BYTES = 23 * _MEGABYTE
MAXIMUM_BYTES_PER_CONTAINER = 1000 * _MEGABYTE


class ImageLocality(Plugin):
    name = "ImageLocality"

    def score(self, cycle: Cycle, rows: Rows) -> npt.NDArray[Any] | None:
        table = cycle.table
        if not table.image_rows:
            return None
        stamp = (table.images_version, len(table))
        memo = cycle.shape.memo.get(self)
        if memo is None or memo[0] != stamp:
            memo = cycle.shape.memo[self] = (stamp, self._scores(cycle))
        scores: Ints | None = memo[1]
        return None if scores is None else scores[rows]

    def _scores(self, cycle: Cycle) -> Ints | None:
        table, nodes = cycle.table, len(cycle.table)
        total = np.zeros(table.capacity, dtype=np.int64)
        for image in cycle.shape.images:
            held = table.image_rows.get(image)
            if held:
                for row, size in held.items():
                    total[row] += int(size * (len(held) / nodes))
        if not total.any():
            return None
        most = MAXIMUM_BYTES_PER_CONTAINER * len(cycle.shape.images)
        clipped = np.clip(total, MINIMUM_BYTES, most)
        scores: Ints = MAXIMUM_SCORE * (clipped - MINIMUM_BYTES) // (most - MINIMUM_BYTES)
        return scores if scores.any() else None
