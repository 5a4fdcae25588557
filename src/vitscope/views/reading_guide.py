"""How to read each kind of map: one paragraph per kind."""

from collections.abc import Mapping

READING: Mapping[str, str] = {
    "attention": (
        "Attention maps show from which patches information can reach the token that the model classifies. Bright "
        "patches contribute more attention. They say nothing about the sign: a bright patch may speak for or against "
        "the predicted class, and most of these maps are the same for every class. If LibraGrad's map of a class is "
        "shown too, trust it more for this class: in tests that delete and insert patches, it is more faithful "
        "than rollout. Each map is coloured from its lowest to its highest value, unless noted below it: compare "
        "places within a map, not brightness between maps."
    ),
    "gradient": (
        "Gradient and relevance maps divide an output of the model among the patches, by how the output would react "
        "to small changes. In signed maps, positive patches raise the output of the explained class and negative ones"
        " lower it; pale patches have little effect. Unsigned maps show only where the output is sensitive. The "
        "numbers below tell how much of the output the map accounts for, if the method promises that."
    ),
    "perturbation": (
        "Perturbation maps come from hiding parts of the photo and evaluating the model again. Positive parts raise "
        "the output of the explained class if they are visible, negative ones lower it. The result depends on what "
        "hidden parts are filled with, which is listed under the parameters: a fill that looks unusual to the model "
        "can create evidence of its own. Maps based on random samples vary; an interval that contains zero means that"
        " the effect cannot be told from none."
    ),
    "composition": (
        "Each edited image shows a change of the photo: an object moved, resized, removed or put on another "
        "background. The arrows below an image are the changes of the outputs compared with the original. Location "
        "maps show the output for the object at each place, and size curves the output by its scale. A change of the "
        "output tells that the model reacts to this edit; edges and fills of the edit can contribute to it."
    ),
}
CAUTION = (
    "A map describes the model, not the object in the photo. It shows what the model used for its output, and the"
    " output may be wrong. Methods answer different questions; a low rank correlation between two maps does not "
    "tell which one is right."
)
REGIONS = (
    "The ratio divides a region's share of the map by its share of the area: 1 for a map that is the same everywhere. "
    "Random maps are the same map, shifted around the edges and mirrored at random; 95 % of their ratios are in the "
    "given range, and p is the probability of a ratio as extreme. A high ratio shows where the map is, not that the "
    "region caused the output: for that, change the region and evaluate the model again."
)
