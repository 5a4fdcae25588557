"""The command ``vitscope compare``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscope.cli.inputs import load_model
from vitscope.cli.json_output import print_results
from vitscope.cli.options import Device, ImageSize, Json, option
from vitscope.cli.style_options import drawing
from vitscope.cli.tables import WIDE, print_table
from vitscope.cli.training import (
    DataName,
    DataSettings,
    Folder,
    Rank,
    RecipeName,
    RecipeSettings,
    data_name,
    hold_out,
    is_first_process,
    training_command,
    training_progress,
)

if TYPE_CHECKING:
    from vitscope.views.style import FigureStyle

MODELS = ("vit-nano", "swin-nano")
TUNINGS = ("head", "adapter-mlp", "lora")
NARROW_COLUMNS = (0, 1, 2, 3, 5)  # of the summary, in a narrow terminal


@training_command
@drawing
def compare(
    data: DataName,
    *,
    model: Annotated[list[str] | None, option("--model", default=",".join(MODELS), several=True)] = None,
    tuning: Annotated[list[str] | None, option("--tuning", default=",".join(TUNINGS), several=True)] = None,
    seeds: Annotated[int, typer.Option(help="Number of random seeds, counted from 0.")] = 3,
    recipe: RecipeName = "modern",
    changes: RecipeSettings,
    rank: Rank = None,
    data_options: DataSettings,
    image_size: ImageSize = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the tuned model of every cell.")] = False,
    out: Folder = None,
    device: Device = None,
    json_: Json = False,
    style: "FigureStyle | None",
) -> None:
    """Fine-tune models with several methods, and compare them."""
    from rich.console import Console

    from vitscope.tune.methods import require_tuning

    tunings = TUNINGS if tuning is None else tuning
    for name in tunings:
        require_tuning(name)  # before the engine is imported, which takes seconds
    from vitscope.tune.comparison import compare as run
    from vitscope.views.comparison_page import (
        INTERACTION_HEADER,
        SUMMARY_HEADER,
        interaction_rows,
        summary_rows,
        write_page,
    )

    folder = out or Path(f"{data_name(data)}-comparison")
    loaded = [load_model(name, device, image_size=image_size) for name in (MODELS if model is None else model)]
    with training_progress(not json_ and is_first_process()) as show:
        result = run(
            data,
            loaded,
            out=folder,
            tunings=tunings,
            seeds=seeds,
            recipe=recipe,
            rank=rank,
            data_options=data_options,
            keep_models=keep_models,
            device=device,
            progress=show,
            **hold_out(changes),
        )
    if not is_first_process():
        return
    files = [] if style is None else write_page(result, folder, style)
    if json_:
        print_results("compare", [{**result.as_json(), "files": [str(path) for path in files]}])
        return
    columns = range(len(SUMMARY_HEADER)) if Console().width >= WIDE else NARROW_COLUMNS
    rows = [tuple(row[i] for i in columns) for row in summary_rows(result)]
    print_table([SUMMARY_HEADER[i] for i in columns], rows, right=range(2, len(columns)))
    interactions = interaction_rows(result)
    if interactions:
        print_table(INTERACTION_HEADER, interactions, right=(2, 3))
    typer.echo(f"wrote {files[0]} and {len(files) - 1} figures next to it" if files else f"wrote {folder}")
