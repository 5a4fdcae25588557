"""Arguments and options that more than one command takes, and the options that describe a model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Photos = Annotated[
    list[Path],
    typer.Argument(
        help="Photos to explain, folders of photos (with their subfolders), or globs in quotes.",
        metavar="PHOTO",
        show_default=False,
    ),
]

Window = Annotated[
    str | None,
    typer.Option(
        "--window",
        help="Grey values of the photos that become black and white: low,high, in the units of the file.",
        show_default="of the file",
    ),
]
Slice = Annotated[int | None, typer.Option("--slice", help="Frame of DICOM files, or slice of NIfTI volumes, from 0.")]

ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Model: vit-nano, swin-nano, a hub id, a folder, timm:<name> or torchvision:<name>.",
    ),
]
ComparedModels = Annotated[
    list[str] | None, typer.Option("--compare", help="Another model to compare with. May be repeated.")
]
Examples = Annotated[
    Path | None,
    typer.Option(help="Folder of examples, one subfolder per class, for a model without a classifier."),
]
ImageSize = Annotated[
    int | None, typer.Option(help="Side of the model's input in pixels.", show_default="the model's own")
]
Device = Annotated[
    str | None, typer.Option("--device", help="Device, such as cpu or cuda:1.", show_default="cuda if available")
]

DropArtefacts = Annotated[
    bool,
    typer.Option("--drop-artefacts", help="Leave out artefact tokens, found in all photos together; see registers."),
]
Target = Annotated[
    str | None,
    typer.Option("--target", "-t", help="Class to explain, by label or index.", show_default="the most likely"),
]
Contrast = Annotated[
    str | None,
    typer.Option(
        "--contrast",
        help="Class to contrast with the target: explain the difference of their outputs.",
        show_default="none",
    ),
]
Regions = Annotated[
    list[str] | None,
    typer.Option(
        "--region",
        help="Region to measure the share of the map in: a box x,y,w,h in pixels, a polygon x,y,x,y,x,y,…, a mask "
        "file, a folder of masks named like the photos, or border (the outer tenth); optionally with a name, such as "
        "tumour=40,60,30,30. May be repeated.",
        show_default="none",
    ),
]
GroupBy = Annotated[
    Literal["predicted", "folder"],
    typer.Option("--group-by", help="Groups of photos whose mean shares and mean maps --region shows."),
]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="Number of classes to list.")]
OutputKind = Annotated[
    Literal["probability", "log_probability", "logit", "log_odds"],
    typer.Option("--output", help="Output to evaluate."),
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
BatchSize = Annotated[int, typer.Option(help="Images per forward pass.")]
Hide = Annotated[
    str,
    typer.Option(
        help="Fill of hidden segments: mean, black, grey, blur, noise, drop, a colour (128 or r,g,b) or an image file."
    ),
]
Fill = Annotated[
    str, typer.Option(help="Fill of holes: inpaint, mean, blur, a colour (128 or r,g,b) or an image file.")
]

Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="PNG, PDF or SVG file to write; explain, lime, rollout and compose also write an HTML report. A folder "
        "for several photos.",
        show_default="a new name",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
SkipExisting = Annotated[bool, typer.Option("--skip-existing", help="Skip photos whose file exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

# The options that describe a model have their own section in the help.
MODEL_PANEL = "Describe the model"
MODEL_OUTPUT = "Model's output: logits, softmax, sigmoid, probabilities, value or features."

Pretrained = Annotated[
    bool | None,
    typer.Option(
        "--pretrained/--no-pretrained",
        help="Load pretrained weights, or draw random ones (seed 0).",
        show_default="pretrained",
        rich_help_panel=MODEL_PANEL,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="File of weights for the architecture that --model names.", rich_help_panel=MODEL_PANEL),
]
Adapter = Annotated[Path | None, typer.Option(help="PEFT adapter folder for --model.", rich_help_panel=MODEL_PANEL)]
Backbone = Annotated[
    str | None,
    typer.Option(
        help="Path of the vision transformer inside the model, such as model.encoder.", rich_help_panel=MODEL_PANEL
    ),
]
Output = Annotated[
    str | None, typer.Option("--output", "--model-output", help=MODEL_OUTPUT, rich_help_panel=MODEL_PANEL)
]
ModelOutput = Annotated[str | None, typer.Option("--model-output", help=MODEL_OUTPUT, rich_help_panel=MODEL_PANEL)]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="File of class names (texts for CLIP and SigLIP): one per line, or JSON (a list, or a mapping from index "
        "to name).",
        rich_help_panel=MODEL_PANEL,
    ),
]
Select = Annotated[
    str | None, typer.Option(help="Key or position of the output to explain.", rich_help_panel=MODEL_PANEL)
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Mean of each channel, for pixels from 0 to 1, such as 0.5,0.5,0.5.", rich_help_panel=MODEL_PANEL
    ),
]
Std = Annotated[
    str | None,
    typer.Option(help="Standard deviation of each channel, as for --mean.", rich_help_panel=MODEL_PANEL),
]
Processor = Annotated[
    Path | None, typer.Option(help="Folder with a preprocessor_config.json.", rich_help_panel=MODEL_PANEL)
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(help="Folder with the tokenizer of CLIP or SigLIP, for --labels.", rich_help_panel=MODEL_PANEL),
]
