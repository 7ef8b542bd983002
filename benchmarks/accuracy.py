"""The digits that a loss and its gradient keep: xent beside its peers, on the same logits, against mpmath.

    python benchmarks/accuracy.py [--rows 16] [--classes 200] [--seed 0] [--jax PYTHON] [--save FILE]

For each type and each kind of row, the worst over the rows of

- the loss's error over the bound that xent claims (benchmarks/exact.py): up to 1 it holds;
- the loss's error over the exact loss: 1 means that no digit is right;
- the loss's error in units of the last place of its type;
- the gradient's error over its bound, in the Euclidean norm.

The fused forms get scores that no product rounds: the features are the unit matrix, the classifier's columns
the logits (a masked class has a bias of −inf), and its gradient is that of the logits. xent's runs twice, as
it comes and in tiles of 16 KiB, and the worse counts. JAX runs in a process of its own (an interpreter that
has jax and optax, and tokamax if it is to be shown).
Exits with 1 if xent is beyond its own bound anywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import mpmath
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import exact
import xent

try:
    import sklearn
    from sklearn._loss import HalfMultinomialLoss
except ImportError:
    sklearn = None

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SMOOTHING = 0.1
MANY = 20_000
OFFSET = {"float64": 1e16, "float32": 1e8, "bfloat16": 1e3, "float16": 1e4}
KINDS = {
    "normal": "z of standard deviation 3",
    "many classes": f"the same, {MANY:,} classes",
    "wide": "z of standard deviation 90",
    "confident": "p_y up to 1 − 1e-30",
    "hopeless": "p_y down to 1e-300 (float64) or 1e-40",
    "huge offset": "z around " + ", ".join(f"±{v:.0e} ({k})" for k, v in OFFSET.items()),
    "masked": "a third of the classes at −inf",
    "smoothed": f"label smoothing {SMOOTHING}",
    "soft": "a probability for every class",
    "soft, offset": "the same around a huge offset",
    "soft, masked": "the same, masked classes at probability 0",
    "binary": "binary_cross_entropy_with_logits, logits to ±600 (float64) or ±80, half of them right",
}
COLUMNS = {
    "xent": "xent.cross_entropy",
    "xent fused": "xent.linear_cross_entropy",
    "torch": "F.cross_entropy",
    "torch fused": "F.linear_cross_entropy in chunks (which knows neither smoothing nor soft targets)",
    "torch in f32": "F.cross_entropy on the logits in float32, its loss and gradient rounded once",
    "sklearn": "the loss of LogisticRegression (class indices; float32 and float64)",
    "optax": "softmax_cross_entropy_with_integer_labels, softmax_cross_entropy; under jit",
    "tokamax": "linear_softmax_cross_entropy_loss (class indices; a float32 loss for every type)",
}
NOT_RUN = {
    "Liger, Cut Cross-Entropy (Triton)": "their kernels need CUDA",
    "cut-cross-entropy, impl='torch_compile'": "the package needs Triton to be imported",
}

JAX_WORKER = """
import json, sys
from importlib.metadata import version
import numpy as np, jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, optax
try:
    import tokamax
except ImportError:
    tokamax = None
names = ["jax", "optax"] + ["tokamax"] * (tokamax is not None)
print(json.dumps({name: version(name) for name in names}))
index, soft = optax.softmax_cross_entropy_with_integer_labels, optax.softmax_cross_entropy
def smoothed(z, y):
    return soft(z, optax.smooth_labels(jax.nn.one_hot(y, z.shape[1], dtype=z.dtype), SMOOTHING))
def fused(z, y):
    one = jnp.ones((1, 1), z.dtype)
    def row(zy): return tokamax.linear_softmax_cross_entropy_loss(one, zy[1][None], zy[0][None])
    return jax.lax.map(row, (z, y))
given, found = np.load(sys.argv[1], allow_pickle=False), {}
for name in {key.rsplit("|", 1)[0] for key in given.files}:
    dtype, kind = name.split("|")
    z, t = jnp.asarray(given[name + "|z"]).astype(dtype), jnp.asarray(given[name + "|t"])
    if jnp.issubdtype(t.dtype, jnp.floating):
        forms, t = {"optax": soft}, t.astype(dtype)
    elif kind == "smoothed":
        forms = {"optax": smoothed}
    else:
        forms = {"optax": index} | ({"tokamax": fused} if tokamax else {})
    for library, f in forms.items():
        found[f"{library}|{name}|loss"] = np.asarray(jax.jit(f)(z, t), dtype="float64")
        gradient = jax.jit(jax.grad(lambda z, t: f(z, t).sum()))(z, t)
        found[f"{library}|{name}|gradient"] = np.asarray(gradient, dtype="float64")
np.savez(sys.argv[2], **found)
"""


class Problem(NamedTuple):
    """Rows of one kind and one type."""

    kind: str
    z: Tensor  # (N, C)
    target: Tensor  # (N,) or (N, C)
    options: dict[str, float]

    @property
    def index(self) -> bool:
        return self.target.dim() == 1

    def t(self, row: int) -> list[mpmath.mpf | float]:
        """The target row as exact numbers."""
        classes = self.z.shape[1]
        if not self.index:
            return self.target[row].double().tolist()
        one_hot = F.one_hot(self.target[row], classes).tolist()
        if "label_smoothing" not in self.options:
            return one_hot
        with mpmath.workdps(40):
            epsilon = mpmath.mpf(self.options["label_smoothing"])
            rest, own = epsilon / classes, (1 - epsilon) + epsilon / classes
        return [own if c else rest for c in one_hot]


class Answer(NamedTuple):
    """The losses that a library returns, and the gradient of their sum."""

    loss: Tensor  # (N,)
    gradient: Tensor  # (N, C)


def make(kind: str, dtype: torch.dtype, rows: int, classes: int) -> Problem:
    name = str(dtype).removeprefix("torch.")
    if kind == "many classes":
        rows, classes = max(1, rows // 8), MANY
    if kind == "binary":  # the two classes' logits are (0, s)
        s = torch.linspace(-1, 1, 4 * rows, dtype=torch.float64) * (600 if dtype == torch.float64 else 80)
        z = torch.stack((torch.zeros_like(s), s), 1).to(dtype)
        return Problem(kind, z, torch.arange(len(z)) // 2 % 2, {})
    z = torch.randn(rows, classes, dtype=torch.float64) * (90 if kind == "wide" else 3)
    y = torch.randint(classes, (rows,))
    steps = torch.linspace(0, 1, rows, dtype=torch.float64)
    if kind == "confident":
        z[torch.arange(rows), y] = z.amax(1) + 69 * steps
    elif kind == "hopeless":
        z[torch.arange(rows), y] = z.amin(1) - (680 if dtype == torch.float64 else 75) * steps
    elif kind.endswith("offset"):
        z += OFFSET[name] * (1 - 2 * (torch.arange(rows) % 2))[:, None]
    elif kind.endswith("masked"):
        z[:, torch.rand(classes) < 1 / 3] = -math.inf
        y = torch.rand(z.shape).masked_fill(z == -math.inf, -1.0).argmax(1)
    z = z.to(dtype)
    if kind.startswith("soft"):
        q = torch.rand(rows, classes, dtype=torch.float64) * (z > -math.inf)
        return Problem(kind, z, (q / q.sum(1, keepdim=True)).to(dtype), {})
    return Problem(kind, z, y, {"label_smoothing": SMOOTHING} if kind == "smoothed" else {})


def dense(
    of_many: Callable[..., Tensor], of_two: Callable[..., Tensor], compute: torch.dtype | None = None
) -> Callable[[Problem], Answer]:
    """A loss from logits, or from those of two classes, which may be computed in another type and rounded."""

    def binary(z: Tensor, y: Tensor, **options: object) -> Tensor:
        return of_two(z[:, 1] - z[:, 0], y.to(z.dtype), **options)  # s − 0, which nothing rounds

    def run(p: Problem) -> Answer:
        dtype = p.z.dtype if compute is None else compute
        z = p.z.detach().clone().to(dtype).requires_grad_()
        target = p.target if p.index else p.target.to(dtype)
        f = binary if p.kind == "binary" else of_many
        loss = f(z, target, reduction="none", **p.options).detach()
        (gradient,) = torch.autograd.grad(f(z, target, reduction="sum", **p.options), z)
        return Answer(loss.to(p.z.dtype), gradient.to(p.z.dtype))

    return run


def fused(f: Callable[..., Tensor], **more: object) -> Callable[[Problem], Answer | None]:
    """A loss straight from features: x the unit matrix, W the logits' transpose, which no product rounds."""

    def run(p: Problem) -> Answer | None:
        if p.kind == "binary":
            return None
        masked = p.z[0] == -math.inf  # the same classes in every row
        bias = {"linear_bias": torch.where(masked, p.z[0], 0.0)} if masked.any() else {}
        x = torch.eye(len(p.z), dtype=p.z.dtype)
        w = torch.where(masked, 0.0, p.z).T.contiguous().requires_grad_()
        loss = f(x, w, p.target, reduction="none", **bias, **p.options, **more).detach()
        total = f(x, w, p.target, reduction="sum", **bias, **p.options, **more)
        (gradient,) = torch.autograd.grad(total, w)
        return Answer(loss, gradient.T)

    return run


def scikit(p: Problem) -> Answer | None:
    if not p.index or p.options or p.kind == "binary" or p.z.dtype not in (torch.float32, torch.float64):
        return None
    loss = HalfMultinomialLoss(n_classes=p.z.shape[1])
    values, gradient = loss.loss_gradient(p.target.to(p.z.dtype).numpy(), np.ascontiguousarray(p.z.numpy()))
    return Answer(torch.tensor(values), torch.tensor(gradient))


def torch_fused(p: Problem) -> Answer | None:
    if not p.index or p.options:  # it warns and goes on with F.linear and F.cross_entropy
        return None
    return fused(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())(p)


def libraries() -> dict[str, tuple[Callable[[Problem], Answer | None], ...]]:
    """Name -> the ways to run it, of which the worst counts."""
    head = xent.linear_cross_entropy
    every: dict[str, tuple[Callable[[Problem], Answer | None], ...]] = {
        "xent": (dense(xent.cross_entropy, xent.binary_cross_entropy_with_logits),),
        "xent fused": (fused(head), fused(head, memory_budget=1 << 14)),
        "torch": (dense(F.cross_entropy, F.binary_cross_entropy_with_logits),),
        "torch fused": (torch_fused,),
        "torch in f32": (dense(F.cross_entropy, F.binary_cross_entropy_with_logits, torch.float32),),
    }
    if sklearn is not None:
        every["sklearn"] = (scikit,)
    return every


def ask_jax(python: str, problems: dict[str, Problem]) -> tuple[dict[str, str], dict[str, dict[str, Answer]]]:
    """Versions, and library -> problem -> answer."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given.npz"), Path(folder, "found.npz")
        arrays = {}
        for name, p in problems.items():
            if p.kind == "binary":
                continue
            arrays[f"{name}|z"] = p.z.double().numpy()
            arrays[f"{name}|t"] = p.target.numpy() if p.index else p.target.double().numpy()
        np.savez(given, **arrays)
        code = JAX_WORKER.replace("SMOOTHING", str(SMOOTHING))
        done = subprocess.run([python, "-c", code, given, found], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{python} failed: {done.stderr.strip().splitlines()[-1]}")
        answers: dict[str, dict[str, Answer]] = {}
        with np.load(found, allow_pickle=False) as file:
            for key in {key.rsplit("|", 1)[0] for key in file.files}:
                library, name = key.split("|", 1)
                both = (torch.tensor(file[f"{key}|{what}"]) for what in Answer._fields)
                answers.setdefault(library, {})[name] = Answer(*both)
        return json.loads(done.stdout.splitlines()[-1]), dict(sorted(answers.items()))


class Row(NamedTuple):
    """One exact row in float64: the gradient as a sum of two numbers, so that float64's errors show."""

    loss: mpmath.mpf
    high: Tensor
    low: Tensor
    loss_bound: float
    gradient_bound: float

    @classmethod
    def of(cls, p: Problem, row: int) -> Row:
        e = exact.exact(p.z[row], p.t(row))
        high = [float(g) for g in e.gradient]
        low = [float(g - h) for g, h in zip(e.gradient, high, strict=True)]
        bounds = float(exact.loss_bound(e, p.z.dtype)), float(exact.gradient_bound(e, p.z.dtype))
        return cls(e.loss, *(torch.tensor(v, dtype=torch.float64) for v in (high, low)), *bounds)


def compare(answer: Answer, rows: list[Row], dtype: torch.dtype) -> dict[str, float]:
    """The worst of every figure; nan if any is."""
    loss, relative, ulps, gradient = [], [], [], []
    for found, g, row in zip(answer.loss.tolist(), answer.gradient.double(), rows, strict=True):
        error = float(abs(mpmath.mpf(found) - row.loss))
        loss.append(error / row.loss_bound)
        relative.append(error / float(abs(row.loss)))
        ulps.append(error / exact.ulp(row.loss, dtype))
        gradient.append(float(((g - row.high) - row.low).norm()) / row.gradient_bound)
    return {
        "loss": worst(loss),
        "relative": worst(relative),
        "ulp": worst(ulps),
        "gradient": worst(gradient),
    }


def worst(values: list[float]) -> float:
    return math.nan if any(math.isnan(v) for v in values) else max(values)


def cells(
    dtypes: list[str], rows: int, classes: int, jax_python: str | None, about: dict[str, object]
) -> Iterator[dict[str, object]]:
    """One for each type, kind and library that can be asked."""
    problems = {f"{d}|{kind}": make(kind, DTYPES[d], rows, classes) for d in dtypes for kind in KINDS}
    jax: dict[str, dict[str, Answer]] = {}
    if jax_python:
        versions, jax = ask_jax(jax_python, problems)
        about.update(versions)
    for name, p in problems.items():
        dtype = name.split("|")[0]
        truth = [Row.of(p, row) for row in range(len(p.z))]
        answers: dict[str, list[Answer | None]] = {}
        for library, ways in libraries().items():
            if library != "torch in f32" or DTYPES[dtype] in exact.HALF:
                answers[library] = [way(p) for way in ways]
        for library, found in jax.items():
            answers[library] = [found.get(name)]
        for library, given in answers.items():
            figures = [compare(a, truth, p.z.dtype) for a in given if a is not None]
            if figures:
                whole = {key: worst([f[key] for f in figures]) for key in figures[0]}
                yield {"dtype": dtype, "kind": p.kind, "library": library} | whole


def short(value: float | None, smallest: float = 0.005) -> str:
    """A cell of at most seven characters: below `smallest`, and from 1,000 on, as a power of ten."""
    if value is None:
        return "–"
    if math.isnan(value) or math.isinf(value):
        return str(value)
    if value == 0 or smallest <= value < 9.995:
        return f"{value:.2f}"
    if 9.995 <= value < 999.5:
        return f"{value:.0f}"
    return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def show(dtype: str, rows: list[dict]) -> None:
    names = list(dict.fromkeys(row["library"] for row in rows))
    at = {(row["kind"], row["library"]): row for row in rows}
    width = 1 + max(7, *(len(word) for name in names for word in name.split(" ", 1)))
    heads = [name.split(" ", 1) if " " in name else ["", name] for name in names]
    for pair in (
        (("loss", "loss: error / bound"), ("gradient", "gradient: error / bound")),
        (
            ("relative", "loss: relative error"),
            ("ulp", "loss: error in ulp"),
        ),
    ):
        print()
        strip = width * len(names)
        print(f"{dtype:13}" + "  |".join(f"{title:>{strip}}" for _, title in pair))
        for line in (0, 1):
            print(" " * 13 + "  |".join("".join(f"{h[line]:>{width}}" for h in heads) for _ in pair))
        for kind in KINDS:
            parts = []
            for figure, _ in pair:
                given = [at.get((kind, name)) for name in names]
                smallest = 0.1 if figure == "relative" else 0.005
                parts.append("".join(f"{short(c and c[figure], smallest):>{width}}" for c in given))
            print(f"{kind:13}" + "  |".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--jax", metavar="PYTHON", help="an interpreter that has jax and optax")
    parser.add_argument(
        "--save", metavar="FILE", help="append the cells, one JSON object a line (null is nan)"
    )
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    warnings.filterwarnings("error", message=".*``options`` ignored")  # then it is not the chunked form
    about: dict[str, object] = {
        "date": str(date.today()),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sklearn": None if sklearn is None else sklearn.__version__,
        "xent": xent.__version__,
        "python": platform.python_version(),
        "rows": options.rows,
        "classes": options.classes,
        "seed": options.seed,
    }
    found = list(cells(options.dtypes, options.rows, options.classes, options.jax, about))
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    not_run = NOT_RUN | ({} if options.jax else {"optax, tokamax": "--jax names no interpreter"})
    for peer, why in not_run.items():
        print(f"not run: {peer}: {why}")
    print()
    shown = {row["library"] for row in found}
    for word, meaning in [*((k, v) for k, v in COLUMNS.items() if k in shown), *KINDS.items()]:
        print(f"{word:13} {meaning}")
    for dtype in options.dtypes:
        show(dtype, [row for row in found if row["dtype"] == dtype])
    if options.save:
        with open(options.save, "a") as file:
            for row in found:  # JSON knows no nan
                valid = {k: None if v != v else v for k, v in row.items()}
                file.write(json.dumps(about | valid) + "\n")
    beyond = [
        f"{row['library']} {figure} {row[figure]:.3g} on {row['dtype']} {row['kind']}"
        for row in found
        for figure in ("loss", "gradient")
        if str(row["library"]).startswith("xent") and not row[figure] <= 1
    ]
    if beyond:
        raise SystemExit("\nxent is beyond its bound:\n  " + "\n  ".join(beyond))
    print("\nxent is within its bound in every cell")


if __name__ == "__main__":
    main()
