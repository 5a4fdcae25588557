"""What a figure is about: its photo, model, predictions and target."""

from vitscope.models.prediction import Prediction
from vitscope.views.scene import Scene
from vitscope.views.subject import describe_target, with_subject

PREDICTIONS = [Prediction("boxer", 1, 0.824), Prediction("pug", 2, 0.14), Prediction("bull_mastiff, big", 0, 0.013)]


def test_a_target_that_is_not_predicted_says_what_is():
    assert describe_target("bull_mastiff, big", PREDICTIONS) == "bull_mastiff (1.3%; predicted: boxer, 82.4%)"
    assert describe_target("boxer", PREDICTIONS) == "boxer (82.4%)"
    assert describe_target("boxer − pug", PREDICTIONS) == "boxer − pug", "a contrast has no probability"


def test_figures_of_two_classes_differ():
    scene = Scene([], "title")
    subjects = {name: with_subject(scene, "a.png", "m", PREDICTIONS, name).subject for name in ("pug", "boxer")}
    assert subjects["boxer"] == "a.png; m predicts boxer (82.4%), pug (14.0%), bull_mastiff (1.3%)"
    assert subjects["pug"] == f"{subjects['boxer']}; target: pug (14.0%)"


def test_a_model_without_classes_is_named_alone():
    assert with_subject(Scene([], ""), "a.png", "m", []).subject == "a.png; m"
    values = [Prediction("age", 0, None, 31.25)]
    assert with_subject(Scene([], ""), "a.png", "m", values).subject == "a.png; m predicts age (31.25)"
