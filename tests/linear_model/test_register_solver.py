"""Solvers made outside the package: used through the estimator and the command line as its own are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning

from contributing import run_example
from xent import SoftmaxRegression
from xent.cli.commands import cli
from xent.errors import BadInput
from xent.linear_model import Solver, register_solver
from xent.linear_model.solvers import _registry, solver_named


@pytest.fixture(autouse=True)
def forget_afterwards(monkeypatch):
    monkeypatch.setattr(_registry, "_SOLVERS", dict(_registry._SOLVERS))


def newton_in_one_piece(objective, theta, max_iter, after_iteration):
    """Solve each of Newton's systems as a dense matrix, whose order is all weights, then all biases."""
    K, D = objective.n_vectors, objective.n_features
    place = np.arange(K * (D + 1)).reshape(K, D + 1)  # in theta, a class's bias stands behind its weights
    order = np.concatenate([place[:, :-1].ravel(), place[:, -1]])
    ridge = np.concatenate([np.tile(objective.penalty / objective.scale**2, K), np.zeros(K)])
    for _ in range(max_iter):
        _, gradient = objective(theta)
        H = objective.hessian(theta).to_dense().numpy() + np.diag(ridge)
        step = np.linalg.lstsq(H, -gradient[order], rcond=1e-12)[0]
        theta = theta.copy()
        theta[order] += step
        after_iteration(theta)
    return False


def test_the_worked_example_finds_the_minimum():
    run_example("A solver")
    X, y = load_iris(return_X_y=True)
    model = SoftmaxRegression(solver="gradient-descent", max_iter=5000).fit(X, y)
    assert model.converged_
    assert model.get_params()["solver"] == "gradient-descent"
    peer = SoftmaxRegression(solver="newton-cg", tol=1e-8).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), peer.predict_proba(X), atol=0.01)


def test_the_worked_example_on_the_command_line(tmp_path, monkeypatch):
    run_example("A solver")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.csv").write_text("u,v,kind\n" + "1,2,a\n2,1,b\n2,2,a\n" * 10)
    arguments = ["fit", "f.csv", "--label", "kind", "--json", "--solver"]
    done = CliRunner().invoke(cli, [*arguments, "gradient-descent"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"]["solver"] == "gradient-descent"
    assert "[auto|lbfgs|newton-cg|gradient-descent]" in CliRunner().invoke(cli, ["fit", "--help"]).stdout
    refused = CliRunner().invoke(cli, [*arguments, "sag"])
    assert refused.exit_code == 2
    assert "'sag' is not one of 'auto', 'lbfgs', 'newton-cg', 'gradient-descent'" in refused.stderr


def test_a_solver_may_ask_for_the_hessian():
    register_solver(Solver("newton-in-one-piece", newton_in_one_piece))
    X, y = load_iris(return_X_y=True)
    model = SoftmaxRegression(solver="newton-in-one-piece", tol=1e-9, max_iter=20).fit(X, y)
    assert model.converged_
    assert model.n_iter_ < 10
    peer = SoftmaxRegression(solver="newton-cg", tol=1e-9).fit(X, y)
    np.testing.assert_allclose(model.coef_, peer.coef_, atol=1e-7)


def test_messages_list_the_solvers():
    def never(objective, theta, max_iter, after_iteration):
        return True

    register_solver(Solver("patient", never, precise=True, class_parallel=False))
    with pytest.raises(
        ValueError, match="solver must be 'auto', 'lbfgs', 'newton-cg' or 'patient', got 'sag'"
    ):
        SoftmaxRegression(solver="sag").fit(np.eye(4), [0, 1, 0, 1])
    X, y = load_iris(return_X_y=True)
    with pytest.warns(ConvergenceWarning, match=r'try solver="newton-cg", solver="patient", standardised'):
        SoftmaxRegression(solver="lbfgs", tol=0, max_iter=10_000).fit(X, y)
    with pytest.warns(ConvergenceWarning, match="decrease; try standardised features, a smaller C or"):
        SoftmaxRegression(solver="patient").fit(X, y)
    with pytest.raises(BadInput, match=r"does not go with --solver patient; fit with --solver lbfgs$"):
        solver_named("patient", 2)
    assert solver_named("lbfgs", 2).name == "lbfgs"


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="there is a solver called 'lbfgs' already"):
        register_solver(Solver("lbfgs", newton_in_one_piece))
