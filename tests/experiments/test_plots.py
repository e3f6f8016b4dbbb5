"""Figures: what can be checked without looking at them."""

import itertools

import matplotlib.text
import numpy as np
import pytest

from experiments.report import plots


@pytest.mark.parametrize('shift', [0.0, 0.02, 0.3])
def test_labels_cover_neither_each_other_nor_marks(shift):
    figure, axes = plots.new_figure(6.8, 4.2)
    places = [(1 + i * shift, 50 + i * shift) for i in range(3)]
    for x, y in places:
        axes.plot(x, y, 'o')
    axes.set(xlim=(0, 3), ylim=(40, 60))
    labels = [
        (f'method {i}\n50.0 %, 1.00×', place, 'k') for i, place in enumerate(places)
    ]
    plots.label_beside(figure, axes, labels)
    figure.draw_without_rendering()
    assert [text.get_text() for text in axes.texts] == [text for text, *_ in labels]
    extent = matplotlib.text.Text.get_window_extent
    boxes = [extent(text) for text in axes.texts]
    assert not any(plots._overlap(*pair) for pair in itertools.combinations(boxes, 2))
    inside = axes.get_window_extent()
    assert all(inside.containsx(x) for box in boxes for x in (box.x0, box.x1))
    marks = axes.transData.transform(np.array(places))
    assert not any(box.contains(*mark) for box in boxes for mark in marks)


def test_methods_with_other_settings_keep_their_colour():
    plain, perturbed = plots.style_of('vsam'), plots.style_of('vsam_steps')
    assert plain[:2] == perturbed[:2]
    assert plain[2] != perturbed[2]
    assert plots.style_of('unheard of')[:2] == plots.OTHER
