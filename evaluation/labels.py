"""Where the labels of a picture go, so that none covers another one, a point or, if it can be
helped, a line.

    board = Board(left, bottom, right, top)      # pixels that labels may take
    board.add_point(x, y, size)
    board.add_path([(x, y), ...])
    at = board.place(anchor, width, height)      # (left, bottom, right, top), or None

Used by speed_picture.py. Knows pixels only, nothing of matplotlib. The label that is
placed first has the best place, so the caller begins with the important ones.
"""
import math

NEAR = (9, 13, 18)              # pixels from a point to its label
FAR = (24, 34, 46, 60, 80, 105, 135, 170, 210, 260, 320, 400, 500)
DIRECTIONS = 24
CROSSED = 30                    # pixels: a line under a label is as bad as so much distance


class Board:
    def __init__(self, left, bottom, right, top):
        self.left, self.bottom, self.right, self.top = left, bottom, right, top
        self.taken = []                             # boxes (left, bottom, right, top)
        self.pieces = []                            # of lines: (start, end)

    def add_point(self, x, y, size):
        self.taken.append((x - size / 2, y - size / 2, x + size / 2, y + size / 2))

    def add_path(self, points):
        self.pieces += zip(points[:-1], points[1:], strict=True)

    def place(self, anchor, width, height, near_only=False):
        """The best free place for a label that belongs to the point `anchor`; it is taken then."""
        reach = NEAR
        if not near_only:
            reach = NEAR + FAR
        best = None
        least = math.inf
        for distance in reach:
            # a label further away cannot be better than one that crosses nothing
            if distance >= least:
                break
            for box in around(anchor, width, height, distance):
                if not self.is_free(box):
                    continue
                cost = distance + CROSSED * self.crossed(box) + reluctance(anchor, box)
                if cost < least:
                    best = box
                    least = cost
        if best is None:
            return None
        self.taken.append(best)
        return best

    def is_free(self, box):
        left, bottom, right, top = box
        if left < self.left or bottom < self.bottom or right > self.right or top > self.top:
            return False
        return not any(
            left < other[2] and other[0] < right and bottom < other[3] and other[1] < top
            for other in self.taken
        )

    def crossed(self, box):
        """How many pieces of lines run through a box."""
        return sum(runs_through(start, end, box) for start, end in self.pieces)


def runs_through(start, end, box):
    """Does the line between two points touch the box? Liang and Barsky's clipping: the share of its
    way at which it enters and leaves the box, in both directions.
    """
    enter = 0.0
    leave = 1.0
    for axis in (0, 1):
        low = box[axis] - start[axis]
        high = box[axis + 2] - start[axis]
        way = end[axis] - start[axis]
        if way == 0:
            if low > 0 or high < 0:
                return False
            continue
        first, last = sorted((low / way, high / way))
        enter = max(enter, first)
        leave = min(leave, last)
    return enter < leave


def around(anchor, width, height, distance):
    """Boxes whose nearest edge is about so far from the anchor, those to the right first."""
    x, y = anchor
    for number in range(DIRECTIONS):
        # 0, 1, -1, 2, -2, ... steps from the right
        step = (number + 1) // 2
        if number % 2 == 0:
            step = -step
        angle = 2 * math.pi * step / DIRECTIONS
        middle_x = x + math.cos(angle) * (distance + width / 2)
        middle_y = y + math.sin(angle) * (distance + height / 2)
        left = middle_x - width / 2
        bottom = middle_y - height / 2
        yield left, bottom, left + width, bottom + height


def reluctance(anchor, box):
    """A label reads best to the right of its point; to the left costs a few pixels."""
    left, _, right, _ = box
    middle = (left + right) / 2
    return max(0.0, anchor[0] - middle) / (right - left) * 8
