"""What holds for every operator: each test_<op>.py inherits these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from bad_input import BAD, Refused
from calls import CALLS, Call
from cases import FLOATS, assert_close, assert_same_bits, is_simulated, strided
from torch import Tensor

import vmtc_kernels


def results(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def each_tensor(arguments: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {
        name: change(value) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def differentiable(arguments: dict[str, Any]) -> dict[str, Any]:
    return each_tensor(
        arguments,
        lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
    )


class ConstantContract:
    """Tests of the operator ``op`` under its calls of calls.py and bad_input.py."""

    op: ClassVar[str]
    tokens: ClassVar[int] = 36
    # (batch, tokens) that one compiled graph serves; the first batch is no other size of a call,
    # or torch.compile would take the two for one
    dynamic_sizes: ClassVar[tuple[tuple[int, int], ...]] = ((7, 36), (2, 39), (3, 48))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "call" in metafunc.fixturenames:
            calls = CALLS[self.op]
            metafunc.parametrize("call", list(calls.values()), ids=list(calls))
        if "refused" in metafunc.fixturenames:
            refused = BAD[self.op][1]
            metafunc.parametrize("refused", refused, ids=[message for *_, message in refused])

    @property
    def run(self) -> Callable[..., Any]:
        return getattr(vmtc_kernels, self.op)

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.vmtc, self.op).default

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_opcheck(self, backend: str, call: Call, dtype: torch.dtype) -> None:
        torch.library.opcheck(self.overload, (), call(2, self.tokens, dtype))

    def test_compiles_as_one_graph_without_recompiling_for_new_sizes(
        self, backend: str, call: Call
    ) -> None:
        graphs = []
        torch.compiler.reset()

        def count(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(
            lambda a: self.run(**a), fullgraph=True, dynamic=True, backend=count
        )
        for batch, tokens in self.dynamic_sizes:
            arguments = call(batch, tokens, torch.float32)
            assert_same_bits(compiled(arguments), self.run(**arguments))
        assert len(graphs) == 1

    def test_exports_with_a_dynamic_batch(self, backend: str, call: Call) -> None:
        class Module(torch.nn.Module):
            def forward(_, arguments: dict[str, Any]) -> Any:
                return self.run(**arguments)

        def dynamic(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(None for _ in value)
            return {0: torch.export.Dim.DYNAMIC} if isinstance(value, Tensor) else None

        arguments = call(2, self.tokens, torch.float32)
        shapes = {name: dynamic(value) for name, value in arguments.items()}
        program = torch.export.export(Module(), (arguments,), dynamic_shapes=(shapes,))
        for batch in (2, 4):
            arguments = call(batch, self.tokens, torch.float32)
            assert_same_bits(program.module()(arguments), self.run(**arguments))

    def test_runs_in_inference_mode(self, backend: str, call: Call) -> None:
        with torch.inference_mode():
            arguments = call(2, self.tokens, torch.float32)
            got = self.run(**arguments)
        assert all(value.is_inference() for value in results(got))
        assert_same_bits(got, self.run(**call(2, self.tokens, torch.float32)))

    @pytest.mark.parametrize("batch", [1, 4])
    def test_same_bits_on_every_run_and_any_number_of_threads(
        self, backend: str, call: Call, batch: int
    ) -> None:
        arguments = call(batch, 48 if is_simulated(backend) else 192, torch.float32)
        expected = self.run(**arguments)
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            assert_same_bits(self.run(**arguments), expected)

    def test_an_image_does_not_depend_on_its_batch(self, backend: str, call: Call) -> None:
        arguments = call(5, self.tokens, torch.float32)
        whole = results(self.run(**arguments))
        order = torch.tensor([3, 0, 4, 2, 1])
        permuted = results(self.run(**each_tensor(arguments, lambda t: t[order])))
        assert_same_bits(permuted, tuple(value[order] for value in whole))
        for b in range(5):
            alone = self.run(**each_tensor(arguments, lambda t, b=b: t[b : b + 1]))
            assert_same_bits(results(alone), tuple(value[b : b + 1] for value in whole))

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_strides_do_not_matter(self, backend: str, call: Call, dtype: torch.dtype) -> None:
        arguments = call(2, 21, dtype) if is_simulated(backend) else call(3, self.tokens, dtype)
        expected = results(self.run(**arguments))
        for name, value in arguments.items():
            variants = strided(value) if isinstance(value, Tensor) else {}
            for layout, other in variants.items():
                assert torch.equal(other, value), layout
                got = results(self.run(**{**arguments, name: other}))
                for one, same in zip(got, expected, strict=True):
                    assert one.is_contiguous(), (name, layout)
                    assert_close(one, same)

    def test_one_image_expanded_with_stride_zero(self, backend: str, call: Call) -> None:
        arguments = call(1, self.tokens, torch.float32)
        alone = results(self.run(**arguments))
        expanded = each_tensor(arguments, lambda t: t.expand(3, *t.shape[1:]))
        for got, one in zip(results(self.run(**expanded)), alone, strict=True):
            assert_close(got, one.expand(3, *one.shape[1:]))

    def test_an_empty_batch_gives_empty_results(self, backend: str, call: Call) -> None:
        arguments = call(2, self.tokens, torch.float32)
        empty = self.run(**each_tensor(arguments, lambda t: t[:0]))
        for got, full in zip(results(empty), results(self.run(**arguments)), strict=True):
            assert got.shape == (0, *full.shape[1:]) and got.dtype == full.dtype

    def test_every_backend_returns_what_the_fake_promises(self, backend: str, call: Call) -> None:
        for dtype in FLOATS:
            arguments = call(2, self.tokens, dtype)
            meta = results(self.run(**each_tensor(arguments, lambda t: t.to("meta"))))
            for got, fake in zip(results(self.run(**arguments)), meta, strict=True):
                assert (got.shape, got.dtype, got.stride()) == (
                    fake.shape,
                    fake.dtype,
                    fake.stride(),
                )

    @pytest.mark.parametrize("form", ["function", "operator"])
    def test_bad_input_is_refused(self, backend: str, form: str, refused: Refused) -> None:
        change, error, message = refused
        run = self.run if form == "function" else getattr(torch.ops.vmtc, self.op)
        with pytest.raises(error, match=message):
            run(**{**BAD[self.op][0], **change})


class OperatorContract(ConstantContract):
    """And of its gradients.

    ``no_gradient`` names floating arguments that it is not differentiable in.
    """

    no_gradient: ClassVar[tuple[str, ...]] = ()
    opcheck_with_gradients: ClassVar[tuple[str, ...]] = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )

    def gradients(
        self, arguments: dict[str, Any], run: Callable[..., Any] | None = None
    ) -> dict[str, Tensor]:
        """Gradients of a weighted sum of the floating results, whose weights are fixed."""
        arguments = differentiable(arguments)
        loss = torch.zeros(())
        for value in results((run or self.run)(**arguments)):
            if value.requires_grad:
                weight = torch.linspace(-1, 1, value.numel()).view(value.shape)
                loss = loss + (value.float() * weight).sum()
        loss.backward()
        leaves = {n: t for n, t in arguments.items() if isinstance(t, Tensor)}
        return {name: t.grad for name, t in leaves.items() if t.grad is not None}

    def test_opcheck_with_gradients(self, backend: str, call: Call) -> None:
        arguments = differentiable(call(2, self.tokens, torch.float32))
        torch.library.opcheck(self.overload, (), arguments, test_utils=self.opcheck_with_gradients)

    def test_compiles_with_gradients(self, backend: str, call: Call) -> None:
        torch.compiler.reset()
        compiled = torch.compile(
            lambda **a: self.run(**a), fullgraph=True, dynamic=True, backend="aot_eager"
        )
        for batch in (2, 3):
            arguments = call(batch, self.tokens, torch.float32)
            got, expected = self.gradients(arguments, compiled), self.gradients(arguments)
            assert got.keys() == expected.keys()
            for name, grad in got.items():
                assert_close(grad, expected[name])

    def test_gradients_are_right(self, call: Call) -> None:
        with vmtc_kernels.use_backend("reference"):
            arguments = differentiable(call(2, 9, torch.float64))
            names = [
                name
                for name, value in arguments.items()
                if isinstance(value, Tensor)
                and value.requires_grad
                and name not in self.no_gradient
            ]

            def floating(*inputs: Tensor) -> list[Tensor]:
                given = {**arguments, **dict(zip(names, inputs, strict=True))}
                # minus infinity does not vary
                return [
                    r.masked_fill(r == -torch.inf, 0)
                    for r in results(self.run(**given))
                    if r.is_floating_point()
                ]

            # a step so small that no token crosses the border of two clusters
            inputs = tuple(arguments[name] for name in names)
            assert torch.autograd.gradcheck(floating, inputs, eps=1e-7, atol=1e-6, fast_mode=True)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_gradients_are_those_of_the_reference(
        self, backend: str, call: Call, dtype: torch.dtype
    ) -> None:
        arguments = call(3, self.tokens, dtype)
        got = self.gradients(arguments)
        with vmtc_kernels.use_backend("reference"):
            expected = self.gradients(arguments)
        assert got.keys() == expected.keys() and got
        for name, grad in got.items():
            assert grad.dtype == dtype
            assert_close(grad, expected[name])
