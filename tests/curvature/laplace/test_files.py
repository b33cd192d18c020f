"""Is a posterior that was saved and loaded the one that was saved?"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("laplace")

from laplace import DiagLaplace, Laplace
from laplace.baselaplace import ELLA
from laplace.curvature import CurvlinopsGGN
from laplace.utils.matrix import Kron
from safetensors import safe_open

from curvature.estimation.checkpoint import CheckpointError
from curvature.laplace import BlockKron, EFBackend, GGNBackend, HessianBackend, load, save
from curvature.laplace.parametric.archive import read, write
from tests.curvature.laplace.problems import loader_of, summed, toy
from tests.curvature.problems import F64

ALL = ["full", "diag", "kron", "kfac", "ekfac", "low_rank", "low_rank_diag"]
LAST = ["full", "diag", "kron", "kfac", "ekfac", "low_rank_diag"]
STRUCTURES = [*(("all", s) for s in ALL), *(("last_layer", s) for s in LAST)]
BOTH = ["classification", "regression"]


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def fitted(task: str, subset: str, structure: str, **options: Any) -> Any:
    model, x, y = toy(task)
    la = Laplace(model, task, subset, structure, **({"backend": GGNBackend} | options))
    la.fit(loader_of(x, y))
    return la


def assert_same(la: Any, other: Any, x: Tensor) -> None:
    """The same bits in everything that is read from a posterior."""
    assert type(other) is type(la)
    results: list[Callable[[Any], Any]] = [
        lambda la: la(x),
        lambda la: la.log_marginal_likelihood(),
        lambda la: la.functional_variance(la.backend.jacobians(x)[0]),
        lambda la: la.sample(3, torch.Generator().manual_seed(1)),
        lambda la: (la.prior_mean, la.prior_precision, la.sigma_noise, la.loss, la.mean),
    ]
    for result in results[:3] if "low_rank" in la._key else results:
        pairs = zip(_tensors(result(la)), _tensors(result(other)), strict=True)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    for name in ("n_data", "n_outputs", "temperature", "dict_key_x", "enable_backprop", "_asdl_fisher_kwargs"):
        assert getattr(la, name) == getattr(other, name)


def _tensors(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("subset,structure", STRUCTURES)
@pytest.mark.parametrize("task", BOTH)
def test_every_structure_comes_back_bit_for_bit(task: str, subset: str, structure: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prior_precision": torch.tensor([1.5], dtype=F64), "temperature": 0.9}
    if task == "regression":
        options["sigma_noise"] = 0.8
    la = fitted(task, subset, structure, prior_mean=0.1, **options)
    save(la, tmp_path / "la.safetensors")
    model, x, _ = toy(task)
    loaded = load(tmp_path / "la.safetensors", model.train())
    assert not loaded.model.training
    assert_same(la, loaded, x)


@pytest.mark.parametrize("name", ["cnn", "frozen_parts", "residual_eval", "language_model"])
@pytest.mark.parametrize("structure", ["kron", "kfac", "ekfac", "low_rank_diag"])
def test_other_models(name: str, structure: str, tmp_path: Path) -> None:
    """Convolutions, frozen parameters, buffers, tied weights: blocks of every kind."""
    problem = summed(name)
    la = Laplace(problem.model, "classification", "all", structure, backend=EFBackend)
    la.backend.lossfunc = problem.loss_fn
    la.fit(_Loader(problem.data))
    save(la, tmp_path / "la.safetensors")
    loaded = load(tmp_path / "la.safetensors", copy.deepcopy(problem.model))
    assert torch.equal(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())
    draws = [p.sample(2, torch.Generator().manual_seed(1)) for p in (la, loaded)]
    assert torch.equal(*draws)


class _Loader:
    def __init__(self, data: Any) -> None:
        self.data, self.dataset = data, range(sum(len(y) for _, y in data))

    def __iter__(self) -> Any:
        return iter(self.data)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_subnetworks(structure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *args, _randn=torch.randn, **kw: _randn(*args, **({"dtype": F64} | kw)))
    chosen = torch.tensor([1, 5, 21, 40])
    la = fitted("regression", "subnetwork", structure, subnetwork_indices=chosen, sigma_noise=0.8)
    save(la, tmp_path / "la.safetensors")
    model, x, _ = toy("regression")
    loaded = load(tmp_path / "la.safetensors", model)
    assert torch.equal(loaded.backend.subnetwork_indices, chosen) and loaded.n_params_subnet == 4
    assert_same(la, loaded, x)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "kfac"])
def test_a_loaded_posterior_can_be_fitted_to_more_data(structure: str, tmp_path: Path) -> None:
    """And equals one that saw all the data at once; batches of unequal sizes."""
    model, x, y = toy("regression")
    first, once = (Laplace(model, "regression", "all", structure, backend=GGNBackend, sigma_noise=0.7) for _ in "ab")
    first.fit(loader_of(x[:7], y[:7], 3))
    save(first, tmp_path / "la.safetensors")
    loaded = load(tmp_path / "la.safetensors", model)
    loaded.fit(loader_of(x[7:], y[7:], 4), override=False)
    once.fit(loader_of(x, y))
    assert loaded.n_data == 12
    J = GGNBackend(model, "regression").jacobians(x)[0]
    close(loaded.functional_variance(J), once.functional_variance(J))
    close(loaded.log_marginal_likelihood(), once.log_marginal_likelihood())


def test_structures_that_add_not_say_so_after_loading(tmp_path: Path) -> None:
    for structure in ("ekfac", "low_rank_diag"):
        save(fitted("classification", "all", structure), tmp_path / "la.safetensors")
        model, x, y = toy()
        with pytest.raises(ValueError, match="cannot be extended"):
            load(tmp_path / "la.safetensors", model).fit(loader_of(x, y), override=False)


def test_options_of_backends_come_back(tmp_path: Path) -> None:
    """Draws go on where they were, so saving and loading between two fits changes nothing."""
    kwargs = {"stochastic": True, "num_samples": 2, "seed": 5, "max_dim": 3}
    model, x, y = toy()
    la = Laplace(
        model,
        "classification",
        "all",
        "kfac",
        backend=GGNBackend,
        backend_kwargs=kwargs,
        asdl_fisher_kwargs={"kfac_approx": "reduce"},
        damping=True,
    )
    la.fit(loader_of(x[:7], y[:7]))
    save(la, tmp_path / "la.safetensors")
    loaded = load(tmp_path / "la.safetensors", model)
    assert loaded.damping and loaded.backend.seed == 5 and loaded.backend.max_dim == 3
    assert_same(la, loaded, x)
    for posterior in (la, loaded):
        posterior.fit(loader_of(x[7:], y[7:]), override=False)
    assert_same(la, loaded, x)
    assert la._backend_kwargs == kwargs


def test_a_kron_of_laplace_torch_itself(tmp_path: Path) -> None:
    la = fitted("regression", "all", "kron", backend=CurvlinopsGGN)
    assert type(la.H_facs) is Kron and not isinstance(la.H_facs, BlockKron)
    save(la, tmp_path / "la.safetensors")
    model, x, y = toy("regression")
    with pytest.raises(ValueError, match="pass backend=CurvlinopsGGN"):
        load(tmp_path / "la.safetensors", model)
    loaded = load(tmp_path / "la.safetensors", model, CurvlinopsGGN)
    assert_same(la, loaded, x)
    for posterior in (la, loaded):
        posterior.fit(loader_of(x, y), override=False)
    assert_same(la, loaded, x)


def test_hessian_and_named_last_layer(tmp_path: Path) -> None:
    la = fitted("regression", "all", "full", backend=HessianBackend, prior_precision=100.0)
    save(la, tmp_path / "la.safetensors")
    model, x, _ = toy("regression")
    assert_same(la, load(tmp_path / "la.safetensors", model), x)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for options in ({"last_layer_name": names[-1]}, {"enable_backprop": True}):
        la = fitted("regression", "last_layer", "kfac", **options)
        save(la, tmp_path / "la.safetensors")
        loaded = load(tmp_path / "la.safetensors", model)
        assert_same(la, loaded, x)
        assert loaded.model._last_layer_name == names[-1]


def test_what_is_in_the_file(tmp_path: Path) -> None:
    """Tensors by readable names, and JSON: any program can read it. A user's data are not in it."""
    la = fitted("classification", "last_layer", "kfac")
    save(la, tmp_path / "la.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["la.safetensors"]  # no draft is left
    with safe_open(tmp_path / "la.safetensors", framework="np") as file:
        names, metadata = list(file.keys()), file.metadata()
        assert (file.get_tensor("numbers/mean") == la.mean.numpy()).all()
    assert "curvature/blocks/0/sums/straight/0" in names
    state = json.loads(metadata["state"])
    assert state["key"] == ["last_layer", "kfac"] and state["backend"]["name"] == "GGNBackend"
    assert {name.split("/")[0] for name in names} == {"numbers", "curvature"}
    assert set(read(tmp_path / "la.safetensors", "a posterior")["numbers"]) == {
        *("mean", "loss", "_prior_mean", "_prior_precision", "_sigma_noise", "n_data", "n_outputs")
    }


def test_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "la.safetensors"
    save(fitted("classification", "all", "kfac"), path)
    with pytest.raises(CheckpointError, match=r"other trainable parameters.*there.*here"):
        load(path, nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double())
    with pytest.raises(CheckpointError, match="other trainable parameters"):
        load(path, toy()[0].float())
    model = toy()[0]
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"\(8x4|none here"):
        load(path, model)


def test_a_last_layer_of_another_name_is_refused(tmp_path: Path) -> None:
    save(fitted("classification", "last_layer", "diag"), tmp_path / "la.safetensors")
    with pytest.raises(CheckpointError, match="over the layer '2', which the model has not"):
        load(tmp_path / "la.safetensors", nn.Linear(4, 3).double())


def test_other_values_are_refused_or_restored(tmp_path: Path) -> None:
    path = tmp_path / "la.safetensors"
    la = fitted("classification", "all", "diag")
    save(la, path)
    model, x, _ = toy()
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    with pytest.raises(CheckpointError, match=r"differ by up to 0\.5.*restore=True"):
        load(path, model)
    assert_same(la, load(path, model, restore=True), x)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), la.mean)


def test_other_buffers_and_frozen_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "la.safetensors"
    model, x, y = toy()
    model.append(nn.BatchNorm1d(3).double())
    first = next(model.parameters()).requires_grad_(False)
    la = Laplace(model, "classification", "all", "diag", backend=GGNBackend)
    la.fit(loader_of(x, y))
    save(la, path)
    load(path, model)
    changed = copy.deepcopy(model)
    changed[-1].running_mean.add_(0.1)
    with pytest.raises(CheckpointError, match="buffers"):
        load(path, changed, restore=True)
    with torch.no_grad():
        first.add_(1)
    with pytest.raises(CheckpointError, match="other values"):
        load(path, model, restore=True)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model, x, y = toy()
    for structure in ALL:
        with pytest.raises(ValueError, match="not fitted"):
            save(Laplace(model, "classification", "all", structure, backend=GGNBackend), tmp_path / "a")
    ella = ELLA(model, "classification", backend=GGNBackend, subsample_size=6, n_eigenvalues=4)
    ella.fit(loader_of(x, y))
    with pytest.raises(TypeError, match=r"ELLA is no posterior that can be saved.*ekfac"):
        save(ella, tmp_path / "a")

    class Own(DiagLaplace):
        _key = ("all", "own")  # else Laplace() would make it in place of DiagLaplace

    own = Own(model, "classification", backend=GGNBackend)
    own.fit(loader_of(x, y))
    with pytest.raises(TypeError, match="Own is no posterior"):
        save(own, tmp_path / "a")
    la = fitted("classification", "all", "diag")
    la._asdl_fisher_kwargs = {"key": object()}
    with pytest.raises(TypeError, match="options/_asdl_fisher_kwargs/key is a object"):
        save(la, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "la.safetensors", toy()[0]
    with pytest.raises(FileNotFoundError):
        load(path, model)
    save(fitted("classification", "all", "kfac"), path)
    whole = path.read_bytes()
    for cut in (0, 4, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="cut off"):
            load(path, model)
    write(path, "something of ours", {"a": 1})
    with pytest.raises(CheckpointError, match="holds something of ours, and a posterior was expected"):
        load(path, model)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        load(path, model)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(CheckpointError, match="version 9"):
        load(path, model)


def test_states_of_any_nesting_come_back(tmp_path: Path) -> None:
    """Order in memory, shared and empty tensors, every dtype, numbers that are not finite, texts."""
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "a": [base, base.permute(2, 0, 1), base[:, 1], {"b": base.mT, "half": base.bfloat16()}],
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "grad": torch.ones(2, requires_grad=True),
        "other": [None, True, 1.5, 7, "text", torch.bfloat16, [], {}],
        "inf": float("inf"),
        "exact": 0.1 + 0.2,
    }
    write(tmp_path / "s", "test", state)
    found = read(tmp_path / "s", "test")
    assert found["a"][1].stride() == base.permute(2, 0, 1).stride() and found["a"][3]["b"].stride() == base.mT.stride()
    _assert_equal(found, state)
    with pytest.raises(TypeError, match="a/0 is a complex"):
        write(tmp_path / "s", "test", {"a": [1j]})
    with pytest.raises(TypeError, match="without '\\$'"):
        write(tmp_path / "s", "test", {"a": {"$tensor": 1}})
    _assert_equal(read(tmp_path / "s", "test"), state)  # what was refused has replaced nothing


def _assert_equal(found: Any, state: Any) -> None:
    if isinstance(state, Tensor):
        assert torch.equal(found, state) and found.dtype == state.dtype and not found.requires_grad
    elif isinstance(state, dict):
        assert list(found) == list(state)
        for key in state:
            _assert_equal(found[key], state[key])
    elif isinstance(state, list):
        assert len(found) == len(state)
        for a, b in zip(found, state, strict=True):
            _assert_equal(a, b)
    else:
        assert found == state and type(found) is type(state)


def test_the_cap_on_factors_by_its_old_name(tmp_path: Path) -> None:
    """With a warning from the user, without one from a file; not by both names."""
    with pytest.warns(DeprecationWarning, match="GGNBackend: max_factor=3 is max_dim=3 now"):
        old = fitted("classification", "all", "kfac", backend_kwargs={"max_factor": 3})
    new = fitted("classification", "all", "kfac", backend_kwargs={"max_dim": 3})
    assert torch.equal(old.log_marginal_likelihood(), new.log_marginal_likelihood())
    save(old, tmp_path / "la.safetensors")
    loaded = load(tmp_path / "la.safetensors", toy()[0])
    assert loaded.backend.max_dim == 3 and torch.equal(loaded.log_marginal_likelihood(), new.log_marginal_likelihood())
    for kind in (GGNBackend, EFBackend):
        with pytest.raises(TypeError, match="say it twice; write max_dim=4"):
            kind(toy()[0], "classification", max_factor=3, max_dim=4)
        with pytest.raises(TypeError, match="has no option max_fac"):
            kind(toy()[0], "classification", max_fac=3)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_kron_of_laplace_torch_takes_more_data_after_its_state_dict(subset: str) -> None:
    """And its evidence keeps the right gradient in the noise, which laplace-torch's own factors lose."""
    model, x, y = toy("regression")
    first, loaded, once = (Laplace(model, "regression", subset, "kron", backend=GGNBackend) for _ in "abc")
    first.fit(loader_of(x[:7], y[:7]))
    loaded.load_state_dict(copy.deepcopy(first.state_dict()))
    slopes = []
    for la in (first, loaded):
        sigma = torch.tensor(0.6, dtype=F64, requires_grad=True)
        slopes.append(torch.autograd.grad(la.log_marginal_likelihood(torch.ones(1, dtype=F64), sigma), sigma)[0])
        la.sigma_noise = 1.0
    assert torch.equal(*slopes)
    if subset == "all":
        loaded.fit(loader_of(x[7:], y[7:]), override=False)
        once.fit(loader_of(x, y))
        loaded.sigma_noise = once.sigma_noise = 1.0
        loaded.prior_precision = once.prior_precision = 2.0
        close(loaded.log_marginal_likelihood(), once.log_marginal_likelihood())
        close(loaded.H.clone().to_matrix(), once.H.to_matrix())
    older = {name: value for name, value in first.state_dict().items() if name != "sums"}
    plain = Laplace(model, "regression", subset, "kron", backend=GGNBackend)
    plain.load_state_dict(older)
    pair = [la.log_marginal_likelihood(torch.ones(1, dtype=F64), torch.ones((), dtype=F64)) for la in (plain, first)]
    close(*pair)
    if subset == "all":
        with pytest.raises(ValueError, match="state_dict from before it held the sums"):
            plain.fit(loader_of(x[7:], y[7:]), override=False)
