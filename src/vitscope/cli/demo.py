"""The command ``vitscope demo``."""

from typing import TYPE_CHECKING

from vitscope.cli.app import register
from vitscope.cli.explain import explain_photos
from vitscope.cli.options import Device, Json, Out, Overwrite
from vitscope.cli.output import unused_path
from vitscope.cli.style_options import drawing

if TYPE_CHECKING:
    from vitscope.views.style import FigureStyle


@drawing
def demo(
    out: Out = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
    *,
    style: "FigureStyle | None",
) -> None:
    """Explain a photo with the bundled model; needs no network."""
    from PIL import Image
    from skimage.data import chelsea

    photo = Image.fromarray(chelsea())
    photo.filename = "chelsea"  # type: ignore[attr-defined]  # the name in the figure
    explain_photos(
        [photo],
        "vit-nano",
        out or (None if style is None else unused_path("vitscope-demo")),
        overwrite,
        device,
        json_,
        top_k=5,
        style=style,
        names=["chelsea"],
        command="demo",
    )


register(demo)
