"""Recipes: photos, objects and edited images in a TOML file; and one line for each mistake."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.reference.stage import boxed, noise, painted
from vitscope.compositing.recipe import read_recipe

PHOTO = painted(40, 56, (30, 16, 15, 18))
WHOLE = """
[[image]]
photo = "pets.png"

[[image.object]]
name = "dog"
class = "bull mastiff"
outline = [[4, 6], [20, 6], [20, 16], [4, 16]]

[[image.object]]
name = "cat"
box = [30, 16, 15, 18]

[[image.edited_image]]
name = "dog smaller"
show = [{ name = "cat" }, { name = "dog", scale = 0.5, centre = [20, 30.5], mirrored = true }]
background = "blank"
neutral = true

[[image.edited_image]]
name = "empty"

[[image]]
photo = "bird.png"

[[image.object]]
name = "bird"
mask = "bird-mask.png"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    Image.fromarray(PHOTO).save(tmp_path / "pets.png")
    Image.fromarray(noise(40, 56)).save(tmp_path / "bird.png")
    Image.fromarray(boxed(40, 56, (8, 9, 20, 11))).save(tmp_path / "bird-mask.png")
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_read_in_full(folder: Path) -> None:
    pets, bird = read_recipe(written(folder, WHOLE))
    assert (pets.photo, bird.photo) == (folder / "pets.png", folder / "bird.png")
    assert [(item.name, item.label, item.box) for item in pets.objects] == [
        ("dog", "bull mastiff", (4, 6, 16, 10)),
        ("cat", None, (30, 16, 15, 18)),
    ]
    assert pets.edited_images == (
        vs.EditedImage(
            "dog smaller",
            (vs.Placement("cat"), vs.Placement("dog", (20.0, 30.5), 0.5, True)),
            "blank",
            True,
        ),
        vs.EditedImage("empty"),
    )
    assert np.array_equal(bird.objects[0].mask, boxed(40, 56, (8, 9, 20, 11)))
    assert bird.edited_images == ()
    assert [recipe.photo for recipe in read_recipe(str(folder / "recipe.toml"))] == [pets.photo, bird.photo]


def test_a_recipe_can_be_passed_to_compose(folder: Path) -> None:
    pets, _ = read_recipe(written(folder, WHOLE.replace('class = "bull mastiff"\n', "")))
    result = vs.compose(vs.load("vit-nano"), pets.photo, pets.objects, tests=(), edited_images=pets.edited_images)
    assert result.names == ["original", "dog smaller", "empty"]
    assert list(result.objects) == ["dog", "cat"]


def test_photos_may_be_in_another_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("photos")
    (folder / "bird.png").rename(elsewhere / "bird.png")
    recipe = written(folder, WHOLE)
    assert read_recipe(recipe, [elsewhere / "bird.png"])[1].photo == elsewhere / "bird.png"
    with pytest.raises(vs.CallError, match=r"bird.png does not exist"):
        read_recipe(recipe)
    Image.fromarray(PHOTO).save(elsewhere / "fish.png")
    with pytest.raises(vs.CallError, match=r"has no image called fish.png: it has pets.png, bird.png"):
        read_recipe(recipe, [elsewhere / "bird.png", elsewhere / "fish.png"])


def test_a_recipe_supports_segments_and_refinement(folder: Path) -> None:
    text = '[[image]]\nphoto = "pets.png"\n[[image.object]]\nname = "x"\n'
    (item,) = read_recipe(written(folder, text + 'segments = [0, 1]\ncut = "slic"'))[0].objects
    expected = vs.object_mask(PHOTO, segments=[0, 1], cut="slic")
    assert np.array_equal(item.mask, expected.mask)
    pytest.importorskip("cv2")
    (item,) = read_recipe(written(folder, text + "box = [27, 13, 20, 22]\nrefine = true"))[0].objects
    assert np.array_equal(item.mask, vs.object_mask(PHOTO, box=(27, 13, 20, 22), refine=True).mask)
    (item,) = read_recipe(written(folder, text + "box = [27, 13, 20, 22]\nrefine = false"))[0].objects
    assert item.box == (27, 13, 20, 22)


HEAD = '[[image]]\nphoto = "pets.png"\n'
DOG = HEAD + '[[image.object]]\nname = "dog"\n'
BOXED = DOG + "box = [4, 6, 16, 10]\n"
EDITED = BOXED + '[[image.edited_image]]\nname = "x"\n'
WRONG = [
    ("", "lists no images: begin each with"),
    ("[[image]", "is no file of annotations: "),
    ("image = 3", "image is 3, but must be a list of tables"),
    ('[image]\nphoto = "pets.png"', "must be a list of tables"),
    ('[[images]]\nphoto = "pets.png"', "unknown key 'images': use image"),
    ("[[image]]", "an image has no photo"),
    ("[[image]]\nphoto = 3", "an image has no photo"),
    ('[[image]]\nphoto = ""', "an image has no photo"),
    ('[[image]]\nphoto = "fish.png"', "fish.png does not exist"),
    (HEAD + "author = 3", "unknown key 'author': use edited_image, object, photo"),
    (HEAD + "object = 3", "pets.png: object is 3, but must be a list of tables"),
    (HEAD + "[[image.object]]\nbox = [1, 2, 3, 4]", "pets.png: an object has no name"),
    (DOG, "dog is marked by nothing: pass exactly one of box, polygon, mask or segments"),
    (BOXED + "mask = 'bird-mask.png'", "dog is marked by box and mask"),
    (BOXED + "colour = 'brown'", "an object: unknown key 'colour': use .*segments"),
    (DOG + "box = [50, 6, 16, 10]", "it reaches outside the image of 56×40"),
    (DOG + "box = 5", "box"),
    (DOG + "box = '4,6,16,10'", "box"),
    (DOG + "box = ['a', 6, 16, 10]", "the box of dog is 'a', a number"),
    (DOG + "outline = [[1, 2], [3, 4]]", "the outline of dog is not a polygon"),
    (DOG + "outline = 'round'", "the outline of dog is not a polygon"),
    (DOG + "mask = 'nowhere.png'", "nowhere.png does not exist"),
    (DOG + "segments = 3", "segment"),
    (DOG + "segments = [3000]", "segment 3000 of dog does not exist"),
    (DOG + "segments = [3]\ncut = 'voronoi'", "unknown segments 'voronoi'"),
    (BOXED + "refine = 'no'", "refine"),
    (BOXED + "class = 5", "class"),
    (BOXED + "[[image.edited_image]]\nshow = []", "an edited image has no name"),
    (EDITED + "behind = 3", "an edited image: unknown key 'behind': use background, name, neutral, show"),
    (EDITED + "show = 'dog'", "x: show is 'dog', but must be a list of tables"),
    (EDITED + "show = ['dog']", "must be a list of tables"),
    (EDITED + "neutral = 'no'", "neutral"),
    (EDITED + "background = 5", "background"),
    (EDITED + "show = [{ scale = 0.5 }]", "x has no name"),
    (
        EDITED + "show = [{ name = 'dog', size = 0.5 }]",
        "unknown key 'size': use centre, mirrored, name, scale",
    ),
    (EDITED + "show = [{ name = 'dog', scale = 'half' }]", r"scale is 'half': write \[x, y\] and a number"),
    (EDITED + "show = [{ name = 'dog', scale = true }]", "scale is True"),
    (EDITED + "show = [{ name = 'dog', centre = [1] }]", r"centre is \[1\]"),
    (EDITED + "show = [{ name = 'dog', centre = [1, 2, 3] }]", r"centre is \[1, 2, 3\]"),
    (EDITED + "show = [{ name = 'dog', centre = 5 }]", "centre is 5"),
    (EDITED + "show = [{ name = 'dog', centre = ['a', 'b'] }]", "centre is"),
    (EDITED + "show = [{ name = 'dog', centre = [nan, 20] }]", "centre"),
    (EDITED + "show = [{ name = 'dog', mirrored = 'no' }]", "mirrored"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("text", "message"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_mistakes_are_refused_in_one_line(folder: Path, text: str, message: str) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        read_recipe(written(folder, text))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_recipes_are_refused(folder: Path) -> None:
    for path, message in (
        (folder / "nowhere.toml", "nowhere.toml does not exist"),
        (folder, "is a folder"),
        (folder / "pets.png", "is no file of annotations"),
    ):
        with pytest.raises(vs.CallError, match=message) as caught:
            read_recipe(path)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_bundled_recipe_can_be_read(tmp_path: Path) -> None:
    """Its photo is not bundled: any image of the same size can replace it, because nothing is refined."""
    recipe = Path(__file__).parents[2] / "recipes" / "dog-and-cat.toml"
    if not recipe.exists():
        pytest.skip("no recipes beside the package")
    Image.fromarray(noise(224, 224)).save(tmp_path / "dog-and-cat.png")
    (image,) = read_recipe(recipe, [tmp_path / "dog-and-cat.png"])
    assert [item.name for item in image.objects] == ["dog", "cat"]
    assert [item.name for item in image.edited_images] == ["size test", "location test", "split test"]
    vs.compose(vs.load("vit-nano"), image.photo, image.objects, tests=(), edited_images=image.edited_images)
