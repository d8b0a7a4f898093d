"""Pictures of what an encoder makes of images: neighbours, map, near-duplicates, outliers, patches, attention."""

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple
from unicodedata import east_asian_width

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL.ImageOps import fit
from torch import Tensor

from ..data.arrays import AnyImage
from ..data.labels import UNLABELLED
from ..data.pictures import to_picture
from ..evaluation.knn import nearest_others
from ..utils.seeding import generator
from .feature_map import plot_feature_map
from .fonts import compose, find_missing
from .pages import escape
from .tables import format_table
from .tiles import Tile, plot_tiles

PICTURE = 144
"""Side in pixels of an image on the page."""

SAME, OTHER = "#009E73", "#D55E00"
"""Colours of a neighbour of the same class and of another."""

SAMPLES, SHOWN = 8, 8
"""Images whose neighbours are shown, and how many of them."""

COMPARED = 10
"""Neighbours to which the mean similarity tells how usual an image is."""

MAPPED = 2000
"""Points of the map. More take t-SNE minutes and hide each other."""

GROUPS = 10
"""Groups that the map gives a colour of their own."""

CLUSTERS = 8
PAIRS, ODD = 12, 24
"""Pairs of near-duplicates and outliers that are shown."""

NUMBERED = "No font on this machine has the characters of some class names, so the figures number these classes"


class Section(NamedTuple):
    """A part of the page: its heading, the file of its figure, and Markdown that explains it."""

    heading: str
    figure: str
    text: str


@dataclass
class Explored:
    """Features of images, with what a page shows of each.

    Args:
        features: (N, D).
        labels: (N,), UNLABELLED for none, or None.
        class_names: by label.
        photo: reads the image of a row, decoded and upright.
        name: returns the file or the place of a row's image.
        seed: of the images that are drawn.
    """

    features: Tensor
    labels: Tensor | None
    class_names: Sequence[str]
    photo: Callable[[int], AnyImage]
    name: Callable[[int], str]
    seed: int

    def image(self, row: int) -> np.ndarray:
        """The image of a row as a square picture (S, S, 3) in [0, 1]."""
        return np.asarray(fit(to_picture(self.photo(row)), (PICTURE, PICTURE))) / 255

    @cached_property
    def nearest(self) -> tuple[Tensor, Tensor]:
        """Similarities and rows (N, k) of the images nearest to each, once the mean feature is taken away from all."""
        return nearest_others(self.features - self.features.mean(0), max(COMPARED, SHOWN))

    def label(self, row: int) -> str:
        """The class of an image; empty if it has none."""
        if self.labels is None or self.labels[row] == UNLABELLED:
            return ""
        return self.class_names[int(self.labels[row])]

    @cached_property
    def figure_names(self) -> list[str]:
        """The class names in figures: "class 3" for one with characters that no font of this machine has."""
        names = [compose(name) for name in self.class_names]
        missing = find_missing(" ".join(names))
        return [f"class {label}" if missing.intersection(name) else name for label, name in enumerate(names)]

    def describe_numbers(self) -> str:
        """Say which classes of the images the figures number, if any, in Markdown."""
        known = [] if self.labels is None else self.labels[self.labels != UNLABELLED].unique().tolist()
        names = [(self.figure_names[label], self.class_names[label]) for label in map(int, known)]
        numbered = [f"{shown} is {escape(name)}" for shown, name in names if shown != compose(name)]
        return f"{NUMBERED}: {', '.join(numbered)}." if numbered else ""

    def caption(self, row: int) -> str:
        """The class of an image as it fits beneath the image; empty if it has none."""
        return cut_name(self.figure_names[int(self.labels[row])]) if self.labels is not None and self.label(row) else ""

    def draw_samples(self, count: int) -> list[int]:
        """Draw rows, from as many classes as possible where there are labels."""
        order = torch.randperm(len(self.features), generator=generator(self.seed, "explore"))
        if self.labels is not None:
            labels = self.labels[order]
            turn = torch.zeros_like(labels)  # how many of its class come before an image
            for label in labels.unique():
                turn[labels == label] = torch.arange(int((labels == label).sum()))
            order = order[turn.argsort(stable=True)]
        return order[:count].tolist()


def draw_neighbours(images: Explored, folder: Path) -> Section:
    """Draw sample images and the images nearest to each."""
    similarity, index = images.nearest
    rows = []
    for row in images.draw_samples(SAMPLES):
        tiles = [Tile(images.image(row), images.caption(row) or "sample")]
        for other, near in zip(index[row, :SHOWN].tolist(), similarity[row, :SHOWN].tolist(), strict=True):
            color = None
            if images.label(row) and images.label(other):
                color = SAME if images.label(row) == images.label(other) else OTHER
            text = "\n".join(filter(None, [f"{near:.3f}", images.caption(other)]))
            tiles.append(Tile(images.image(other), text, color))
        rows.append(tiles)
    plot_tiles(rows, folder / "explore_neighbours.png", apart=[1])
    text = (
        "On the left sample images, beside each the images with the most similar features, with the cosine similarity "
        "(after the mean of all features is taken away)."
    )
    if images.labels is not None:
        text += " Green frames are of the same class, orange ones of another."
        if (images.labels != UNLABELLED).sum() > 1:
            agree, chance = measure_agreement(images)
            text += (
                f" Of all images with a label, {agree:.1%} have the same class as the image nearest to them that has a "
                f"label; at random it would be {chance:.1%}."
            )
    return Section("Nearest neighbours", "explore_neighbours.png", text)


def measure_agreement(images: Explored) -> tuple[float, float]:
    """Return the share of labelled images whose nearest labelled image has their class, and what chance would give."""
    assert images.labels is not None
    rows = (images.labels != UNLABELLED).nonzero()[:, 0]
    labels = images.labels[rows]
    index = (
        images.nearest[1]
        if len(rows) == len(images.features)
        else nearest_others(images.features[rows] - images.features.mean(0), 1)[1]
    )
    shares = labels.bincount().double() / len(labels)
    return float((labels[index[:, 0]] == labels).double().mean()), float((shares**2).sum())


def draw_map(images: Explored, folder: Path) -> Section:
    """Draw a map of the features by t-SNE, coloured by class, or by cluster where there are no labels."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    order = torch.randperm(len(images.features), generator=generator(images.seed, "map"))
    rows = order[:MAPPED].sort().values
    features = F.normalize(images.features[rows], dim=1).numpy()
    dimensions = min(50, *features.shape)
    reduced = PCA(dimensions, random_state=images.seed).fit_transform(features)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    points = TSNE(init="pca", perplexity=perplexity, random_state=images.seed).fit_transform(reduced)
    if images.labels is None:
        count = min(CLUSTERS, len(rows))
        groups = KMeans(count, random_state=images.seed).fit_predict(reduced)
        names, kind = (
            [f"cluster {number + 1}" for number in range(count)],
            "clusters that k-means finds in the features",
        )
    else:
        groups, names = group_by_class(images.labels[rows], images.figure_names)
        kind = f"the {len(names)} largest classes" if (groups == len(names)).any() else "classes"
    path = folder / "explore_map.png"
    plot_feature_map(points, np.asarray(groups), names, lambda row: images.image(int(rows[row])), path)
    text = (
        f"t-SNE of the features of {len(rows):,} images: those with similar features lie close together, and distances "
        f"between groups mean little. On the left the colours are {kind}. On the right the images in their places."
    )
    return Section("Map", path.name, text)


def group_by_class(labels: Tensor, class_names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return the group (N,) of each label and the names of the largest classes; all others are one more group."""
    counts = torch.where(labels == UNLABELLED, 0, 1).new_zeros(len(class_names))
    counts.scatter_add_(0, labels.clamp(min=0), (labels != UNLABELLED).long())
    largest = [label for label in counts.argsort(descending=True, stable=True).tolist() if counts[label]][:GROUPS]
    place = {label: number for number, label in enumerate(sorted(largest))}
    groups = np.array([place.get(label, len(place)) for label in labels.tolist()])
    return groups, [class_names[int(label)] for label in sorted(largest)]


def draw_duplicates(images: Explored, folder: Path) -> Section:
    """Draw the pairs of images with the most similar features."""
    pairs = list_pairs(*images.nearest)[:PAIRS]
    columns = 3
    tiles, lines = [], []
    for number, (near, one, other) in enumerate(pairs, 1):
        shown = [images.image(row) for row in (one, other)]
        difference = float(np.abs(shown[0] - shown[1]).mean())
        classes = [images.caption(row) for row in (one, other)]
        tiles += [Tile(shown[0], f"pair {number}\n{classes[0]}"), Tile(shown[1], f"{near:.3f}\n{classes[1]}")]
        lines.append(
            [str(number), f"{near:.4f}", f"{difference:.1%}", *(escape(images.name(row)) for row in (one, other))]
        )
    rows = [tiles[start : start + 2 * columns] for start in range(0, len(tiles), 2 * columns)]
    plot_tiles(rows, folder / "explore_duplicates.png", apart=range(2, 2 * columns, 2))
    table = format_table(["pair", "similarity", "pixels differ by", "image", "other image"], lines)
    text = (
        "The pairs with the most similar features. Duplicates have a similarity of 1 and pixels that do not differ; "
        "other pairs are alike to the encoder only. Remove duplicates where one of a pair serves training and the "
        "other evaluation.\n\n" + table
    )
    return Section("Near-duplicates", "explore_duplicates.png", text)


def list_pairs(similarity: Tensor, index: Tensor) -> list[tuple[float, int, int]]:
    """List (similarity, row, other row) of neighbours, the most similar first and each pair once."""
    best = similarity[:, 0].argsort(descending=True, stable=True)[: 4 * PAIRS].tolist()
    found = {}
    for row in best:
        for near, other in zip(similarity[row].tolist(), index[row].tolist(), strict=True):
            found[min(row, other), max(row, other)] = near
    return sorted(((near, *pair) for pair, near in found.items()), key=lambda pair: (-pair[0], pair[1:]))


def draw_outliers(images: Explored, folder: Path) -> Section:
    """Draw the images that are least similar to their nearest ones."""
    similarity = images.nearest[0][:, :COMPARED]
    usual = similarity.mean(1)
    rows = usual.argsort(stable=True)[:ODD].tolist()
    tiles = [Tile(images.image(row), f"{usual[row]:.3f}\n{images.caption(row)}") for row in rows]
    plot_tiles([tiles[start : start + 8] for start in range(0, len(tiles), 8)], folder / "explore_outliers.png")
    lines = [[f"{usual[row]:.4f}", escape(images.label(row)), escape(images.name(row))] for row in rows[: ODD // 2]]
    text = (
        f"The images that are least similar to the {similarity.shape[1]} images nearest to them, with the mean "
        f"similarity (all images: {usual.mean():.3f}). They may be rare or not belong to the set.\n\n"
        + format_table(["similarity", "class", "image"], lines)
    )
    return Section("Outliers", "explore_outliers.png", text)


def draw_patches(
    pictures: Sequence[np.ndarray], colors: dict[str, np.ndarray], folder: Path, note: str = ""
) -> Section:
    """Draw the colours of the patches beneath the images, a row for each patch size.

    Args:
        colors: for the label of a row, (N, h, w, 3) in [0, 1].
    """
    rows = [[Tile(picture) for picture in pictures]]
    rows += [[Tile(image) for image in images] for images in colors.values()]
    plot_tiles(rows, folder / "explore_patches.png", ["image", *colors])
    text = (
        "The first three principal components of the features of all patches shown, as red, green and blue: patches of "
        "like colour have like features. " + note
    )
    return Section("Patch features", "explore_patches.png", text.strip())


def draw_attention(pictures: Sequence[np.ndarray], attention: Tensor, folder: Path) -> Section:
    """Draw what the CLS token attends to in the last layer: the mean over heads, and some of them.

    Args:
        attention: (N, heads, h, w).
    """
    heads = attention.shape[1]
    maps = {"mean of all heads": attention.mean(1)}
    maps |= {f"head {head + 1}": attention[:, head] for head in range(min(heads, 4))}
    colors = matplotlib.colormaps["viridis"]
    rows = [[Tile(picture) for picture in pictures]]
    for weights in maps.values():
        scaled = [image / image.quantile(0.99).clamp(min=1e-12) for image in weights]
        rows.append([Tile(colors(image.clamp(0, 1).numpy())[..., :3]) for image in scaled])
    plot_tiles(rows, folder / "explore_attention.png", ["image", *maps])
    text = (
        f"What the CLS token attends to in the last layer, from none (dark) to the most (bright) in each image; "
        f"{min(heads, 4)} of {heads} heads are shown."
    )
    return Section("Attention of the CLS token", "explore_attention.png", text)


def cut_name(text: str, most: int = 17) -> str:
    """Cut a name to what fits beneath an image, where a Chinese, Japanese or Korean character takes two places."""
    text = text.partition(",")[0]
    ends = list(accumulate(1 + (east_asian_width(character) in "WF") for character in text))
    return text if not ends or ends[-1] <= most else text[: bisect(ends, most - 1)] + "…"
