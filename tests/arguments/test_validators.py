"""Every option of every public function, with values of the wrong kind: an error that names the option.

The walk is over signatures, so that a parameter without a row here fails.
"""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch

import xent
from xent import curvature, nn, sinkhorn, triplets

N, C, D, K = 6, 7, 4, 2
GENERATOR = torch.Generator().manual_seed(0)
X, W = torch.randn(N, D, generator=GENERATOR), torch.randn(C, D, generator=GENERATOR)
Z, Y = X @ W.T, torch.tensor([0, 1, 2, 3, 4, 5])
P = torch.rand(N, D, generator=GENERATOR)


class Strange:
    """Something that is nothing of what is asked for."""


STRANGE = Strange()
BEYOND = 10**400
NUMBER = [BEYOND, "a", [1.0], STRANGE, 1j, True, float("nan"), torch.ones(2), torch.ones(1, dtype=torch.bool)]
NUMBER += [torch.ones(1, device="meta")]
WHOLE = [2**70, "a", [1], STRANGE, 1.5, float("nan"), torch.ones(2)]
FLAG = ["yes", 2, 0.5, STRANGE, torch.ones(2)]
NAME = ["nonsense", np.array(["mean", "sum"]), 3, STRANGE, torch.ones(2)]
TENSOR = ["a", [1.0], 3.0, STRANGE, np.ones(3)]
SPARSE = torch.eye(N).to_sparse()
NONE = [None]

WRONG = {
    # tensors
    "input": [*TENSOR, *NONE, Z.to_sparse()],
    "logits": [*TENSOR, *NONE, Z.to_sparse()],
    "scores": [*TENSOR, *NONE, Z.to_sparse()],
    "features": ["a", 3.0, STRANGE, np.ones(3), None],
    "linear_weight": [*TENSOR, *NONE, W.to_sparse()],
    "target": [*TENSOR, 1j],
    "y": TENSOR,
    "linear_bias": TENSOR,
    "bias": TENSOR,
    "weight": [*TENSOR, SPARSE],
    "down": [*TENSOR, *NONE, SPARSE, Y[None], W[:, :2]],
    "up": [*TENSOR, *NONE, SPARSE, Y[None], W],
    "class_weight": [*TENSOR, SPARSE],
    "pos_weight": TENSOR,
    "sample_weight": [*TENSOR, SPARSE],
    "log_q": TENSOR,
    "classes": TENSOR,
    "indices": [*TENSOR, torch.ones(2, 2)],
    "probabilities": [*TENSOR, torch.ones(2, 2, dtype=torch.int64)],
    "anchor": [*TENSOR, None],
    "positive": [*TENSOR, None],
    "negative": [*TENSOR, None],
    "student": ["a", 3, None, (X,), (X, "a"), ([1.0], W)],
    "teacher": ["a", 3, None, (X,), (X, "a"), ([1.0], W)],
    # numbers
    "label_smoothing": [*NUMBER, *NONE, -0.1, 1.5],
    "z_loss": [*NUMBER, *NONE, float("inf")],
    "logit_scale": [*NUMBER, *NONE, 0.0, -1.0, float("inf")],
    "return_entropy": [*FLAG, None],
    "softcap": [*NUMBER, 0.0, -1.0, float("inf")],
    "temperature": [*NUMBER, *NONE, 0.0, -1.0, float("inf")],
    "denominator": [*NUMBER, -1.0, float("inf")],
    "scale": [*NUMBER, *NONE, 0.0, -1.0],
    "cosine": [*NUMBER, *NONE, float("inf")],
    "angle": [*NUMBER, *NONE, -0.1, 2.0],
    "p": [*NUMBER, *NONE],
    "eps": [*NUMBER, *NONE],
    "l2": [*NUMBER, *NONE, -1.0],
    "damping": [*NUMBER, *NONE, -1.0],
    "tolerance": [*NUMBER, -1.0],
    # whole numbers
    "ignore_index": WHOLE,
    "memory_budget": [*WHOLE, 0, -1],
    "k": [*WHOLE, *NONE, 0, C + 1],
    "top_k": [*WHOLE, 0, -1],
    "num_classes": [*WHOLE, *NONE, 0],
    "num_samples": [*WHOLE, *NONE, 0],
    "samples": [*WHOLE, *NONE, 0],
    "max_iterations": [*WHOLE, -1],
    # flags and names
    "check_targets": FLAG,
    "bits": [*FLAG, None],
    "scale_by_t2": [*FLAG, None],
    "direction": [*NAME, None],
    "beta": [*NUMBER, *NONE, -0.1, 1.5],
    "target_is_logits": [*FLAG, None],
    "log_target": [*FLAG, None],
    "clamp": [*FLAG, None],
    "swap": [*FLAG, None],
    "smooth": [*FLAG, None],
    "sparse_grad": [*FLAG, None],
    "normalize": [*FLAG, None],
    "corrected": [*FLAG, None],
    "reduction": [*NAME, None],
    "remainder": [*NAME, None],
    "rest": ["a", 3, 0.5, [0.5], X],
    "geometry": [*NAME, None],
    "kind": [*NAME, None],
    "weighting": [*NAME, None],
    "curvature": [*NAME, None],
    "preconditioner": NAME,
    "wrt": [*NAME, None],
    # others
    "product_dtype": ["float32", 3, STRANGE],
    "generator": ["a", 3, STRANGE],
    "group": ["a", 3, STRANGE],
    "data_group": ["a", 3, STRANGE],
    # a model's own, whose errors are torch's
    "model": [],
    "params": [],
    "inputs": [],
    "vector": [],
    "head": ["a", 3, STRANGE, ("a",), (W, 3)],
}
MARGIN = {
    "cross-entropy": ["a", [1.0], STRANGE, 1j, True, float("nan"), torch.ones(2)],
    "triplets": [*NUMBER, float("inf")],
}
NEGATIVES = ["some", 1.5, 0, -1, STRANGE, None, torch.ones(N, K), torch.ones(2, dtype=torch.int64)]

LOGITS = {"input": Z, "target": Y}
HEAD = {"input": X, "linear_weight": W, "target": Y}
OPERATOR = {"features": X, "weight": W, "target": Y}
EXTRACTOR = {"model": lambda w, x: x @ w.T, "params": W, "inputs": X, "target": Y, "vector": W}
OPTIONS = {  # of functions that take **options, those that they know
    curvature.HeadFisher: curvature.HeadGGN,
    curvature.HeadKronecker: curvature.HeadGGN,
    curvature.newton_step: curvature.HeadGGN,
    curvature.row_gradient_norms: curvature.HeadGGN,
    curvature.row_gradients: curvature.HeadGGN,
    curvature.ggn_vector_product: curvature.HeadGGN,
    curvature.hessian_vector_product: curvature.HeadGGN,
}
NOT_OF_EXTRACTORS = {"features", "weight", "bias", "wrt", "denominator", "memory_budget"}
NOT_THERE = {  # of these, what such a function does not take
    curvature.HeadKronecker: {"bias", "wrt"},
    curvature.newton_step: {"wrt"},
    curvature.row_gradient_norms: {"wrt", "reduction", "denominator"},
    curvature.row_gradients: {"wrt", "reduction", "denominator", "memory_budget"},
    curvature.ggn_vector_product: NOT_OF_EXTRACTORS,
    curvature.hessian_vector_product: NOT_OF_EXTRACTORS,
}
CALLS = {
    xent.cross_entropy: LOGITS,
    xent.linear_cross_entropy: HEAD,
    xent.log_prob: {"input": Z, "indices": Y},
    xent.linear_log_prob: {"input": X, "linear_weight": W, "indices": Y},
    xent.row_statistics: LOGITS,
    xent.linear_row_statistics: HEAD,
    xent.entropy: {"input": Z},
    xent.top_k: {"input": Z, "k": 2},
    xent.linear_top_k: {"input": X, "linear_weight": W, "k": 2},
    xent.kl_divergence: {"input": Z, "target": Z.softmax(1)},
    xent.js_divergence: {"input": Z, "target": Z.softmax(1)},
    xent.linear_js_divergence: {"student": (X, W), "teacher": (X, W)},
    xent.linear_kl_divergence: {"student": (X, W), "teacher": (X, W)},
    xent.surrogate_cross_entropy: LOGITS,
    xent.fit_temperature: {
        "logits": torch.eye(C)[[0, 0, 0, 0, 0, 0]],
        "target": torch.tensor([0, 0, 0, 0, 1, 2]),
    },
    xent.sample_classes: {"target": Y, "num_classes": C, "num_samples": 7},
    xent.binary_cross_entropy: {"input": P, "target": P},
    xent.binary_cross_entropy_with_logits: {"input": X, "target": P},
    xent.kl_div: {"input": P.log(), "target": P},
    xent.Margin: {},
    xent.LowRank: {"weight": W, "down": W[:2], "up": W[:, :2]},
    xent.TopKTarget: {
        "indices": torch.zeros(N, 1, dtype=torch.int64),
        "probabilities": torch.ones(N, 1),
    },
    triplets.margins: LOGITS,
    triplets.linear_margins: HEAD,
    triplets.bounds: LOGITS,
    triplets.linear_bounds: HEAD,
    triplets.attribution: LOGITS,
    triplets.linear_attribution: HEAD,
    triplets.pair_matrix: LOGITS,
    triplets.linear_pair_matrix: HEAD,
    triplets.triplet_loss: LOGITS,
    triplets.smooth_triplet_loss: LOGITS,
    triplets.linear_triplet_loss: HEAD,
    triplets.linear_smooth_triplet_loss: HEAD,
    triplets.triplet_margin_loss: {"anchor": X, "positive": X, "negative": X + 1},
    curvature.HeadHessian: OPERATOR,
    curvature.HeadGGN: OPERATOR,
    curvature.HeadFisher: OPERATOR,
    curvature.HeadKronecker: OPERATOR,
    curvature.newton_step: {**OPERATOR, "l2": 1.0},
    curvature.row_gradient_norms: OPERATOR,
    curvature.row_gradients: OPERATOR,
    curvature.SoftmaxJacobian: {"logits": Z},
    curvature.ggn_vector_product: EXTRACTOR,
    curvature.hessian_vector_product: EXTRACTOR,
}
# walked by the tests of their own modules
ELSEWHERE = {
    # tests/auditing/test_audit.py
    xent.audit,
    xent.Audit,
    xent.AuditResult,
    xent.SoftmaxRegression,
    xent.SoftmaxRegressionCV,
    xent.load_model,  # tests/linear_model/test_saved.py
    sinkhorn.assign,
    # tests/losses/test_row_losses.py, tests/core/test_backends.py
    xent.focal_loss,
    xent.linear_focal_loss,
    xent.poly_loss,
    xent.linear_poly_loss,
    xent.Backend,
    xent.backends,
    xent.register_backend,
    xent.unregister_backend,
}


def options_of(function):
    """The names of what a function takes."""
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    further = OPTIONS.get(function)
    if further is not None:
        names += [name for name in options_of(further) if name not in names]
    return [name for name in names if name not in NOT_THERE.get(function, ())]


def wrong_values(function, name):
    if name == "margin":
        of = "triplets" if function.__module__.startswith("xent.triplets") else "cross-entropy"
        optional = inspect.signature(function).parameters[name].default is None
        return [*MARGIN[of], *([] if optional else NONE)]
    if name == "negatives":
        return NEGATIVES
    values = list(WRONG[name])
    optional = ("row_statistics" in function.__name__ or function in (xent.Margin,)) and name == "target"
    if name == "target" and not optional:
        values.append(None)
    if name == "top_k" and "attribution" in function.__name__:
        values.append(None)
    if name == "scale" and function is xent.LowRank:
        return [*NUMBER, *NONE, float("inf")]
    if name == "bias" and function is curvature.HeadKronecker:
        return []
    return values


CASES = [
    pytest.param(function, name, value, id=f"{function.__name__}-{name}-{number}")
    for function in CALLS
    for name in options_of(function)
    for number, value in enumerate(wrong_values(function, name))
]


@pytest.mark.parametrize(("function", "name", "value"), CASES)
def test_a_value_of_the_wrong_kind_is_named(function, name, value):
    with pytest.raises((TypeError, ValueError, IndexError)) as found:
        function(**{**CALLS[function], name: value})
    message = str(found.value)
    assert re.search(rf"\b{name}\b", message), message
    assert "\n" not in message
    # ours, and not what Python says of an operation that does not work
    assert "not supported between" not in message
    assert "unsupported operand" not in message
    assert "positional argument" not in message


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_the_call_itself_is_right(function):
    function(**CALLS[function])


def test_every_public_function_is_walked():
    public = set()
    for module in (xent, triplets, curvature, sinkhorn):
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing) and not (inspect.isclass(thing) and issubclass(thing, tuple | Exception)):
                public.add(thing)
    records = {triplets.PairMatrix}
    assert public - set(CALLS) - ELSEWHERE - records == set()


MODULES = {
    nn.CrossEntropyLoss: {},
    nn.LinearCrossEntropyLoss: {"in_features": D, "num_classes": C},
    nn.MarginLoss: {"in_features": D, "num_classes": C},
    nn.BCELoss: {},
    nn.BCEWithLogitsLoss: {},
    nn.KLDivLoss: {},
    nn.SoftTripletLoss: {},
    nn.LinearSoftTripletLoss: {"in_features": D, "num_classes": C},
    nn.PrototypeHead: {"in_features": D, "num_prototypes": C},
    nn.FocalLoss: {},
    nn.PolyLoss: {},
    nn.LinearFocalLoss: {"in_features": D, "num_classes": C},
    nn.LinearPolyLoss: {"in_features": D, "num_classes": C},
}
OF_MODULES = {
    "in_features": [*WHOLE, *NONE, -1],
    "num_classes": [*WHOLE, *NONE, 0, -1],
    "num_prototypes": [*WHOLE, *NONE, 0, -1],
    "out_features": ["a", 3, STRANGE, (1.5,), (-1,)],
    "iterations": [*WHOLE, *NONE, 0],
    "epsilon": [*NUMBER, *NONE],
    "gamma": [*NUMBER, *NONE, -1.0, float("inf")],
    "alpha": ["a", STRANGE, -1.0, float("inf"), torch.ones(2, 2)],
    "bias": [*FLAG, None],
    "linear_weight": ["a", 3, torch.ones(2, 2), torch.nn.Parameter(torch.ones(2))],
    "linear_bias": ["a", 3, torch.ones(2), torch.nn.Parameter(torch.ones(2, 2))],
    "device": [],  # torch's own
    "dtype": [],
}


def wrong_of_module(module, name):
    if name == "margin":
        return MARGIN["triplets" if "Triplet" in module.__name__ else "cross-entropy"]
    if name == "negatives":
        return ["some", 1.5, 0, -1, STRANGE, None]
    return OF_MODULES.get(name, WRONG.get(name))


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        pytest.param(module, name, value, id=f"{module.__name__}-{name}-{number}")
        for module in MODULES
        for name in inspect.signature(module).parameters
        for number, value in enumerate(wrong_of_module(module, name))
    ],
)
def test_modules_refuse_when_they_are_made(module, name, value):
    with pytest.raises((TypeError, ValueError)) as found:
        module(**{**MODULES[module], name: value})
    assert re.search(rf"\b{name}\b", str(found.value)), str(found.value)


def test_every_module_is_walked():
    modules = {
        thing for thing in vars(nn).values() if inspect.isclass(thing) and issubclass(thing, torch.nn.Module)
    }
    assert modules == set(MODULES)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(1), torch.tensor(0.5), 1])
@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "softcap", "temperature", "denominator"])
def test_numbers_of_every_library_are_taken(name, number):
    plain = number.item() if hasattr(number, "item") else number
    found = xent.cross_entropy(Z, Y, **{name: number})
    # to rounding: a plain call has a shorter way
    assert found.item() == pytest.approx(xent.cross_entropy(Z, Y, **{name: plain}).item(), rel=1e-6)


@pytest.mark.parametrize(
    "name", ["label_smoothing", "z_loss", "softcap", "temperature", "denominator", "margin"]
)
def test_a_derivative_in_an_option_is_refused(name):
    """In every way that torch has, where a tensor without a flag would answer a silent 0."""

    def loss(value):
        return xent.cross_entropy(Z, Y, **{name: value})

    one, ways = torch.tensor(0.5), []
    ways.append(lambda: torch.func.jvp(loss, (one,), (one,)))
    ways.append(lambda: torch.func.grad(loss)(one))
    ways.append(lambda: torch.func.jacfwd(loss)(one))
    ways.append(lambda: loss(one.clone().requires_grad_()))

    def dual():
        with torch.autograd.forward_ad.dual_level():
            loss(torch.autograd.forward_ad.make_dual(one, one))

    for way in (*ways, dual):
        with pytest.raises(ValueError, match=f"{name} takes no gradient"):
            way()


@pytest.mark.parametrize(
    "made",
    [
        lambda number: nn.CrossEntropyLoss(temperature=number, softcap=number),
        lambda number: nn.LinearCrossEntropyLoss(D, C, softcap=number),
        lambda number: nn.MarginLoss(D, C, scale=number),
        lambda number: nn.MarginLoss(D, C, margin=number),
        lambda number: nn.MarginLoss(D, C, margin=xent.Margin(angle=number)),
        lambda number: nn.LinearSoftTripletLoss(D, C, margin=number),
    ],
)
@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5)], ids=str)
def test_modules_keep_plain_numbers(made, number):
    module, plain = made(number), made(0.5)
    assert repr(module) == repr(plain)
    assert {k: type(v) for k, v in vars(module).items()} == {k: type(v) for k, v in vars(plain).items()}


METHODS = {
    "PairMatrix.largest": (
        lambda k: triplets.pair_matrix(Z, Y).largest(k),
        "k",
        ["a", None, [1], 1.5, 0, -1, float("inf")],
    ),
    "PrototypeHead.forward": (
        lambda assigned: nn.PrototypeHead(D, C)(X, X, assigned=assigned),
        "assigned",
        ["a", None, 1.5, True, 0, 3],
    ),
    "PrototypeHead.forward, views": (lambda view: nn.PrototypeHead(D, C)(X, view), "views", ["a", 3, [1.0]]),
    "MarginLoss.cosines": (
        nn.MarginLoss(D, C).cosines,
        "input",
        ["a", [1.0], 3.0, X.numpy(), X.long(), X[:, :2]],
    ),
    "PrototypeHead.cosines": (nn.PrototypeHead(D, C).cosines, "input", ["a", X.numpy(), X.long(), X[:, :2]]),
    "PrototypeHead.predict": (nn.PrototypeHead(D, C).predict, "input", ["a", X.numpy(), X.long(), X[:, :2]]),
    "HeadHessian.block": (
        lambda index: curvature.HeadHessian(X, W, Y).block(index),
        "index",
        ["a", 1.5, None, True, C, -1],
    ),
    "HeadKronecker.solve": (
        lambda flag: curvature.HeadKronecker(X, W, Y).solve(W, 0.1, factored=flag),
        "factored",
        [*FLAG, None, -1],
    ),
    "HeadKronecker.solve, damping": (
        lambda damping: curvature.HeadKronecker(X, W, Y).solve(W, damping),
        "damping",
        [*NUMBER, None],
    ),
    "SoftmaxJacobian.solve": (
        lambda damping: curvature.SoftmaxJacobian(Z).solve(Z, damping),
        "damping",
        ["a", None, [1.0], True, float("nan"), -1.0],
    ),
    "TopKTarget.to_dense": (
        lambda classes: xent.TopKTarget(Y[:, None], torch.ones(N, 1)).to_dense(classes),
        "classes",
        ["a", None, 1.5, 0, -1],
    ),
    "products": (
        lambda v: curvature.HeadHessian(X, W, Y) @ v,
        "right-hand side",
        ["a", 3, None, W.to_sparse()],
    ),
}


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [
        pytest.param(call, name, value, id=f"{method}-{number}")
        for method, (call, name, values) in METHODS.items()
        for number, value in enumerate(values)
    ],
)
def test_methods_name_what_is_of_the_wrong_kind(call, name, value):
    with pytest.raises((TypeError, ValueError, IndexError)) as found:
        call(value)
    assert name in str(found.value), str(found.value)
    assert "not supported" not in str(found.value)


def test_a_sparse_target_outside_the_classes_is_named():
    with pytest.raises(IndexError, match=r"TopKTarget.indices\[0, 0\] is 9"):
        xent.TopKTarget(torch.tensor([[9]]), torch.ones(1, 1)).to_dense(5)


def test_a_count_of_negatives_is_a_number_of_any_library():
    for one in (1, np.int64(1), torch.tensor(1)):
        assert torch.equal(
            triplets.triplet_loss(Z, Y, negatives=one), triplets.triplet_loss(Z, Y, negatives=1)
        )
