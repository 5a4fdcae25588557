"""Every method on every family: attention equals the library's own, prefix and readout are correct."""

import pytest
import torch

import vitscope as vs
from tests.helpers.families import Family, every_family
from tests.reference.attention import attention as library_attention
from tests.reference.attention import resize_positions
from tests.reference.rollout import rollout as slow_rollout

OPTIONS = [
    {},
    {"head_fusion": "max"},
    {"head_fusion": "min", "discard_ratio": 0.3},
    {"normalize": False, "start_layer": 1, "discard_ratio": 0.9},
]


@pytest.mark.slow
@every_family
def test_attention_equals_the_librarys_own(family: Family) -> None:
    model, pixels = family.model(), family.pixels()
    expected = library_attention(model.module, pixels)
    trace = vs.capture(model, pixels)
    assert trace.num_layers == len(expected) == 3
    for layer, dense in enumerate(expected):
        torch.testing.assert_close(trace.attention(layer), dense, atol=1e-5, rtol=0)
    assert [step.module for step in trace.steps] == sorted({step.module for step in trace.steps})


@pytest.mark.slow
@every_family
def test_prefix_and_readout(family: Family) -> None:
    trace = vs.capture(family.model(), family.pixels())
    grid = family.grid
    assert trace.prefix_names == family.prefix_names
    assert trace.steps[0].grid == grid
    expected = torch.zeros(2, grid.num_tokens)
    for source, weight in family.readout.items():
        if source == "patches":
            expected[:, grid.prefix :] += weight / grid.num_patches
        elif source != "pooling":
            expected[:, family.prefix_names.index(source)] += weight
    torch.testing.assert_close(trace.readout.sum(-1), torch.ones(2))
    if "pooling" not in family.readout:
        torch.testing.assert_close(trace.readout, expected)


@pytest.mark.slow
@every_family
def test_the_output_depends_on_the_tokens_of_the_readout(family: Family) -> None:
    """Changing one token after the last block changes the output only for the tokens of the readout."""
    model, pixels = family.model(), family.pixels(1)
    readout = vs.capture(model, pixels).readout[0]
    last = _last_block(model.module)
    grid = family.grid
    answers = []
    for token in [None, *range(grid.num_tokens)]:

        def change_token(_, __, output, token=token):
            hidden = output[0] if isinstance(output, tuple) else output
            if token is not None:
                hidden[:, token] += torch.linspace(-3, 3, hidden.shape[-1])
            return output

        handle = last.register_forward_hook(change_token)
        try:
            with torch.no_grad():
                answers.append(_answer(model, pixels))
        finally:
            handle.remove()
    changed = torch.tensor([not torch.allclose(answers[0], answer, atol=1e-6) for answer in answers[1:]])
    assert changed.tolist() == (readout > 0).tolist()


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rollout_equals_the_reference_in_loops(family: Family, options: dict) -> None:
    model, pixels = family.model(), family.pixels()
    trace = vs.capture(model, pixels)
    maps = library_attention(model.module, pixels)
    expected = family.grid.patches(slow_rollout(maps, trace.readout, **options)).float()
    for result in (vs.rollout(trace, **options), vs.rollout(model, pixels, **options)):
        assert result.values.dtype == torch.float32
        torch.testing.assert_close(result.values, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@every_family
def test_attention_map_is_a_row_of_attention(family: Family) -> None:
    model, pixels = family.model(), family.pixels()
    trace = vs.capture(model, pixels)
    dense = trace.attention(-1)
    grid = family.grid
    expected = {
        "readout": torch.einsum("bq,bhqk->bhk", trace.readout, dense),
        (1, 2): dense[:, :, grid.token(1, 2)],
        **{name: dense[:, :, i] for i, name in enumerate(family.prefix_names)},
    }
    for query, rows in expected.items():
        for head in range(4):
            got = vs.attention_map(model, pixels, layer=-1, head=head, query=query).values
            torch.testing.assert_close(got, grid.patches(rows[:, head]), atol=1e-6, rtol=1e-5)
        got = trace.map(-1, "mean", query)
        torch.testing.assert_close(got, grid.patches(rows.mean(1)), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@every_family
def test_capture_does_not_change_the_output(family: Family) -> None:
    model, pixels = family.model(), family.pixels()
    with torch.no_grad():
        before = _answer(model, pixels)
        vs.rollout(model, pixels)
        vs.capture(model, pixels)
        after = _answer(model, pixels)
    assert torch.equal(before, after)


def _last_block(module: torch.nn.Module) -> torch.nn.Module:
    lists = [
        child
        for name, child in module.named_modules()
        if name.split(".")[-1] in ("layers", "layer", "blocks") and len(list(child.children())) == 3
    ]
    return list(lists[-1].children())[-1]


def _answer(model: vs.VisionModel, pixels: torch.Tensor) -> torch.Tensor:
    logits = model.forward(pixels)
    if logits is not None:
        return logits
    assert model.library == "transformers"
    return model.module(pixel_values=pixels, **resize_positions(model.module)).pooler_output
