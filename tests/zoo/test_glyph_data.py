"""The glyphs that the project renders itself: seeded, readable, and split without overlap."""

import sys

import pytest
import torch

from moeca_fx.errors import MissingExtraError
from moeca_fx.zoo.glyphs import data


@pytest.fixture(scope="module")
def glyphs():
    return data.render(1, seed=5)


def test_every_character_of_every_face_is_there_once(glyphs):
    images, labels = glyphs
    assert images.shape == (62 * 21, 1, 32, 32)
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [21] * 62
    assert len(data.CLASSES) == len(set(data.CLASSES)) == 62


def test_glyphs_are_white_ink_on_black_inside_the_picture(glyphs):
    images, _ = glyphs
    assert images.min() == -1 and images.max() == 1
    ink = (images > 0).float().mean(dim=(1, 2, 3))
    assert ink.min() > 0.01 and ink.max() < 0.5
    frame = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=-1)
    assert (frame > 0).float().mean() < 0.01  # hardly anything is cut off


def test_characters_differ_and_faces_differ(glyphs):
    images, labels = glyphs
    a, b = images[labels == data.CLASSES.index("A")], images[labels == data.CLASSES.index("B")]
    assert torch.cdist(a.flatten(1), b.flatten(1)).min() > 5
    assert torch.pdist(a.flatten(1)).min() > 1


def test_the_seed_decides():
    again, other = data.render(1, seed=5)[0], data.render(1, seed=6)[0]
    assert torch.equal(again, data.render(1, seed=5)[0])
    assert not torch.equal(again, other)


def test_a_split_learns_from_other_pictures_than_it_holds_out(monkeypatch):
    monkeypatch.setattr(data, "LEARN_VARIANTS", 2)
    monkeypatch.setattr(data, "HELD_OUT_VARIANTS", 1)
    (images, _), (held, held_labels) = data.load_split.__wrapped__()
    assert (len(images), len(held)) == (2 * 62 * 21, 62 * 21)
    assert held_labels.bincount().tolist() == [21] * 62
    assert torch.cdist(held.flatten(1), images.flatten(1)).min() > 0


@pytest.mark.parametrize("package", ["matplotlib", "PIL.ImageFont"])
def test_a_missing_renderer_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package.split('.')[0]}.*moeca_fx\[zoo-data\]"):
        data.render(1, seed=0)
