"""The options of the command line: one table, with one name, short form, type and meaning for all commands.

An option that several commands take is declared by :func:`option` from its row in :data:`OPTIONS`. An option of a
single command is declared next to the command, and the fields of the training options in the module
:mod:`~vitscope.cli.training`. ``tests/cli/test_options.py`` compares the table with all commands.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vitscope.cli.completion import Completion, labels_for, models_for, tunings_for
from vitscope.cli.inputs import split_models, split_objects, split_values

SEVERAL = "Several: repeat it, or separate them by commas."
# Sections of the help for the options that most calls leave alone.
FIGURE_PANEL = "Style of the figure"
MODEL_PANEL = "Describe the model"

OutputName = Literal["probability", "log_probability", "logit", "log_odds"]
GroupName = Literal["predicted", "folder"]  # photos of one predicted class, or of one folder


@dataclass(frozen=True)
class SharedOption:
    """An option of several commands.

    Attributes:
        name: the option, such as ``--target``.
        help: its meaning: one or more sentences.
        commands: the commands that take it.
        type: the type of a value; ``bool`` for a flag.
        short: its short form, such as ``-t``.
        off: the flag that switches it off, such as ``--no-pretrained``.
        several: the commands that accept several values, by repetition or separated by commas.
        split: function that splits several values in one text at the commas; None if the command does it.
        complete: function for the shell: the beginning of a value → (value, description).
        minimum: lowest value.
        panel: section of the help.
    """

    name: str
    help: str
    commands: tuple[str, ...]
    type: Any = str
    short: str = ""
    off: str = ""
    several: tuple[str, ...] = ()
    split: Callable[[list[str] | None], list[str] | None] | None = None
    complete: Callable[..., list[Completion]] | None = None
    minimum: int | None = None
    panel: str | None = None


MODEL_COMMANDS = ("explain", "attention", "rollout", "heads", "registers", "lime", "compose")
PHOTO_COMMANDS = tuple(name for name in MODEL_COMMANDS if name != "compose")  # a figure for each photo
REGION_COMMANDS = ("explain", "attention", "rollout", "lime")
TRAINING = ("finetune", "compare")
DATA = ("data", *TRAINING)
DRAWING = ("demo", *MODEL_COMMANDS, *DATA)
COMMANDS = (*DRAWING, "models", "methods")

_ROWS = (
    SharedOption(
        "--model",
        "Model: vit-nano, swin-nano, a hub id, a folder, timm:<name> or torchvision:<name>.",
        (*MODEL_COMMANDS, *TRAINING),
        short="-m",
        several=("lime", "compose", "compare"),
        split=split_models,
        complete=models_for,
    ),
    SharedOption("--out", "File or folder to write.", DRAWING, Path, "-o"),
    SharedOption("--overwrite", "Replace existing files.", ("demo", *MODEL_COMMANDS, "data", "finetune"), bool),
    SharedOption("--skip-existing", "Skip photos whose file exists.", PHOTO_COMMANDS, bool),
    SharedOption("--device", "Device, such as cpu or cuda:1.", ("demo", *MODEL_COMMANDS, *TRAINING)),
    SharedOption("--json", "Print JSON instead of tables.", COMMANDS, bool),
    SharedOption(
        "--window",
        "Grey values of the photos that become black and white: low,high, in the units of the file.",
        MODEL_COMMANDS,
    ),
    SharedOption("--slice", "Frame of DICOM files, or slice of NIfTI volumes, from 0.", MODEL_COMMANDS, int),
    SharedOption(
        "--target",
        "Class to explain, by label or index.",
        ("explain", "rollout", "heads", "lime", "compose"),
        short="-t",
        several=("compose",),
        complete=labels_for,
    ),
    SharedOption(
        "--contrast",
        "Class to contrast with the target: explain the difference of their outputs.",
        ("explain", "heads", "lime"),
        complete=labels_for,
    ),
    SharedOption(
        "--region",
        "Region to measure the share of the map in: a box x,y,w,h in pixels, a polygon x,y,x,y,x,y,…, a mask file, a "
        "folder of masks named like the photos, or border (the outer tenth); optionally with a name, such as "
        "tumour=40,60,30,30.",
        REGION_COMMANDS,
        several=REGION_COMMANDS,
        split=split_objects,
    ),
    SharedOption(
        "--group-by", "Groups of photos whose mean shares and mean maps --region shows.", REGION_COMMANDS, GroupName
    ),
    SharedOption("--top-k", "Number of classes to list.", ("explain", "compose"), int, minimum=1),
    SharedOption(
        "--layer", "Index of the layer, from 0; negative from the end.", ("attention", "registers"), int, "-l"
    ),
    SharedOption("--output", "Output to evaluate.", ("heads", "lime", "compose"), OutputName),
    SharedOption("--seed", "Random seed.", ("lime", "compose", "finetune"), int),
    SharedOption("--batch-size", "Images per forward pass.", ("heads", "lime", "compose", *TRAINING), int),
    SharedOption(
        "--segments",
        "Segments of the photo: quickshift, slic, patches, or a file of labels (.npy or an image).",
        ("lime", "compose"),
    ),
    SharedOption(
        "--drop-artefacts",
        "Leave out artefact tokens, found in all photos together; see registers.",
        ("attention", "rollout"),
        bool,
    ),
    SharedOption("--recipe", "Training recipe: report, modern, or a TOML file.", TRAINING, short="-r"),
    SharedOption(
        "--tuning",
        "Tuning method: head, full, bitfit, layernorm, adapter-attention, adapter-mlp, adapter-both, "
        "adapter-parallel, lora, window-cls.",
        TRAINING,
        several=("compare",),
        split=split_values,
        complete=tunings_for,
    ),
    SharedOption("--rank", "Width of adapters or of LoRA.", TRAINING, int),
    SharedOption("--no-figure", "Compute and print, but draw no figure.", DRAWING, bool),
    SharedOption("--dpi", "Pixels per inch.", DRAWING, float, panel=FIGURE_PANEL),
    SharedOption("--width", "Width in inches; letters scale.", DRAWING, float, panel=FIGURE_PANEL),
    SharedOption(
        "--cmap",
        "Colour map of matplotlib: sequential, or diverging for signed maps.",
        DRAWING,
        several=DRAWING,
        split=split_values,
        panel=FIGURE_PANEL,
    ),
    SharedOption("--no-title", "Leave out the title and the lines below it.", DRAWING, bool, panel=FIGURE_PANEL),
    SharedOption(
        "--image-size", "Side of the model's input in pixels.", (*MODEL_COMMANDS, *TRAINING), int, panel=MODEL_PANEL
    ),
    SharedOption(
        "--examples",
        "Folder of examples, one subfolder per class, for a model without a classifier.",
        MODEL_COMMANDS,
        Path,
        panel=MODEL_PANEL,
    ),
    SharedOption(
        "--pretrained",
        "Load pretrained weights, or draw random ones (seed 0).",
        MODEL_COMMANDS,
        bool,
        off="--no-pretrained",
        panel=MODEL_PANEL,
    ),
    SharedOption(
        "--weights",
        "File of weights for the architecture that --model names.",
        MODEL_COMMANDS,
        Path,
        panel=MODEL_PANEL,
    ),
    SharedOption("--adapter", "PEFT adapter folder for --model.", MODEL_COMMANDS, Path, panel=MODEL_PANEL),
    SharedOption(
        "--backbone",
        "Path of the vision transformer inside the model, such as model.encoder.",
        MODEL_COMMANDS,
        panel=MODEL_PANEL,
    ),
    SharedOption(
        "--model-output",
        "Model's output: logits, softmax, sigmoid, probabilities, value or features.",
        MODEL_COMMANDS,
        panel=MODEL_PANEL,
    ),
    SharedOption(
        "--labels",
        "File of class names (texts for CLIP and SigLIP): one per line, or JSON (a list, or a mapping from index to "
        "name).",
        MODEL_COMMANDS,
        Path,
        panel=MODEL_PANEL,
    ),
    SharedOption("--select", "Key or position of the output to explain.", MODEL_COMMANDS, panel=MODEL_PANEL),
    SharedOption(
        "--mean",
        "Mean of each channel, for pixels from 0 to 1, such as 0.5,0.5,0.5.",
        MODEL_COMMANDS,
        panel=MODEL_PANEL,
    ),
    SharedOption("--std", "Standard deviation of each channel, as for --mean.", MODEL_COMMANDS, panel=MODEL_PANEL),
    SharedOption("--processor", "Folder with a preprocessor_config.json.", MODEL_COMMANDS, Path, panel=MODEL_PANEL),
    SharedOption(
        "--tokenizer",
        "Folder with the tokenizer of CLIP or SigLIP, for --labels.",
        MODEL_COMMANDS,
        Path,
        panel=MODEL_PANEL,
    ),
)
OPTIONS: Mapping[str, SharedOption] = {row.name: row for row in _ROWS}


def option(name: str, note: str = "", *, default: str | bool = True, several: bool = False) -> Any:
    """Return typer's option for a row of the table.

    Args:
        name: the option, such as ``--target``.
        note: sentences about this command, which follow the meaning in the help.
        default: the default in words; True to show the parameter's default.
        several: whether the command accepts several values, so that the parameter is a list.
    """
    row = OPTIONS[name]
    names = [f"{row.name}/{row.off}" if row.off else row.name, *([row.short] if row.short else [])]
    return typer.Option(
        *names,
        help=" ".join(filter(None, (row.help, note, SEVERAL if several else ""))),
        show_default=default,
        callback=row.split if several else None,
        autocompletion=row.complete,
        min=row.minimum,
        rich_help_panel=row.panel,
    )


Photos = Annotated[
    list[Path],
    typer.Argument(
        help="Photos to explain, folders of photos (with their subfolders), or globs in quotes.",
        metavar="PHOTO",
        show_default=False,
    ),
]

ModelName = Annotated[str, option("--model")]
ModelNames = Annotated[list[str] | None, option("--model", default="vit-nano", several=True)]
ComparedModels = Annotated[  # the name of ModelNames in version 0.1
    list[str] | None,
    typer.Option("--compare", help="More models, as for --model.", hidden=True, callback=split_models),
]
Out = Annotated[Path | None, option("--out", "PNG, PDF or SVG; a folder for several photos.", default="a new name")]
OutWithReport = Annotated[
    Path | None,
    option("--out", "PNG, PDF, SVG or a report as HTML; a folder for several photos.", default="a new name"),
]
Overwrite = Annotated[bool, option("--overwrite")]
SkipExisting = Annotated[bool, option("--skip-existing")]
Device = Annotated[str | None, option("--device", default="cuda if available")]
Json = Annotated[bool, option("--json")]
Window = Annotated[str | None, option("--window", default="of the file")]
Slice = Annotated[int | None, option("--slice")]

Target = Annotated[str | None, option("--target", default="the most likely")]
Contrast = Annotated[str | None, option("--contrast", default="none")]
Regions = Annotated[list[str] | None, option("--region", default="none", several=True)]
GroupBy = Annotated[GroupName, option("--group-by")]
TopK = Annotated[int, option("--top-k")]
OutputKind = Annotated[OutputName, option("--output")]
Seed = Annotated[int, option("--seed")]
BatchSize = Annotated[int, option("--batch-size")]
Segments = Annotated[str, option("--segments")]
DropArtefacts = Annotated[bool, option("--drop-artefacts")]
Hide = Annotated[
    str,
    typer.Option(
        help="Fill of hidden segments: mean, black, grey, blur, noise, drop, a colour (128 or r,g,b) or an image file."
    ),
]
Fill = Annotated[
    str, typer.Option(help="Fill of holes: inpaint, mean, blur, a colour (128 or r,g,b) or an image file.")
]
ImageSize = Annotated[int | None, option("--image-size", default="the model's own")]
