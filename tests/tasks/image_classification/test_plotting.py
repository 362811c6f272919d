import numpy as np
import torch

from pera_lightning.tasks.image_classification.plotting import confusion_figure


def test_rows_are_shares_of_the_true_class():
    matrix = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 2, 4]])
    figure = confusion_figure(matrix, ["a", "b", "c"], "test/confusion")
    axes = figure.axes[0]
    expected = [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0.25, 0.5]]
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("predicted", "true", "test/confusion")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "3", (1, 0): "1", (0, 2): "2", (1, 2): "2", (2, 2): "4"}


def test_many_classes_have_no_names_and_numbers():
    figure = confusion_figure(torch.eye(31, dtype=torch.long), [str(k) for k in range(31)], "t")
    assert not figure.axes[0].texts
    assert len(confusion_figure(torch.eye(30, dtype=torch.long), [str(k) for k in range(30)], "t").axes[0].texts) == 30
    assert max(figure.get_size_inches()) <= 14
