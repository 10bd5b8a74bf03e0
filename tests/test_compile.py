"""The model under `torch.compile` and `torch.export`, and the operators' registrations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkouts import ROOT, run_python
from support.recipe import INTERPRETED, fill, wave
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from anyup import AnyUp
from anyup.model import OPERATIONS
from anyup.ops.feature_unification import unify_features
from anyup.ops.pixel_encoder import encode_pixels
from anyup.ops.query_projection import ProjectionParameters, project_queries
from anyup.ops.window_attention import window_attention
from anyup.window import RatioWindow

SIZES = [((48, 64), (6, 8)), ((57, 71), (7, 9)), ((80, 56), (10, 7))]


def model(**arguments: Any) -> AnyUp:
    return fill(AnyUp(**{"qk_dim": 32, "num_heads": 2, "lfu_dim": 16, "kernel_size_lfu": 3, **arguments}), 0).eval()


def inputs(size: tuple[int, int], grid: tuple[int, int], channels: int = 5) -> tuple[Tensor, Tensor]:
    return wave((1, 3, *size), 3, 0.8), wave((1, channels, *grid), 7)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    """How many graphs dynamo has made since the test began: one that it starts over counts once."""
    return counters["stats"]["unique_graphs"]


def assert_one_graph(model: AnyUp, compiler: str) -> None:
    """Compile once for all sizes and numbers of channels, with results equal to eager ones."""
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
    with torch.no_grad():
        for (size, grid), channels in zip(SIZES, (5, 24, 7), strict=True):
            image, features = inputs(size, grid, channels)
            torch.testing.assert_close(compiled(image, features), model(image, features), rtol=1e-4, atol=1e-4)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        # As with the default widths, the unified features have the width of the keys: one operator more.
        pytest.param({"window": "cell", "kernel_size": 2, "lfu_dim": 32}, id="cell, even kernel, one width"),
        pytest.param({"backend": "reference", "window_ratio": 0.0, "kernel_size": 3}, id="reference, every key"),
    ],
)
def test_one_graph_serves_every_size_and_number_of_channels(arguments: dict[str, Any]) -> None:
    assert_one_graph(model(**arguments), "aot_eager")


def test_one_graph_serves_every_output_size() -> None:
    eager = model()
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for (size, grid), output in zip(SIZES, [(33, 57), (60, 72), (20, 30)], strict=True):
            image, features = inputs(size, grid)
            torch.testing.assert_close(
                compiled(image, features, output), eager(image, features, output), rtol=1e-4, atol=1e-4
            )
    assert graphs() == 1


@pytest.mark.slow
def test_one_graph_in_inductor_serves_every_size_and_number_of_channels_forward_and_backward() -> None:
    results = []
    for compiles in (False, True):
        upsampler = model()
        run = torch.compile(upsampler, fullgraph=True, dynamic=True, backend="inductor") if compiles else upsampler
        outputs = []
        for (size, grid), channels in zip(SIZES, (5, 24, 7), strict=True):
            image, features = (t.requires_grad_() for t in inputs(size, grid, channels))
            outputs.append(run(image, features))
            (outputs[-1] * wave(tuple(outputs[-1].shape), 31)).sum().backward()
        parameters = {n: p.grad for n, p in upsampler.named_parameters() if p.grad is not None}
        results.append((outputs, {**parameters, "image": image.grad, "features": features.grad}))
    assert graphs() == 1
    (expected_outputs, expected), (outputs, actual) = results
    torch.testing.assert_close(outputs, expected_outputs, rtol=1e-4, atol=1e-4)
    assert set(actual) == set(expected)
    for name in expected:
        error = (actual[name] - expected[name]).abs().max()
        assert error <= 1e-3 * expected[name].abs().max(), name


@pytest.mark.slow
def test_a_compiled_model_runs_under_autocast() -> None:
    eager = model()
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend="aot_eager")
    image, features = inputs(*SIZES[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(image, features), eager(image, features)
    assert out.dtype == torch.float32
    assert (out - expected).abs().mean() < 0.05 * expected.abs().mean()


OPERATORS = {
    "anyup.pixel_encoder.default": 4,  # and a fifth where the unified features have the keys' width
    "anyup.feature_unification.default": 1,
    "anyup.query_projection.default": 1,
    "anyup.window_attention.default": 1,
}


@pytest.mark.slow
def test_an_exported_program_runs_where_anyup_alone_is_imported(tmp_path: Path) -> None:
    upsampler, (image, features) = model(), inputs((12, 10), (4, 3))
    with torch.no_grad():
        torch.export.save(torch.export.export(upsampler, (image, features), strict=False), tmp_path / "upsampler.pt2")
        torch.save((image, features, upsampler(image, features)), tmp_path / "expected.pt")
    code = """
import torch, anyup
program = torch.export.load("upsampler.pt2").module()
image, features, expected = torch.load("expected.pt")
torch.testing.assert_close(program(image, features), expected)
"""
    run_python(code, cwd=tmp_path, path=(ROOT,))


def test_operators_are_known_in_a_module_whose_package_imports_anyup(tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.mkdir()
    (server / "__init__.py").write_text("import anyup\n")
    (server / "run.py").write_text("import torch\nprint(hasattr(torch.ops.anyup, 'window_attention'))\n")
    code = """
import subprocess, sys
command = [sys.executable, "-S", "-m", "server.run", "anyup"]
print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
"""
    assert run_python(code, cwd=tmp_path, path=(ROOT, tmp_path)).strip() == "True"


def test_export_keeps_each_operator_as_one_node() -> None:
    upsampler = model().requires_grad_(False)
    image, features = inputs(*SIZES[0])
    dims = {name: torch.export.Dim(name, min=2, max=512) for name in ("H", "W", "h", "w")}
    shapes = {"image": {2: dims["H"], 3: dims["W"]}, "features": {2: dims["h"], 3: dims["w"]}}
    program = torch.export.export(upsampler, (image, features), dynamic_shapes=shapes, strict=False)
    found = Counter(str(node.target) for node in program.graph.nodes if "anyup" in str(node.target))
    assert found == OPERATORS
    for size, grid in SIZES:
        image, features = inputs(size, grid)
        torch.testing.assert_close(program.module()(image, features), upsampler(image, features), rtol=1e-4, atol=1e-4)


@INTERPRETED
@pytest.mark.slow
def test_kernels_run_in_one_graph_and_in_an_exported_program() -> None:
    upsampler = model(backend="triton").requires_grad_(False)
    image, features = inputs((9, 11), (3, 4))  # small: Triton's interpreter is slow
    with torch.no_grad():
        chosen = upsampler.explain(image, features).chosen
        assert {chosen[operation] for operation in OPERATIONS} == {"triton"}
        expected = upsampler(image, features)
        compiled = torch.compile(upsampler, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image, features), expected)
        program = torch.export.export(upsampler, (image, features), strict=False)
        nodes = [node for node in program.graph.nodes if "anyup" in str(node.target)]
        assert Counter(str(node.target) for node in nodes) == OPERATORS
        assert all(any("triton" in str(argument) for argument in node.args) for node in nodes)
    assert graphs() == 1


# The operators' registrations: schema, fake kernels, autograd, ahead-of-time autograd with symbolic sizes.


def captured_calls(backend: str, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """The arguments that a training step passes to each forward and backward operator."""
    from support.feature_unification_cases import Shape as UnificationShape
    from support.feature_unification_cases import tensors_of as unification_tensors
    from support.pixel_encoder_cases import Shape as EncoderShape
    from support.pixel_encoder_cases import parameters_of
    from support.pixel_encoder_cases import tensors_of as encoder_tensors
    from support.query_projection_cases import Shape as ProjectionShape
    from support.query_projection_cases import tensors_of as projection_tensors
    from support.recipe import AttentionShape, attention_tensors

    def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.requires_grad_() for name, t in tensors.items()}

    def run() -> list[Tensor]:
        attention = leaves(attention_tensors(AttentionShape((9, 7), (4, 3), heads=2), dtype=dtype))
        projection = leaves(projection_tensors(ProjectionShape((5, 6)), dtype))
        unification = leaves(unification_tensors(UnificationShape((4, 5), 6), dtype))
        encoder = leaves(encoder_tensors(EncoderShape((8, 6), (4, 3), rotates=True), dtype))
        return [
            window_attention(**attention, window=RatioWindow(0.1), backend=backend),
            project_queries(projection.pop("encoded"), ProjectionParameters(**projection), backend=backend),
            unify_features(**unification, backend=backend),
            encode_pixels(
                encoder["pixels"],
                parameters_of(encoder),
                frequencies=encoder["frequencies"],
                output_size=(4, 3),
                backend=backend,
            ),
        ]

    calls: dict[str, tuple[Any, ...]] = {}

    class Seen(Exception):
        """A backward operator was called: its arguments are all that is wanted."""

    class Capture(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "anyup":
                name = func._schema.name.removeprefix("anyup::")
                calls[name] = args
                if name.endswith("_backward"):
                    raise Seen
            return func(*args, **(kwargs or {}))

    with Capture():
        for out in run():
            with pytest.raises(Seen):
                out.sum().backward()
    return calls


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["window_attention", "query_projection", "feature_unification", "pixel_encoder"])
@pytest.mark.parametrize("direction", ["", "_backward"])
def test_operator_passes_torch_s_own_check(name: str, direction: str, backend: str) -> None:
    arguments = captured_calls(backend, torch.float32)[name + direction]
    wanted = not direction  # nothing differentiates twice
    arguments = tuple(
        a.detach().clone().requires_grad_(wanted) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    )
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if direction and backend == "reference":
        # The others run under a dispatch mode, where torch.func does not differentiate (see pullback.py).
        checks = ["test_autograd_registration"]
    torch.library.opcheck(getattr(torch.ops.anyup, name + direction).default, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("shape", [((1, 1), (1, 1)), ((1, 5), (3, 1))])
def test_attention_of_one_pixel_passes_torch_s_own_check(shape: Any, save: bool, backend: str) -> None:
    from support.recipe import AttentionShape, attention_tensors

    tensors = attention_tensors(AttentionShape(*shape, heads=1), dtype=torch.bfloat16).values()
    arguments = (*tensors, "ratio", 0.1, 0.5, backend, 0, save)
    torch.library.opcheck(torch.ops.anyup.window_attention.default, arguments)


def test_operators_cannot_be_differentiated_twice_unnoticed() -> None:
    image, features = (t.requires_grad_() for t in inputs((8, 6), (3, 2)))
    (gradient,) = torch.autograd.grad(model()(image, features).square().sum(), image, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


def test_a_training_step_runs_under_a_dispatch_mode() -> None:
    upsampler = model(backend="torch")
    image, features = inputs((12, 10), (4, 3))
    with FlopCounterMode(display=False):
        upsampler(image, features).sum().backward()
    assert upsampler.rope.freqs.grad is not None
