"""All commands: importing this module registers them."""

from vitscope.cli import (  # noqa: F401
    attention,
    compare,
    compose,
    data,
    demo,
    explain,
    finetune,
    heads,
    lime,
    methods,
    models,
    registers,
    rollout,
)
from vitscope.cli.app import run as run
