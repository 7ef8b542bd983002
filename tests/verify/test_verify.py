"""`xent verify`: every identity holds; one that is broken is named, and changes the exit code."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree

import pytest
import torch
from click.testing import CliRunner

import xent
from xent.cli.commands import cli
from xent.verify import IDENTITIES, Setting, figures, registry, verify
from xent.verify.data import batches, read_digits

PAGE = {1, 2, 3, 4, 5, 6, 7}  # sections of the mathematics that are there to be checked


def run(*arguments: object, code: int = 0):
    done = CliRunner().invoke(cli, ["verify", *map(str, arguments)])
    assert done.exit_code == code, (done.exit_code, done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def setting():
    device = torch.device("cpu")
    return Setting(torch.float32, device, batches(torch.float32, device, read_digits()))


def holds(name: str, setting: Setting) -> bool:
    identity = IDENTITIES[name]
    return max(deviation.units for deviation in identity.check(setting)) <= identity.allowed


# What it finds


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_identity_holds(dtype):
    report = verify([dtype])
    assert [(done.identity.name, done.worst) for done in report.failures] == []
    assert report.holds
    assert len(report.outcomes) == len(IDENTITIES) >= 30
    assert {identity.section for identity in report.identities} == PAGE
    assert report.data == ("random: 64 rows", "extreme: 12 rows", "digits: 1,797 rows")
    assert report.missing is None


BREAKS = {  # what is replaced -> which identities notice at least
    "cross_entropy": [
        *("cross-entropy", "label smoothing", "the best under smoothing", "the mean", "the gradient"),
        *("the softmax Jacobian", "the slope in β = 1/T", "the loss in margins"),
    ],
    "linear_cross_entropy": ["a linear head", "gradients through the head", "through a feature extractor"],
    "surrogate_cross_entropy": ["the surrogate", "the surrogate's gradient", "the surrogate's curvature"],
    "binary_cross_entropy": ["maximum likelihood", "worked tables"],
    "binary_cross_entropy_with_logits": ["two classes", "worked tables"],
    "kl_div": ["smoothing as a prior"],
    "kl_divergence": ["cross-entropy is entropy + KL", "the divergence's gradient"],
    "entropy": ["cross-entropy with oneself", "the surrogate's own slope"],
}


@pytest.mark.parametrize("function", BREAKS)
def test_an_error_of_a_thousandth_is_noticed(function, monkeypatch, setting):
    right = getattr(xent, function)
    monkeypatch.setattr(xent, function, lambda *args, **options: right(*args, **options) * 1.001)
    assert [name for name in BREAKS[function] if holds(name, setting)] == []


def test_an_error_of_a_thousandth_in_triplets_is_noticed(monkeypatch, setting):
    for function, field, name in (
        ("bounds", "hinge", "a chain of triplet bounds"),
        ("bounds", "loss", "a chain of triplet bounds"),
        ("bounds", "hardest_low", "a chain of triplet bounds"),
        ("bounds", "hardest_high", "the loss in margins"),
        ("attribution", "shares", "rivals that carry the loss"),
        ("attribution", "losses", "rivals that carry the loss"),
        ("attribution", "remainder", "rivals that carry the loss"),
    ):
        right = getattr(xent.triplets, function)

        def wrong(*args, right=right, field=field):
            found = right(*args)
            return found._replace(**{field: getattr(found, field) * 1.001})

        with monkeypatch.context() as broken:
            broken.setattr(xent.triplets, function, wrong)
            assert not holds(name, setting), field
    margins = xent.triplets.margins
    monkeypatch.setattr(xent.triplets, "margins", lambda z, y: 1.001 * margins(z, y))
    assert not holds("the gradient in a margin", setting)
    linear = xent.triplets.linear_margins
    monkeypatch.setattr(xent.triplets, "linear_margins", lambda *t, **options: 1.001 * linear(*t, **options))
    assert not holds("squared distances as scores", setting)


def test_naive_code_is_noticed(monkeypatch, setting):
    """Torch's own results fail: log 0, a masked class in a soft target, the mean over no rows."""
    torchs = torch.nn.functional.cross_entropy

    def naive(z, target, weight=None, *, sample_weight=None, **options):
        return torchs(z, target, weight, **options)

    monkeypatch.setattr(xent, "cross_entropy", naive)
    found = {name: holds(name, setting) for name in ("log 0 is never met", "cross-entropy", "the mean")}
    assert not any(found.values()), found


EQUATIONS = {  # page -> equation, displayed or in the text -> the identity that checks it
    "cross-entropy": {
        r"-\tfrac{1}{10} \log P = -\left[0.6 \log p + 0.4 \log(1 - p)\right]": "maximum likelihood",
        r"0.673012 nats, at $p = 0.6$": "maximum likelihood",
        r"\mathrm{CE}(t, p) = H(t) + \mathrm{KL}(t \| p)": "cross-entropy is entropy + KL",
        r"\mathrm{CE}(p, p) = H(p)": "cross-entropy with oneself",
        r"(1 - \varepsilon) e_y + \varepsilon / C": "label smoothing",
        r"\ell_\varepsilon = (1 - \varepsilon)\, \ell + \varepsilon\, \mathrm{CE}(u, p) "
        r"= (1 - \varepsilon)\, \ell + \varepsilon \left(\mathrm{KL}(u \| p) + \log C\right)": (
            "smoothing as a prior"
        ),
        r"p_y = 1 - \varepsilon + \varepsilon / C$, not at 1, and its minimum is": "the best under smoothing",
        r"$a \langle p, z \rangle - \langle t, z \rangle$ and the curvature $a \operatorname{Var}_p(z)$": (
            "the slope in β = 1/T"
        ),
        r"\frac{\partial \ell}{\partial z} = a p - t": "the gradient",
        r"$W^\top (a p - t)$ to the features and as $(a p - t)\, x^\top$": "gradients through the head",
        r"J \left(-\frac{t}{p}\right) = a p - t": "the chain through log p",
        r"J \mathbf{1} = 0": "the softmax Jacobian",
        r"0 \preceq J \preceq \tfrac{1}{2} \left(I - \tfrac{1}{C} \mathbf{1} \mathbf{1}^\top\right)": (
            "the softmax Jacobian"
        ),
        r"\frac{\partial^2 \ell}{\partial z^2} = a J": "the second derivative",
        r"logistic function of $z_1 - z_0$": "two classes",
        r"the value $\langle a p - t, z \rangle$": "the surrogate",
        r"$a p - t$, and $a J$ for the second derivative": "the surrogate's curvature",
        r"the gradient $a p - t + a J z$": "the surrogate's own slope",
        r"\ell - \langle a p - t, z \rangle = a H(p)": "the surrogate",
        r"\ell = \log\Bigl(1 + \sum_{j \ne y} \exp(m_j)\Bigr)": "the loss in margins",
        r"\frac{\partial \ell}{\partial m_j} = p_j": "the gradient in a margin",
        r"\operatorname{softplus}(\max_j m_j + \log(C - 1))": "the loss in margins",
    },
    "triplets": {
        r"m_j = z_j - z_y": "the gradient in a margin",
        r"\ell = \log\Bigl(1 + \sum_{j \ne y} \exp(m_j)\Bigr)": "the loss in margins",
        r"\frac{\partial \ell}{\partial m_j} = p_j": "the gradient in a margin",
        r"\frac{1}{C} \sum_j \max(m_j + \log C, 0)": "a chain of triplet bounds",
        r"\text{hinge} \le \text{smooth} \le \text{tight} \le \text{loss} \le \text{union}": (
            "a chain of triplet bounds"
        ),
        r"\mathrm{softplus}(\max_j m_j) \le \ell \le \mathrm{softplus}(\max_j m_j + \log(C - 1))": (
            "the loss in margins"
        ),
        r"\ell = \sum_{j \ne y} \pi_j \, \mathrm{softplus}(m_j - \log \pi_j)": "rivals that carry the loss",
        r"\pi_j \, \mathrm{softplus}(m_j - \log \pi_j) = \pi_j \, \ell": "rivals that carry the loss",
        r"-\|x - w\|^2 = 2 \langle x, w \rangle - \|w\|^2 - \|x\|^2": "squared distances as scores",
        r"\mathrm{softplus}(m + \log s) = \max(m + \log s, 0) + \log(1 + u)": "a chain of triplet bounds",
    },
}
RELATION = re.compile(r"[=<>≤≥⪯]|\\(?:leq?|geq?|preceq|succeq|approx|equiv)\b")


def displayed(text: str) -> list[str]:
    """Return the formulas that a page sets on lines of their own, each without its line breaks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"^    .*[=≤].*$", prose, flags=re.MULTILINE)  # formulas stand between $$
    blocks = re.findall(r"\$\$(.*?)\$\$", prose, flags=re.DOTALL)
    formulas = [formula for block in blocks for formula in re.split(r"\\qquad|\\\\", block)]
    return [" ".join(formula.split()) for formula in formulas]


@pytest.mark.parametrize("page", EQUATIONS)
def test_equations_of_a_page_are_identities(page, request):
    """The pages say so: an equation that is set on a line of its own stands here with its identity."""
    text = (request.config.rootpath / "docs" / "explanation" / f"{page}.md").read_text()
    for equation, name in EQUATIONS[page].items():
        assert equation in " ".join(text.split())
        assert name in IDENTITIES
    equations = [formula for formula in displayed(text) if RELATION.search(formula)]
    assert equations
    assert [equation for equation in equations if equation not in EQUATIONS[page]] == []


# A deviation


def test_a_deviation_counts_units_in_the_last_place(setting):
    one = torch.ones(3)
    eps = torch.finfo(torch.float32).eps
    far = one + torch.tensor([0.0, 3 * eps, -eps])
    assert setting.compare(far, 1.0, 1.0, "here") == registry.Deviation(pytest.approx(3), "here, row 1")
    assert setting.compare(far, 1.0, 3.0, "here").units == pytest.approx(1)
    assert setting.compare(far, 1.0, 1.0, "here", torch.float16).units < 1e-3
    assert setting.compare(far[None].double(), 1.0, 1.0, "here").where == "here"
    matrix = torch.zeros(2, 3, 3)
    matrix[1, 2, 0] = eps
    assert setting.compare(matrix, 0.0, 1.0, "here") == registry.Deviation(1.0, "here, row 1")


@pytest.mark.parametrize(
    ("found", "expected", "units"),
    [
        (math.nan, 1.0, math.inf),
        (1.0, math.nan, math.inf),
        (math.nan, math.nan, math.inf),
        (math.inf, 1.0, math.inf),
        (math.inf, -math.inf, math.inf),
        (math.inf, math.inf, 0.0),
        (1.0, 1.0, 0.0),
        (1e-45, 0.0, 1.0),  # the smallest number is a unit where the scale is 0
    ],
)
def test_a_deviation_of_what_is_not_finite(setting, found, expected, units):
    assert setting.compare(torch.tensor([found]), expected, 0.0, "").units == pytest.approx(units, rel=0.01)


def test_an_identity_that_compares_nothing_does_not_hold(setting):
    assert setting.compare(torch.ones(0), 0.0, 1.0, "here").units == math.inf


# The command


def test_the_table():
    said = run().stdout
    lines = said.splitlines()
    for identity in IDENTITIES.values():
        (line,) = (line for line in lines if identity.name + "  " in line and identity.formula in line)
        assert line.count("✓") == 2
    assert "✗" not in said
    assert f"all {len(IDENTITIES)} hold in float64 and float32 on cpu" in said
    assert "digits: 1,797 rows" in said


def test_json():
    done = run("--json", "--dtype", "bfloat16", "--dtype", "float32", "--dtype", "bfloat16")  # once is enough
    found = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert set(found) == {
        *("holds", "versions", "device", "dtypes", "data", "missing", "seconds", "identities", "files")
    }
    assert found["holds"] is True
    assert found["versions"]["xent"] == xent.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert {"numpy", "python", "machine"} < set(found["versions"])
    assert found["dtypes"] == ["bfloat16", "float32"]
    assert found["device"] == "cpu"
    assert found["files"] == []
    assert [each["name"] for each in found["identities"]] == sorted(
        IDENTITIES, key=lambda name: IDENTITIES[name].section
    )
    for each in found["identities"]:
        assert set(each) == {"name", "formula", "section", "allowed", "because", "results"}
        assert [result["dtype"] for result in each["results"]] == ["bfloat16", "float32"]
        for result in each["results"]:
            assert set(result) == {"dtype", "holds", "error", "where", "seconds"}
            assert result["holds"] is True
            assert 0 <= result["error"] <= each["allowed"]


def test_one_that_does_not_hold_is_named_and_ends_with_1(monkeypatch):
    right = xent.entropy
    monkeypatch.setattr(xent, "entropy", lambda z: right(z) + 1e-3)
    done = run(code=1)
    assert "✗ cross-entropy with oneself in float32: " in done.stdout
    assert "✗ cross-entropy with oneself in float64: " in done.stdout
    assert " at extreme, entropy, row 2\n" in done.stdout  # (0, 200): of no entropy at all
    assert f"1 of {len(IDENTITIES)} do not hold" in done.stdout
    found = json.loads(run("--json", code=1).stdout)
    assert found["holds"] is False
    broken = [each["name"] for each in found["identities"] if not all(r["holds"] for r in each["results"])]
    assert broken == ["cross-entropy with oneself"]


def test_one_that_cannot_be_computed_does_not_hold(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no [bold]such\nkernel")

    monkeypatch.setattr(xent, "entropy", fail)
    done = run("--dtype", "float32", code=1)
    assert "✗ cross-entropy with oneself in float32: inf at RuntimeError: no [bold]such kernel" in done.stdout
    found = json.loads(run("--dtype", "float32", "--json", code=1).stdout)
    (each,) = (each for each in found["identities"] if each["name"] == "cross-entropy with oneself")
    assert each["results"][0]["error"] is None  # JSON has no infinity
    assert each["results"][0]["where"].startswith("RuntimeError")


def test_an_identity_is_one_function(monkeypatch):
    monkeypatch.setattr(registry, "IDENTITIES", dict(IDENTITIES))
    monkeypatch.setattr("xent.verify.report.IDENTITIES", registry.IDENTITIES)

    @registry.identity("one", "1 = 1", section=6, allowed=1, because="it is exact")
    def one(s):
        yield s.compare(s.tensor([1.0]), 1.0, 1.0, "anywhere")

    @registry.identity("an empty one", "?", section=6, allowed=1, because="it compares nothing")
    def empty(s):
        yield from ()

    with pytest.raises(AssertionError, match="there already"):
        registry.identity("one", "2 = 2", section=6, allowed=1, because="")(one)
    done = run("--dtype", "float32", code=1)
    assert "0.00 ✓" in next(line for line in done.stdout.splitlines() if line.startswith("  one "))
    assert "✗ an empty one in float32: inf at nothing was compared" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--device", "gpu"], "'gpu'"),
        (["--device", "meta"], "hold no numbers"),
        (["--figures", "file/figures"], "is a file, not a directory; name another place\n"),
        (["everything"], "unexpected extra argument"),
    ],
)
def test_bad_usage_ends_with_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    done = run(*arguments, code=2)
    assert message in done.stderr
    assert done.stderr.startswith("xent: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there():
    assert "'cuda'" in run("--device", "cuda", code=2).stderr


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    run(
        "--device",
        "cuda",
        "--dtype",
        "float32",
        "--dtype",
        "float64",
        "--dtype",
        "bfloat16",
        "--dtype",
        "float16",
    )


# Figures, and what may be missing


def test_figures(tmp_path):
    done = run("--dtype", "float32", "--figures", tmp_path / "new" / "figures", "--json")
    made = sorted((tmp_path / "new" / "figures").iterdir())
    assert [path.stem for path in made] == sorted(figures.FIGURES)
    assert sorted(json.loads(done.stdout)["files"]) == [str(path) for path in made]
    for path in made:
        assert path.stat().st_size < 300_000
        drawn = xml.etree.ElementTree.parse(path).getroot()
        width, height = (float(drawn.get(side).removesuffix("pt")) for side in ("width", "height"))
        assert 200 < height < width < 900


def test_the_committed_figures_are_these(tmp_path, request):
    """By name: their pixels depend on fonts."""
    folder = request.config.rootpath / "docs" / "figures"
    assert {f"{name}.svg" for name in figures.FIGURES} < {path.name for path in folder.iterdir()}


def process(*arguments: str, without: tuple[str, ...]) -> subprocess.CompletedProcess:
    hidden = f"import sys; sys.modules.update(dict.fromkeys({without!r}))"
    code = f"{hidden}; from xent.cli.commands import cli; cli()"
    return subprocess.run(
        [sys.executable, "-c", code, "verify", "--dtype", "float32", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_scikit_learn_the_digits_are_said_to_be_missing(tmp_path):
    done = process(without=("sklearn",))
    assert (done.returncode, done.stderr) == (0, "")
    assert "not checked on digits: scikit-learn comes with pip install 'xent[probe]'" in done.stdout
    assert "random: 64 rows; extreme: 12 rows\n" in done.stdout


def test_without_matplotlib_there_are_no_figures(tmp_path):
    done = process("--figures", str(tmp_path / "figures"), without=("matplotlib",))
    assert done.returncode == 1
    assert done.stderr == "xent: matplotlib is not installed; it comes with: pip install 'xent[report]'\n"
    assert not (tmp_path / "figures").exists()
