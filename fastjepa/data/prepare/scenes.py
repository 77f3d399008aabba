"""Rendered scenes to count and to measure: spheres, boxes and cylinders on a plane, with exact labels, and no download.

A scene gives a picture, the geometry of its objects, and labels of every pixel.

A ray caster in numpy after CLEVR (Johnson et al., CVPR 2017): 3 to 10 objects of two sizes, eight colours and two materials,
each of them in plain sight, under a camera and a light that vary. Image i is a function of (seed, split, i) alone. Only IEEE
arithmetic and square roots are used, in a fixed order, so the bits depend on neither batch, process nor vector width.

Points and directions are three arrays x, y, z that broadcast. Lengths are in units of the plane z = 0; a picture reaches from
-1 to 1 in both directions, right and up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SHAPES, SPHERE, BOX, CYLINDER = ("sphere", "cube", "cylinder"), 0, 1, 2
MATERIALS = ("rubber", "metal")
RADII = {"small": 0.42, "large": 0.7}
COLOURS = {  # sRGB
    "gray": (92, 92, 98), "red": (190, 32, 36), "blue": (36, 72, 215), "green": (24, 130, 40),
    "brown": (134, 74, 28), "purple": (140, 40, 190), "cyan": (30, 200, 205), "yellow": (250, 220, 40),
}  # fmt: skip
FEWEST, MOST = 3, 10  # objects of a scene
SCENE_SPLITS = ("train", "val")
PIXEL_LABELS = ("depth", "object", "shape", "material", "normal")
DEPTH_STEPS = 1000  # a unit, of a stored depth: 16 bits reach to 65.5 units, and scenes to 26

EXTENT, OBJECT_GAP = 3.6, 0.25  # half the side of the square that objects stand in, and the least room between two
HALF_VIEW = 0.37  # tangent of half the angle of view
FRAME = 0.97  # share of the half picture that objects keep to
LOOK = 96  # side of the map on which visibility is judged, whatever the size of the picture
VISIBLE_SHARE, VISIBLE_AREA = 0.6, 0.002  # of its own outline, and of the picture, that each object shows
SAMPLES = 3  # rays a pixel side
FAR_AWAY, HALF_SIDE, WIDE_SIDE = np.float32(np.inf), np.float32(0.5), np.float32(1.7)
CORNER_SIGNS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)  # corners of a block
FLOOR = np.array([1, 1, 0], np.float32)

ALBEDO = [[(value / 255) ** 2 for value in colour] for colour in COLOURS.values()]  # linear: bytes are square roots
GROUND, AMBIENT = (0.52, 0.52, 0.50), np.float32(0.4)
QUIET = np.errstate(divide="ignore", invalid="ignore")  # rays along a face, and past a ball

Vector = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Scene:
    """A scene: n objects on the plane z = 0, one camera, one distant light; float32.

    The camera looks along +y and down by the angle whose cosine and sine are `tilt`; x is to the right.
    """

    shape: np.ndarray  # (n,) int, indices of SHAPES
    large: np.ndarray  # (n,) bool
    colour: np.ndarray  # (n,) int, indices of COLOURS
    metal: np.ndarray  # (n,) bool
    place: np.ndarray  # (n, 2) x and y of the centres
    turn: np.ndarray  # (n, 2) cosine and sine of the rotation about the vertical
    camera: np.ndarray  # (3,)
    tilt: np.ndarray  # (2,)
    light: np.ndarray  # (3,) unit vector towards it
    key: float  # how bright it is
    ground: float  # how bright the plane is

    @cached_property
    def half(self) -> np.ndarray:
        """Half heights (n,): a cube's corners lie as far from its axis as the side of a cylinder of its size.

        A large cube reaches 0.7 from its axis to its upright edges; half its side, and so half its height, is 0.7 / sqrt(2).
        """
        return np.where(self.shape == BOX, self.reach * np.sqrt(HALF_SIDE), self.reach)

    @cached_property
    def reach(self) -> np.ndarray:
        """Distances (n,) that the objects extend from their axes."""
        return np.where(self.large, np.float32(RADII["large"]), np.float32(RADII["small"]))

    @cached_property
    def centre(self) -> np.ndarray:
        """Centres (n, 3) of the objects, which stand on the plane."""
        return np.concatenate([self.place, self.half[:, None]], axis=1)

    @property
    def depth(self) -> np.ndarray:
        """Depths (n,) of the centres along the optical axis: the third of CLEVR's pixel_coords."""
        return self.project(self.centre)[2]

    def project(self, points: np.ndarray) -> Vector:
        """Return where points (..., 3) are seen: right and up, in half pictures from the centre, and depth; each (...)."""
        x, y, z = (points[..., axis] - self.camera[axis] for axis in range(3))
        cos, sin = self.tilt
        depth = y * cos - z * sin
        scale = 1 / (depth * np.float32(HALF_VIEW))
        return x * scale, (y * sin + z * cos) * scale, depth

    def blocks(self, widen: float = 1) -> np.ndarray:
        """Return the corners (n, 8, 3) of upright blocks around the objects, `widen` times as wide as these."""
        extent = np.stack([self.reach * widen, self.reach * widen, self.half], axis=1)
        return self.centre[:, None] + CORNER_SIGNS * extent[:, None]


def draw_scene(seed: int, split: str, i: int) -> Scene:
    """Draw scene i of a split: first how many objects, then all the rest, anew until every object can be counted."""
    random = np.random.default_rng((seed, SCENE_SPLITS.index(split), i))
    n = FEWEST + int(random.random() * (MOST - FEWEST + 1))
    while True:
        scene = _try_scene(random, n)
        if scene is not None and _all_countable(scene):
            return scene


def _try_scene(random: np.random.Generator, n: int) -> Scene | None:
    """Draw a camera, a light and n objects that stand apart and within the frame; None where there was no room for one."""

    def between(low: float, high: float, *shape: int) -> np.ndarray:
        return (low + (high - low) * random.random(shape)).astype(np.float32)

    distance, aim = between(10.7, 11.9), between(-0.3, 0.3, 2) + np.array([0, 0.4], np.float32)
    tilt = _direction(between(0.31, 0.39))
    camera = np.array([aim[0], aim[1] - distance * tilt[0], distance * tilt[1]], np.float32)
    light = np.array([between(-1.0, 1.0), between(-0.7, 0.3), 1], np.float32)
    looks = {"shape": (3 * random.random(n)).astype(int), "large": random.random(n) < 0.5,
             "colour": (len(COLOURS) * random.random(n)).astype(int), "metal": random.random(n) < 0.5,
             "turn": np.stack(_direction(between(-0.42, 0.42, n)), axis=1)}  # fmt: skip
    looks["turn"][looks["shape"] != BOX] = 1, 0
    view = {"camera": camera, "tilt": tilt, "light": light / np.sqrt(_dot(light, light)),
            "key": float(between(0.85, 1.1)), "ground": float(between(0.9, 1.1))}  # fmt: skip
    tries = between(-EXTENT, EXTENT, 40 * n, 2)
    places = _stand(Scene(place=tries[:n], **looks, **view), tries.reshape(n, 40, 2))
    return None if places is None else Scene(place=places, **looks, **view)


def _direction(t: np.ndarray) -> np.ndarray:
    """Return cosine and sine of the angle with tan(angle / 2) = t, without the library functions that differ between CPUs."""
    return np.array([(1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)], np.float32)


def _stand(scene: Scene, tries: np.ndarray) -> np.ndarray | None:
    """Return places (n, 2): for each object the first of its `tries` (n, 40, 2) in the frame and apart from those before."""
    block = scene.blocks() - scene.centre[:, None] * FLOOR  # (n, 8, 3), each around the origin of the plane
    points = np.concatenate([tries, np.zeros_like(tries[..., :1])], axis=2)[:, :, None] + block[:, None]
    right, up, _ = scene.project(points)  # (n, 40, 8)
    inside = ((np.abs(right) < FRAME) & (np.abs(up) < FRAME)).all(axis=2)
    places = np.empty_like(tries[:, 0])
    for i, candidates in enumerate(tries):
        away = candidates[:, None] - places[:i]
        least = scene.reach[i] + scene.reach[:i] + np.float32(OBJECT_GAP)
        free = inside[i] & (away[..., 0] ** 2 + away[..., 1] ** 2 > least * least).all(axis=1)
        if not free.any():
            return None
        places[i] = candidates[free.argmax()]
    return places


def _all_countable(scene: Scene) -> bool:
    """Return whether enough of every object is seen, and none touches another of its own colour in the picture."""
    _, ids, outlines = trace_scene(scene, LOOK)
    seen = np.bincount(ids.ravel() + 1, minlength=len(scene.shape) + 1)[1:]  # ids [-1, 0, 0, 1] give [1, 2, 1], then [2, 1]
    if (seen < VISIBLE_SHARE * outlines).any() or (seen < VISIBLE_AREA * LOOK * LOOK).any():
        return False
    paint = np.append(scene.colour, -1)[ids]
    pairs = ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1]))
    return not any(((ids[a] != ids[b]) & (paint[a] == paint[b])).any() for a, b in pairs)


@QUIET
def trace_scene(scene: Scene, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Follow side x side rays from the camera to what each meets first.

    Returns:
        depth: (side, side) float32 along the optical axis.
        ids: (side, side) int8, the object, or -1 for the plane.
        outlines: (n,) rays that meet each object when it is alone.
    """
    rays = _rays(scene, side)
    depth = np.repeat(-scene.camera[2] / rays[2], side, axis=1)
    ids, outlines = np.full((side, side), -1, np.int8), np.zeros(len(scene.shape), np.int64)
    for i, window in enumerate(_windows(scene, scene.blocks(), side)):
        near = _ray_entry(scene, i, _local(scene, i, scene.camera - scene.centre[i]), _local(scene, i, _part_of(rays, window)))
        first = near < depth[window]
        depth[window][first], ids[window][first] = near[first], i
        outlines[i] = np.count_nonzero(near < FAR_AWAY)
    return depth, ids, outlines


def _rays(scene: Scene, side: int) -> Vector:
    """Return directions (1, side), (side, 1), (side, 1) with length 1 along the optical axis, so that they count depth.

    Rays go through the middles of pixels: with 4 a side, at -0.75, -0.25, 0.25 and 0.75 half pictures.
    """
    steps = ((np.arange(side, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / side) - 1) * np.float32(HALF_VIEW)
    (cos, sin), up = scene.tilt, -steps[:, None]
    return steps[None], cos + up * sin, up * cos - sin


def _part_of(rays: Vector, window: tuple[slice, slice]) -> Vector:
    """Return the rays of the rows and columns in a window."""
    return rays[0][:, window[1]], rays[1][window[0]], rays[2][window[0]]


def _windows(scene: Scene, points: np.ndarray, side: int) -> list[tuple[slice, slice]]:
    """Return, for each of n sets of `points` (n, k, 3), the rows and columns of the rays that can meet its convex hull.

    Row 0 is the top. A hull from 0.1 to 0.5 up, in a picture of 100 rays a side, is at rows 25 to 45: (1 - 0.5) * 50 and
    (1 - 0.1) * 50. One more ray before and behind makes up for rounding.
    """
    right, up, _ = scene.project(points)
    low, high = np.array([[-up.max(axis=1), right.min(axis=1)], [-up.min(axis=1), right.max(axis=1)]])  # (2, n) each
    low = np.clip((low + 1) * HALF_SIDE * side - 1, 0, side).astype(int).T.tolist()
    high = np.clip((high + 1) * HALF_SIDE * side + 2, 0, side).astype(int).T.tolist()
    return [(slice(top, bottom), slice(left, end)) for (top, left), (bottom, end) in zip(low, high, strict=True)]


def _local(scene: Scene, i: int, vector: Vector | np.ndarray) -> Vector:
    """Return a direction in the frame of object i, whose half height is 1."""
    x, y, z = vector
    (cos, sin), scale = scene.turn[i], 1 / scene.half[i]
    return (x * cos + y * sin) * scale, (y * cos - x * sin) * scale, z * scale


def _ray_entry(scene: Scene, i: int, start: Vector, ray: Vector) -> np.ndarray:
    """Return where rays, in the frame of object i, enter it: multiples of `ray`, FAR_AWAY where they miss it.

    A solid is what several simple bodies have in common: a cube is three slabs, a cylinder an endless cylinder and a slab.
    """
    shape = scene.shape[i]
    if shape == SPHERE:
        spans = [_ball(start, ray)]
    elif shape == CYLINDER:
        spans = [_ball(start[:2], ray[:2]), _slab(start[2], ray[2])]
    else:
        spans = [_slab(o, d) for o, d in zip(start, ray, strict=True)]
    near, far = spans[0]
    for other_near, other_far in spans[1:]:
        near, far = np.maximum(near, other_near), np.minimum(far, other_far)
    return np.where((near < far) & (near > 0), near, FAR_AWAY)


def _slab(start: np.ndarray, ray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where rays enter and leave the slab |coordinate| <= 1."""
    inverse = 1 / ray
    a, b = (-1 - start) * inverse, (1 - start) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def _ball(start: tuple[np.ndarray, ...], ray: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return where rays enter and leave the unit sphere, or with two coordinates the endless cylinder; nan where they miss.

    The ends are the roots t of |start + t * ray|^2 = 1.
    """
    square, along, away = (_dot(u, v) for u, v in ((ray, ray), (start, ray), (start, start)))
    root, inverse = np.sqrt(along * along - square * (away - 1)), 1 / square
    return (-along - root) * inverse, (root - along) * inverse


def _dot(u: tuple[np.ndarray, ...], v: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the scalar product, added up from left to right: a library's order may depend on the vector width."""
    total = u[0] * v[0]
    for a, b in zip(u[1:], v[1:], strict=True):
        total = total + a * b
    return total


@QUIET
def render_scene(scene: Scene, size: int) -> np.ndarray:
    """Render a scene as (size, size, 3) uint8 sRGB, each pixel the mean of SAMPLES x SAMPLES rays."""
    side = size * SAMPLES
    depth, ids, _ = trace_scene(scene, side)
    x, y, z = (a + d * depth for a, d in zip(scene.camera, _rays(scene, side), strict=True))
    lit, open_sky = np.ones_like(depth), np.ones_like(depth)
    for i, window in enumerate(_windows(scene, _darkened(scene), side)):
        _darken(scene, i, [v[window] for v in (x, y, z)], ids[window], lit[window], open_sky[window])
    light = _ground_light(scene, x, y, lit, open_sky)
    pixels = np.stack([light * np.float32(channel) for channel in GROUND])
    for i, window, own, point in _seen_points(scene, (x, y, z), ids):
        for channel, values in zip(pixels, _surface(scene, i, point, lit[window][own]), strict=True):
            channel[window][own] = values
    return _to_bytes(pixels, size)


@QUIET
def label_scene(scene: Scene, size: int) -> dict[str, np.ndarray]:
    """Label the pixels of a scene's picture, each with what the ray through its middle meets first; no label is a mean.

    Returns:
        depth: (size, size) uint16, the distance along the optical axis, in DEPTH_STEPS a unit. 0, no depth, never occurs.
        object: (size, size) uint8, 0 for the plane, i + 1 for object i.
        shape, material: (size, size) uint8, 0 for the plane, then 1 + the index in SHAPES or MATERIALS.
        normal: (size, size, 3) uint8, the unit normal to the right, up, and backwards along the optical axis, which is
            towards the camera. A coordinate c is 255 * (c + 1) / 2, rounded: -1, 0 and 1 are 0, 128 and 255.
    """
    depth, ids, _ = trace_scene(scene, size)
    points = tuple(a + d * depth for a, d in zip(scene.camera, _rays(scene, size), strict=True))
    x, y, z = normal = np.stack([np.zeros_like(depth), np.zeros_like(depth), np.ones_like(depth)])  # of the plane
    for i, window, own, point in _seen_points(scene, points, ids):
        for coordinate, values in zip(normal, _normal(scene, i, point), strict=True):
            coordinate[window][own] = values
    cos, sin = scene.tilt
    turned = np.stack([x, y * sin + z * cos, z * sin - y * cos], axis=2)
    return {
        "depth": (depth * np.float32(DEPTH_STEPS) + np.float32(0.5)).astype(np.uint16),
        "object": (ids + 1).astype(np.uint8),
        "shape": np.append(scene.shape + 1, 0)[ids].astype(np.uint8),  # the plane's -1 is the last
        "material": np.append(scene.metal + 1, 0)[ids].astype(np.uint8),
        "normal": ((turned + 1) * np.float32(127.5) + np.float32(0.5)).astype(np.uint8),
    }


def _seen_points(
    scene: Scene, points: Vector, ids: np.ndarray
) -> Iterator[tuple[int, tuple[slice, slice], np.ndarray, Vector]]:
    """Yield each object's number, its window, the rays (h, w) bool of it that meet the object first, and where they do.

    Args:
        points: where all rays end, each (side, side); those of an object are each (n,).
        ids: (side, side), the object of each ray.
    """
    for i, window in enumerate(_windows(scene, scene.blocks(), len(ids))):
        own = ids[window] == i
        yield i, window, own, tuple(v[window][own] for v in points)


def _darkened(scene: Scene) -> np.ndarray:
    """Return points (n, 24, 3) around all that each object can darken: its surroundings on the ground, and its shadow."""
    top, near = scene.blocks(), scene.blocks(WIDE_SIDE)
    fallen = top - scene.light * (top[..., 2:] / scene.light[2])  # where the shadows of its corners lie
    return np.concatenate([near, near * FLOOR, fallen], axis=1)


def _darken(scene: Scene, i: int, points: Vector, ids: np.ndarray, lit: np.ndarray, open_sky: np.ndarray) -> None:
    """Take away in place what object i hides: the light from `lit`, and for the ground around it the sky from `open_sky`."""
    start = _local(scene, i, [p - c for p, c in zip(points, scene.centre[i], strict=True)])
    lit[(_ray_entry(scene, i, start, _local(scene, i, scene.light)) < FAR_AWAY) & (ids != i)] = 0
    wide = WIDE_SIDE * scene.reach[i] / scene.half[i]
    hidden = np.maximum(0, 1 - (start[0] * start[0] + start[1] * start[1]) * (1 / (wide * wide)))
    open_sky *= 1 - np.float32(0.75) * hidden * hidden * (ids < 0)


def _ground_light(scene: Scene, x: np.ndarray, y: np.ndarray, lit: np.ndarray, open_sky: np.ndarray) -> np.ndarray:
    """Return how bright the ground is at points x, y; it fades away from the centre."""
    fade = 1 / (1 + np.float32(0.012) * (x * x + y * y))
    return scene.ground * fade * (AMBIENT * open_sky + scene.key * scene.light[2] * (1 - AMBIENT) * lit)


def _surface(scene: Scene, i: int, point: Vector, lit: np.ndarray) -> list[np.ndarray]:
    """Return red, green and blue of points on object i: matte, or a metal that mirrors sky and ground around a highlight."""
    x, y, z = _normal(scene, i, point)
    lambert = np.maximum(0, x * scene.light[0] + y * scene.light[1] + z * scene.light[2]) * lit * scene.key
    view = [p - c for p, c in zip(point, scene.camera, strict=True)]
    inverse = 1 / np.sqrt(_dot(view, view))
    view = [v * inverse for v in view]
    facing = _dot(view, (x, y, z)) * 2
    mirrored = [v - facing * n for v, n in zip(view, (x, y, z), strict=True)]
    gleam = np.maximum(0, _dot(mirrored, scene.light)) * lit
    sky = np.clip(mirrored[2] * np.float32(1.5) + np.float32(0.3), 0, 1)
    for _ in range(5 if scene.metal[i] else 3):
        gleam = gleam * gleam
    diffuse, mirror, highlight = (0.45, 0.5, 0.8) if scene.metal[i] else (0.95, 0, 0.08)
    glow = AMBIENT * (np.float32(0.8) + np.float32(0.2) * z) + lambert
    return [np.float32(c) * (np.float32(diffuse) * glow + np.float32(mirror) * (sky * np.float32(0.9) + np.float32(0.1)))
            + np.float32(highlight) * gleam for c in ALBEDO[scene.colour[i]]]  # fmt: skip


def _normal(scene: Scene, i: int, point: Vector) -> Vector:
    """Return the unit normals of object i at points on it: its coordinates themselves, or the axis of the largest."""
    x, y, z = _local(scene, i, [p - c for p, c in zip(point, scene.centre[i], strict=True)])
    if scene.shape[i] == CYLINDER:
        side = x * x + y * y > z * z
        x, y, z = x * side, y * side, np.sign(z) * ~side
    elif scene.shape[i] == BOX:
        largest = np.maximum(np.maximum(np.abs(x), np.abs(y)), np.abs(z))
        x, y, z = (np.sign(v) * (np.abs(v) == largest) for v in (x, y, z))
    cos, sin = scene.turn[i]
    return x * cos - y * sin, y * cos + x * sin, z


def _to_bytes(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return linear (3, size * SAMPLES, size * SAMPLES) as the bytes (size, size, 3) of its means.

    A square root stands for sRGB's curve.
    """
    parts = [pixels[:, a::SAMPLES, b::SAMPLES] for a in range(SAMPLES) for b in range(SAMPLES)]
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    curve = np.sqrt(np.minimum(total * np.float32(1 / SAMPLES**2), 1))
    return (curve * 255 + np.float32(0.5)).astype(np.uint8).transpose(1, 2, 0)
