"""The table that every law runs over: losses × targets × options × dtypes.

A new loss, target or score transform is one row here. A law that cannot hold for a row is exempted in the
row itself, with the reason.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import xent
from xent._core import backends, reference

SHIFT_Z_LOSS = "z-loss penalises lse² itself, which a shift moves"
SHIFT_SOFTCAP = "tanh is not translation-equivariant"
CONVEX_SOFTCAP = "the softcap is not convex in the inner logits"
CONVEX_Z_LOSS = "λ·lse² is not convex where lse < 0"
SUMS_Z_LOSS = "z-loss adds 2λ·lse·p, whose class sum is 2λ·lse"
SUMS_SOFTCAP = "the slope of the softcap differs from class to class"
SUMS_MASS = "the row's mass is not 1 times a constant: only a·p − t sums to zero, which needs softcap off"
ANGULAR = {
    "shift": "an angle is that of a cosine, which a shift changes",
    "gradient_sum": "the slope of an angular margin differs from the other classes'",
    "convex": "cos(θ + m) is not concave in cos θ",
}


LAWS = {
    "plain_formula": "value and gradient are those of the formula written out in float64",
    "shift": "a number added to all logits of a row changes nothing",
    "permutation": "names of classes do not matter",
    "tiling": "the budget of memory does not matter",
    "dense_equals_linear": "from logits or from features is one loss",
    "untouched": "no tensor of the caller's changes",
    "gradient_sum": "a row's gradient sums to zero over the classes",
    "finite_differences": "the gradient is that of the value",
    "convex": "the loss lies below its chords",
    "learnt_weights": "a sample weight has its gradient",
    "leaving_out": "a row left out is a row that is not there",
    "repetition": "a row of weight k is k rows",
    "row_order": "the order of rows does not matter",
    "additive": "batches with one denominator add up",
    "half": "half types are rounded once, from logits",
    "half_linear": "half types are rounded once, from features",
}


class Place(NamedTuple):
    """The backend that computes a law, and the device."""

    backend: str  # what it does not serve is left to the tiles
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
PLACES = [Place(b.name, device) for device in DEVICES for b in xent.backends() if b.missing is None]


@contextlib.contextmanager
def only(name: str) -> Iterator[None]:
    """Let one backend compute inside the block, and the tiles what it does not serve."""
    before = list(backends._backends)
    chosen = (b for b in before if b.name in (name, "tiles"))
    backends._backends[:] = sorted(chosen, key=lambda b: b.name != name)
    try:
        yield
    finally:
        backends._backends[:] = before


@contextlib.contextmanager
def at(place: Place) -> Iterator[None]:
    """Make every tensor at a place, and compute there, inside the block."""
    with torch.device(place.device), only(place.backend):
        yield


@dataclass(frozen=True)
class Row:
    """One entry of the table."""

    name: str
    target: str = "index"  # or "probabilities", "top_k", "classes": several of a row, one of them ignored
    options: dict[str, Any] = field(default_factory=dict)
    class_weight: bool = False
    sample_weight: bool = False
    ignored: bool = False
    remainder: str = "drop"  # of a top-k target
    cosines: bool = False  # features and classifier of length 1, or nearly
    sampled: bool = False  # the classes are a sample
    loss: str = "cross_entropy"  # a key of LOSSES
    exempt: dict[str, str] = field(default_factory=dict)  # law -> reason

    def __post_init__(self) -> None:
        unknown = self.exempt.keys() - LAWS.keys()
        if unknown:
            raise ValueError(f"row {self.name!r} is exempt from {sorted(unknown)}, which are no laws")


ROWS = [
    Row("index"),
    Row("index-ignored", ignored=True),
    Row("index-smoothed", options={"label_smoothing": 0.1}),
    Row("index-smoothed-to-the-end", options={"label_smoothing": 1.0}),
    Row("index-weighted", class_weight=True),
    Row("index-sample-weighted", sample_weight=True),
    Row(
        "index-everything-linear",
        options={"label_smoothing": 0.1, "temperature": 1.7},
        class_weight=True,
        sample_weight=True,
        ignored=True,
    ),
    Row(
        "index-z-loss",
        options={"z_loss": 1e-2},
        exempt={"shift": SHIFT_Z_LOSS, "gradient_sum": SUMS_Z_LOSS, "convex": CONVEX_Z_LOSS},
    ),
    Row(
        "index-softcap",
        options={"softcap": 3.0},
        exempt={"shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP, "convex": CONVEX_SOFTCAP},
    ),
    Row(
        "index-everything",
        options={"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 4.0, "temperature": 0.7},
        class_weight=True,
        sample_weight=True,
        ignored=True,
        exempt={"shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP, "convex": CONVEX_SOFTCAP},
    ),
    Row("index-cosine-margin", options={"margin": xent.Margin(cosine=0.35)}),
    Row(
        "index-cosine-margin-everything",
        options={
            "margin": xent.Margin(cosine=0.35),
            "label_smoothing": 0.1,
            "z_loss": 1e-2,
            "softcap": 4.0,
            "temperature": 0.7,
        },
        class_weight=True,
        sample_weight=True,
        ignored=True,
        exempt={"shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP, "convex": CONVEX_SOFTCAP},
    ),
    Row(
        "index-angular-margin",
        options={"margin": xent.Margin(angle=0.5), "temperature": 0.1},
        cosines=True,
        exempt=ANGULAR,
    ),
    Row(
        "index-both-margins-weighted",
        options={"margin": xent.Margin(cosine=0.1, angle=0.3), "label_smoothing": 0.1},
        cosines=True,
        class_weight=True,
        sample_weight=True,
        ignored=True,
        exempt=ANGULAR,
    ),
    Row("index-sampled", sampled=True, ignored=True),
    Row(
        "index-sampled-everything",
        options={
            "margin": xent.Margin(cosine=0.35),
            "label_smoothing": 0.1,
            "z_loss": 1e-2,
            "softcap": 4.0,
            "temperature": 0.7,
        },
        sampled=True,
        class_weight=True,
        sample_weight=True,
        ignored=True,
        exempt={"shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP, "convex": CONVEX_SOFTCAP},
    ),
    Row("probabilities", target="probabilities"),
    Row("probabilities-smoothed", target="probabilities", options={"label_smoothing": 0.1}),
    Row("probabilities-weighted", target="probabilities", class_weight=True, sample_weight=True),
    Row(
        "probabilities-everything",
        target="probabilities",
        options={"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 4.0, "temperature": 0.7},
        class_weight=True,
        sample_weight=True,
        exempt={"shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP, "convex": CONVEX_SOFTCAP},
    ),
    Row("top-k", target="top_k"),
    Row("top-k-spread", target="top_k", remainder="spread"),
    Row(
        "top-k-everything-linear",
        target="top_k",
        options={"label_smoothing": 0.1, "temperature": 1.7},
        class_weight=True,
        sample_weight=True,
    ),
    Row(
        "top-k-spread-everything",
        target="top_k",
        remainder="spread",
        options={"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 4.0, "temperature": 0.7},
        class_weight=True,
        sample_weight=True,
        exempt={"shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP, "convex": CONVEX_SOFTCAP},
    ),
]

# cross-entropy of k + 1 classes: what needs the mass of every class refuses them
BUCKETS = [
    Row("top-k-bucket", target="top_k", remainder="bucket"),
    Row(
        "top-k-bucket-everything",
        target="top_k",
        remainder="bucket",
        options={"z_loss": 1e-2, "softcap": 4.0, "temperature": 0.7},
        sample_weight=True,
        exempt={"shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP, "convex": CONVEX_SOFTCAP},
    ),
]

NO_WEIGHTS = "takes no sample weight and no denominator"
NO_TILES = "takes logits alone, so there are no tiles"
UNWEIGHTED = dict.fromkeys(("repetition", "additive", "learnt_weights"), NO_WEIGHTS)
NO_HEAD = "takes logits alone, so there is no head to compare with"
UNTILED = {"tiling": NO_TILES, "half_linear": NO_TILES, "dense_equals_linear": NO_HEAD}
SURROGATE = UNWEIGHTED | UNTILED
SURROGATE |= {
    "finite_differences": "its derivatives are cross-entropy's, with which test_surrogate.py compares",
    "convex": "its value is no function that its derivatives belong to",
    "leaving_out": "the plain product before it carries nan features into the weight's gradient",
}
CONVEX_ROW_LOSS = "a function of p that is not convex in the logits, though cross-entropy is"
CONVEX_REVERSE = "not convex in the logits that weigh the logarithms"
CONVEX_ENTROPY = "entropy is neither convex nor concave in the logits"
OF_CLASSES = UNWEIGHTED | {"convex": CONVEX_ENTROPY}

# the losses that have not all of cross-entropy's options
OTHERS = [
    Row("surrogate", loss="surrogate", ignored=True, exempt=SURROGATE),
    Row(
        "surrogate-probabilities",
        loss="surrogate",
        target="probabilities",
        exempt=SURROGATE,
    ),
    Row(
        "surrogate-top-k",
        loss="surrogate",
        target="top_k",
        exempt=SURROGATE,
    ),
    *BUCKETS,
    Row("focal", loss="focal", ignored=True, exempt={"convex": CONVEX_ROW_LOSS}),
    Row(
        "focal-everything",
        loss="focal",
        options={"gamma": 0.7, "alpha": 0.25, "softcap": 4.0, "temperature": 0.7},
        sample_weight=True,
        ignored=True,
        exempt={"shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP, "convex": CONVEX_ROW_LOSS},
    ),
    Row("poly", loss="poly", ignored=True, exempt={"convex": CONVEX_ROW_LOSS}),
    Row(
        "poly-everything",
        loss="poly",
        options={"epsilon": -0.5, "softcap": 4.0, "temperature": 0.7},
        sample_weight=True,
        ignored=True,
        exempt={"shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP, "convex": CONVEX_ROW_LOSS},
    ),
    Row("entropy", loss="entropy", ignored=True, exempt=UNWEIGHTED | {"convex": CONVEX_ENTROPY}),
    Row(
        "entropy-softcap",
        loss="entropy",
        options={"softcap": 3.0, "temperature": 0.7},
        exempt=UNWEIGHTED | {"convex": CONVEX_ENTROPY, "shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP},
    ),
    Row("log-prob", loss="log_prob", ignored=True, exempt=UNWEIGHTED),
    Row("log-probs", loss="log_probs", target="classes", exempt=OF_CLASSES),
    Row(
        "log-probs-scaled",
        loss="log_probs",
        target="classes",
        options={"logit_scale": 0.5, "softcap": 3.0, "temperature": 0.7},
        exempt=OF_CLASSES | {"shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP},
    ),
    Row("low-rank", loss="low_rank", ignored=True),
    Row(
        "low-rank-everything",
        loss="low_rank",
        options={"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 4.0, "temperature": 0.7},
        class_weight=True,
        sample_weight=True,
        ignored=True,
        exempt={"shift": SHIFT_SOFTCAP, "gradient_sum": SUMS_SOFTCAP, "convex": CONVEX_SOFTCAP},
    ),
    Row("low-rank-log-probs", loss="low_rank_log_probs", target="classes", exempt=OF_CLASSES),
    Row("index-scaled", options={"logit_scale": 0.5, "label_smoothing": 0.1}, class_weight=True),
    Row(
        "kl-divergence",
        loss="kl",
        target="probabilities",
        exempt=UNWEIGHTED
        | UNTILED
        | {
            "leaving_out": NO_WEIGHTS,
            "finite_differences": "t·log t bends too sharply near 0 for its steps: test_kl_divergence.py",
        },
    ),
    Row(
        "binary",
        loss="binary",
        target="probabilities",
        exempt=UNWEIGHTED
        | UNTILED
        | {
            "shift": "each logit is measured against 0, not against the others",
            "gradient_sum": "each element is a row of two classes of its own",
            "permutation": "there is a loss for every class, and it moves with the class",
            "leaving_out": "takes no sample weight; test_binary.py leaves elements out by weight 0",
        },
    ),
]

SUMS_REVERSE = "its sum is known to the rounding of the divergence, which may be larger than the gradient"
OF_TARGET = UNWEIGHTED | UNTILED | {"finite_differences": "test_divergences.py has them"}
OF_TARGET |= {"convex": CONVEX_REVERSE, "gradient_sum": SUMS_REVERSE, "leaving_out": SURROGATE["leaving_out"]}
OF_TEACHER = {
    "finite_differences": "a teacher of given probabilities has features without bound",
    "learnt_weights": "takes no learnt weight",
    "additive": "takes no denominator",
    "half": "the teacher's logarithms have rounded to the half type already",
}
OTHERS += [
    Row(
        "binary-of-probabilities",
        loss="binary_of_probabilities",
        target="probabilities",
        exempt=OTHERS[-1].exempt | {"half": "the sigmoid before it has rounded to the half type already"},
    ),
    Row(
        "kl-div",
        loss="kl_div",
        target="probabilities",
        exempt=OTHERS[-2].exempt
        | {
            "half": "the logarithms before it have rounded to the half type already",
            "permutation": "there is a loss for every class, and it moves with the class",
        },
    ),
    Row(
        "linear-kl-divergence",
        loss="linear_kl",
        target="probabilities",
        exempt=OF_TEACHER,
    ),
    Row(
        "low-rank-kl-divergence",
        loss="low_rank_kl",
        target="probabilities",
        exempt=OF_TEACHER,
    ),
    Row(
        "linear-kl-bucket",
        loss="linear_kl_bucket",
        target="top_k",
        remainder="bucket",
        exempt={"additive": "takes no denominator", "half_linear": "takes no product_dtype"},
    ),
    Row("kl-reverse", loss="kl_reverse", target="probabilities", exempt=OF_TARGET),
    Row("js-divergence", loss="js", target="probabilities", exempt=OF_TARGET),
    Row(
        "linear-kl-reverse",
        loss="linear_kl_reverse",
        target="probabilities",
        exempt=OF_TEACHER | {"convex": CONVEX_REVERSE, "gradient_sum": SUMS_REVERSE},
    ),
    Row(
        "linear-js-divergence",
        loss="linear_js",
        target="probabilities",
        exempt=OF_TEACHER | {"convex": CONVEX_REVERSE, "gradient_sum": SUMS_REVERSE},
    ),
]

Target = Tensor | xent.TopKTarget

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}


@dataclass
class Problem:
    """A row of the table with tensors: features (N, D), weight (C, D), bias (C,), target and options."""

    row: Row
    x: Tensor
    w: Tensor
    b: Tensor
    target: Target
    options: dict[str, Any]

    @property
    def logits(self) -> Tensor:
        return torch.nn.functional.linear(self.x, self.w, self.b)

    def dense(self, logits: Tensor | None = None, **changed: Any) -> Tensor:
        """The loss from logits."""
        z = self.logits if logits is None else logits
        options = {**self.options, **changed}
        scale = options.pop("logit_scale", 1.0)  # of a head alone
        z = z if scale == 1.0 else z * scale
        return LOSSES[self.row.loss].dense(z, self.target, **options)

    def linear(self, **changed: Any) -> Tensor:
        """The loss from features: from the logits they make, where there is no other way."""
        fused = LOSSES[self.row.loss].linear
        if fused is None:
            return self.dense(**changed)
        return fused(self.x, self.w, self.b, self.target, **{**self.options, **changed})

    def plain(self, logits: Tensor, reduction: str) -> Tensor:
        """The loss of logits by the formula written out, in float64, from which its gradient comes too."""
        options = dict(self.options)
        z = logits.double() * options.pop("logit_scale", 1.0)
        return LOSSES[self.row.loss].plain(z, self.target, reduction=reduction, **options)

    def differentiable(self) -> Problem:
        leaves = {k: getattr(self, k).detach().clone().requires_grad_() for k in ("x", "w", "b")}
        return replace(self, **leaves)


class Loss(NamedTuple):
    dense: Callable[..., Tensor]  # (z, target, *, reduction, ...)
    linear: Callable[..., Tensor] | None  # (x, w, b, target, *, reduction, ...)
    plain: Callable[..., Tensor]  # as dense, of float64 logits: the formula by torch's own operations


def reduced(values: Tensor, target: Target, reduction: str) -> Tensor:
    """Rows to a number; ignored ones, which are 0, do not count."""
    if reduction == "none":
        return values
    is_index = isinstance(target, Tensor) and not target.is_floating_point()
    counts = (target != -100).reshape(len(target), -1).any(1) if is_index else values
    count = int(counts.sum()) if is_index else len(values)
    return values.sum() if reduction == "sum" else values.sum() / count


def of_rows(field: str, sign: float = 1.0) -> Loss:
    """A field of the row statistics as a loss."""

    def dense(z: Tensor, target: Target, *, reduction: str = "mean", **options: Any) -> Tensor:
        found = getattr(xent.row_statistics(z, target, **options), field)
        return reduced(sign * found, target, reduction).to(z.dtype)

    def linear(
        x: Tensor, w: Tensor, b: Tensor, target: Target, *, reduction: str = "mean", **options: Any
    ) -> Tensor:
        rows = xent.linear_row_statistics(x, w, target, linear_bias=b, **options)
        return reduced(sign * getattr(rows, field), target, reduction).to(x.dtype)

    def plain(z: Tensor, target: Target, *, reduction: str = "mean", **options: Any) -> Tensor:
        log_p = reference.transform(z, **options).log_softmax(1)
        if field == "entropy":
            values = -(log_p.exp() * log_p).sum(1)
        else:
            values = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
        is_index = isinstance(target, Tensor) and not target.is_floating_point()
        values = values.masked_fill(target == -100, 0.0) if is_index else values
        return reduced(sign * values, target, reduction)

    return Loss(dense, linear, plain)


def of_classes(found: xent.LogProb, target: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of several classes and the entropy as a loss: a sum with different weights."""
    weights = torch.linspace(-1.0, 0.5, found.log_prob.shape[1], dtype=found.log_prob.dtype)
    values = found.log_prob @ weights.to(found.log_prob.device) - 0.1 * found.entropy
    return reduced(values, target, reduction).to(dtype)


def dense_log_probs(z: Tensor, target: Tensor, *, reduction: str = "mean", **options: Any) -> Tensor:
    return of_classes(xent.log_prob(z, target, return_entropy=True, **options), target, reduction, z.dtype)


def linear_log_probs(
    x: Tensor, w: Tensor | xent.LowRank, b: Tensor, target: Tensor, *, reduction: str = "mean", **options: Any
) -> Tensor:
    found = xent.linear_log_prob(x, w, target, linear_bias=b, return_entropy=True, **options)
    return of_classes(found, target, reduction, x.dtype)


def plain_log_probs(z: Tensor, target: Tensor, *, reduction: str = "mean", **options: Any) -> Tensor:
    log_p = reference.transform(z, **options).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    value = log_p.gather(1, target.clamp(min=0)).masked_fill(target == -100, 0.0)
    entropy = entropy.masked_fill((target == -100).all(1), 0.0)
    return of_classes(xent.LogProb(value, entropy), target, reduction, z.dtype)


def of_cross_entropy(
    dense: Callable[..., Tensor], linear: Callable[..., Tensor], formula: Callable[..., Tensor]
) -> Loss:
    """A loss that is a function of each row's cross-entropy, and of numbers of its own."""
    own = set(inspect.signature(formula).parameters) - {"loss"}

    def plain(z: Tensor, target: Tensor, *, reduction: str = "mean", **options: Any) -> Tensor:
        numbers = {name: options.pop(name) for name in own & options.keys()}
        weight = (target != -100) * options.pop("sample_weight", torch.ones(len(z))).double()
        loss = reference.cross_entropy(z, target, reduction="none", **options)
        values = weight * formula(loss, **numbers)
        if reduction == "none":
            return values
        return values.sum() if reduction == "sum" else values.sum() / weight.sum()

    return Loss(
        dense, lambda x, w, b, target, **options: linear(x, w, target, linear_bias=b, **options), plain
    )


def plain_cross_entropy(z: Tensor, target: Target, **options: Any) -> Tensor:
    if isinstance(target, xent.TopKTarget) and target.remainder == "bucket":
        return plain_bucket(z, target, **options)
    return reference.cross_entropy(z, spelt_out(target, z.shape[1]), **options)


def merged(z: Tensor, target: xent.TopKTarget) -> tuple[Tensor, Tensor]:
    """The logits and the target of k + 1 classes, the last of which are all that the target does not name."""
    q = target.probabilities.double()
    rest = 1 - q.sum(1) if target.rest is None else target.rest.double()
    others = z.scatter(1, target.indices, -torch.inf).logsumexp(1)
    return torch.cat([z.gather(1, target.indices), others[:, None]], 1), torch.cat([q, rest[:, None]], 1)


def plain_bucket(z: Tensor, target: xent.TopKTarget, **options: Any) -> Tensor:
    of_map = {name: options.pop(name) for name in ("softcap", "temperature") if name in options}
    return reference.cross_entropy(*merged(reference.transform(z, **of_map), target), **options)


def plain_bucket_kl(z: Tensor, target: xent.TopKTarget, *, reduction: str = "mean") -> Tensor:
    z, t = merged(z, target)
    return reduced((t * (t.log() - z.log_softmax(1))).sum(1), target.probabilities, reduction)


def plain_surrogate(z: Tensor, target: Target, *, reduction: str = "mean") -> Tensor:
    """⟨a·p − t, z⟩ with the bracket held constant, relative to the largest logit."""
    t = reference.target_rows(spelt_out(target, z.shape[1]), z.shape[1])
    bracket = t.sum(1, keepdim=True) * z.detach().softmax(1) - t
    return reduced((bracket * (z - z.detach().amax(1, keepdim=True))).sum(1), target, reduction)


def plain_kl(z: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    t = target.double()
    return reduced((t * (t.log() - z.log_softmax(1))).sum(1), target, reduction)


def plain_reverse(z: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    log_p = z.log_softmax(1)
    return reduced((log_p.exp() * (log_p - target.double().log())).sum(1), target, reduction)


def plain_js(z: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    p, t = z.softmax(1), target.double()
    m = 0.7 * p + 0.3 * t
    return reduced((0.3 * t * (t / m).log() + 0.7 * p * (p / m).log()).sum(1), target, reduction)


def plain_binary(z: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    y = target.double()
    values = -(y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log())
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()


def plain_kl_div(z: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    t = target.double()
    values = t * (t.log() - z.log_softmax(1))
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()


def low_rank(w: Tensor) -> xent.LowRank:
    """The same classifier, exactly, the last of its columns in a low-rank term."""
    whole, last = w.split([w.shape[1] - 1, 1], dim=1)
    down = torch.zeros(1, w.shape[1], dtype=w.dtype)
    down[0, -1] = 2.0
    return xent.LowRank(torch.cat([whole, torch.zeros_like(last)], 1), down, last, scale=0.5)


def distilled(
    x: Tensor, w: Tensor | xent.LowRank, b: Tensor | None, target: Tensor, **options: Any
) -> Tensor:
    """KL of a head and a teacher whose softmax is the target."""
    teacher = target.log(), torch.eye(target.shape[1], dtype=target.dtype)
    return xent.linear_kl_divergence(student=(x, w, b), teacher=teacher, **options)


def distilled_js(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    """JS of a head and a teacher whose softmax is the target."""
    teacher = target.log(), torch.eye(target.shape[1], dtype=target.dtype)
    return xent.linear_js_divergence(student=(x, w, b), teacher=teacher, beta=0.3, **options)


LOSSES = {
    "cross_entropy": Loss(
        xent.cross_entropy,
        lambda x, w, b, target, **options: xent.linear_cross_entropy(x, w, target, linear_bias=b, **options),
        plain_cross_entropy,
    ),
    "low_rank": Loss(
        xent.cross_entropy,
        lambda x, w, b, target, **options: xent.linear_cross_entropy(
            x, low_rank(w), target, linear_bias=b, **options
        ),
        plain_cross_entropy,
    ),
    "focal": of_cross_entropy(
        xent.focal_loss,
        xent.linear_focal_loss,
        lambda loss, gamma=2.0, alpha=1.0: alpha * (1 - torch.exp(-loss)) ** gamma * loss,
    ),
    "poly": of_cross_entropy(
        xent.poly_loss,
        xent.linear_poly_loss,
        lambda loss, epsilon=1.0: loss + epsilon * (1 - torch.exp(-loss)),
    ),
    "surrogate": Loss(xent.surrogate_cross_entropy, None, plain_surrogate),
    "kl": Loss(
        lambda z, target, *, reduction="mean": reduced(
            xent.kl_divergence(target=target, input=z), target, reduction
        ),
        None,
        plain_kl,
    ),
    "kl_reverse": Loss(
        lambda z, target, **options: xent.kl_divergence(
            target=target, input=z, direction="reverse", **{"reduction": "mean", **options}
        ),
        None,
        plain_reverse,
    ),
    "js": Loss(
        lambda z, target, **options: xent.js_divergence(
            target=target, input=z, beta=0.3, **{"reduction": "mean", **options}
        ),
        None,
        plain_js,
    ),
    "binary": Loss(xent.binary_cross_entropy_with_logits, None, plain_binary),
    "binary_of_probabilities": Loss(
        lambda z, target, **options: xent.binary_cross_entropy(z.sigmoid(), target, **options),
        None,
        plain_binary,
    ),
    "kl_div": Loss(
        lambda z, target, **options: xent.kl_div(z.log_softmax(1), target, **options), None, plain_kl_div
    ),
    "linear_kl": Loss(
        lambda z, target, **options: distilled(
            z, torch.eye(z.shape[1], dtype=z.dtype), None, target, **options
        ),
        lambda x, w, b, target, **options: distilled(x, w, b, target, **options),
        plain_kl,
    ),
    "low_rank_kl": Loss(
        lambda z, target, **options: distilled(
            z, low_rank(torch.eye(z.shape[1], dtype=z.dtype)), None, target, **options
        ),
        lambda x, w, b, target, **options: distilled(x, low_rank(w), b, target, **options),
        plain_kl,
    ),
    "linear_kl_bucket": Loss(
        lambda z, target, **options: xent.kl_divergence(
            target=target, input=z, **{"reduction": "mean", **options}
        ),
        lambda x, w, b, target, **options: xent.linear_kl_divergence(
            student=(x, w, b), teacher=target, **options
        ),
        plain_bucket_kl,
    ),
    "linear_kl_reverse": Loss(
        lambda z, target, **options: distilled(
            z, torch.eye(z.shape[1], dtype=z.dtype), None, target, direction="reverse", **options
        ),
        lambda x, w, b, target, **options: distilled(x, w, b, target, direction="reverse", **options),
        plain_reverse,
    ),
    "linear_js": Loss(
        lambda z, target, **options: distilled_js(
            z, torch.eye(z.shape[1], dtype=z.dtype), None, target, **options
        ),
        lambda x, w, b, target, **options: distilled_js(x, w, b, target, **options),
        plain_js,
    ),
    "entropy": of_rows("entropy"),
    "log_prob": of_rows("log_prob", -1.0),
    "log_probs": Loss(dense_log_probs, linear_log_probs, plain_log_probs),
    "low_rank_log_probs": Loss(
        dense_log_probs,
        lambda x, w, b, target, **options: linear_log_probs(x, low_rank(w), b, target, **options),
        plain_log_probs,
    ),
}


def problem(row: Row, dtype: torch.dtype = torch.float64, n: int = 7, d: int = 5, c: int = 6) -> Problem:
    x = torch.randn(n, d, dtype=dtype)
    w = torch.randn(c, d, dtype=dtype)
    b = torch.randn(c, dtype=dtype)
    if row.cosines:  # an angle of 0 has no derivative
        x, w = (0.95 * torch.nn.functional.normalize(t, dim=1) for t in (x, w))
        b = b / 100
    options = dict(row.options)
    if row.target == "index":
        target = torch.randint(c, (n,))
        if row.ignored:
            target[n // 2] = -100
    elif row.target == "classes":
        target = torch.randint(c, (n, 4))
        target[:, 3] = target[:, 0]  # one that is there twice
        target[n // 2, 1] = -100
    elif row.target == "top_k":
        q = torch.rand(n, 3, dtype=dtype)
        indices = torch.rand(n, c).argsort(1)[:, :3]
        target = xent.TopKTarget(indices, q / (q.sum(1, keepdim=True) + 0.5), row.remainder)
        if row.remainder == "bucket" and row.sample_weight:
            target = replace(target, rest=torch.rand(n, dtype=dtype))
    else:
        target = torch.rand(n, c, dtype=dtype)
        target /= target.sum(1, keepdim=True)
    if row.class_weight:
        options["weight"] = torch.rand(c, dtype=dtype) + 0.5
    if row.sampled:
        options["log_q"] = -torch.randint(1, 3072, (c,)).to(dtype) / 1024  # subtracted without rounding
    if row.sample_weight:
        options["sample_weight"] = torch.rand(n, dtype=dtype) + 0.5
    return Problem(row, x, w, b, target, options)


def mapped(target: Target, f: Callable[[Tensor], Tensor]) -> Target:
    """f of each tensor that a target is made of."""
    if isinstance(target, xent.TopKTarget):
        return target.mapped(f)
    return f(target)


def spelt_out(target: Target, classes: int) -> Tensor:
    """A target as the float64 reference takes it: indices, or a probability for each class."""
    return target.to_dense(classes) if isinstance(target, xent.TopKTarget) else target


def rows(law: str) -> pytest.MarkDecorator:
    """Parametrize a law over the table's rows, less those that it cannot hold for."""
    if law not in LAWS:
        raise ValueError(f"{law!r} is no law of the table's: {', '.join(LAWS)}")
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=row.name) for row in ROWS + OTHERS if law not in row.exempt]
    )


def dtypes() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda t: str(t).removeprefix("torch."))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    tolerance = TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
