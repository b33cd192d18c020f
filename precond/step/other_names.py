"""Other libraries' names for our options, so that errors can name ours."""

from __future__ import annotations

from collections.abc import Iterable

#: Name -> its library, and our spelling: the option, with its value where the name alone is not enough.
#: Several spellings where methods differ; the first whose option the method has is shown.
_OTHERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "learning_rate": ("kfac-jax", ("lr",)),
    "beta": ("", ("betas", "curvature_ema", "momentum")),
    "betas": ("torch.optim.AdamW", ("curvature_ema", "momentum")),
    "eps": ("torch.optim.AdamW", ("damping",)),
    "epsilon": ("Distributed Shampoo", ("eps", "damping")),
    # SOAP
    "precondition_frequency": ("SOAP", ("inverse_update_period", "curvature_update_period")),
    "max_precond_dim": ("SOAP", ("max_dim",)),
    "precondition_1d": ("SOAP", ("rotate_vectors",)),
    "shampoo_beta": ("SOAP", ("curvature_ema",)),
    # Muon
    "ns_steps": ("torch.optim.Muon", ("polynomial",)),
    "ns_coefficients": ("torch.optim.Muon", ("polynomial",)),
    "adjust_lr_fn": ("torch.optim.Muon", ("scaling",)),
    # Distributed Shampoo
    "max_preconditioner_dim": ("Distributed Shampoo", ("block_size", "max_dim")),
    "grafting_config": ("Distributed Shampoo", ("grafting",)),
    "start_preconditioning_step": ("Distributed Shampoo", ("inverse_update_period=Refresh(10, burn_in=...)",)),
    "use_decoupled_weight_decay": ("Distributed Shampoo", ("weight_decay=WeightDecay(1e-4, 'decoupled')",)),
    # kfac-pytorch
    "factor_update_steps": ("kfac-pytorch", ("curvature_update_period",)),
    "inv_update_steps": ("kfac-pytorch", ("inverse_update_period",)),
    "factor_decay": ("kfac-pytorch", ("curvature_ema",)),
    "skip_layers": ("kfac-pytorch", ("structures={'name': None}",)),
    # ASDL
    "ema_decay": ("ASDL", ("curvature_ema=1 - ema_decay",)),
    "curvature_upd_interval": ("ASDL", ("curvature_update_period",)),
    "preconditioner_upd_interval": ("ASDL", ("inverse_update_period",)),
    "ignore_modules": ("ASDL", ("structures={module: None}",)),
    "fisher_type": ("ASDL", ("fisher",)),
    "n_mc_samples": ("ASDL", ("fisher",)),
    # kfac-jax
    "l2_reg": ("kfac-jax", ("weight_decay=WeightDecay(1e-4, 'l2')",)),
    "estimation_mode": ("kfac-jax", ("fisher",)),
    "norm_constraint": ("kfac-jax", ("kl_clip",)),
    "initial_damping": ("kfac-jax", ("damping",)),
    "use_adaptive_damping": ("kfac-jax", ("damping_rule=LevenbergMarquardt()",)),
    "damping_adaptation_interval": ("kfac-jax", ("damping_rule=LevenbergMarquardt(period=5)",)),
    "use_adaptive_learning_rate": ("kfac-jax", ("step_size=QuadraticModel()",)),
    "use_adaptive_momentum": ("kfac-jax", ("step_size=QuadraticModel()",)),
    "num_burnin_steps": ("kfac-jax", ("inverse_update_period=Refresh(10, burn_in=5)",)),
    # torch.optim.LBFGS
    "history_size": ("torch.optim.LBFGS", ("window",)),
    "max_iter": ("torch.optim.LBFGS", ("iterations", "max_steps")),
    # words that several libraries use
    "cov_ema_decay": ("", ("curvature_ema",)),
    "curvature_update_interval": ("", ("curvature_update_period",)),
    "curvature_update_freq": ("", ("curvature_update_period",)),
    "inverse_update_interval": ("", ("inverse_update_period",)),
    "inverse_update_freq": ("", ("inverse_update_period",)),
    "update_freq": ("", ("inverse_update_period", "curvature_update_period")),
}

#: Options that have no counterpart -> why none is needed.
_NEEDLESS = {
    **dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), "says how torch.optim runs its kernels"),
    "amsgrad": "is of torch.optim.Adam",
    "grad_scale": "is of ASDL and kfac-pytorch; a GradScaler is seen and divided out",
    "data_size": "is of ASDL; the sizes of batches are seen",
    "accumulation_steps": "is of kfac-pytorch; every backward pass before step() counts by itself",
    "preconditioner_config": "is of Distributed Shampoo; each preconditioner is a class of its own",
    "data_format": "is of SOAP",
    **dict.fromkeys(("curvature", "solver", "exponent"), "the method decides; PreconditionedOptimizer takes any"),
}


def counterpart(name: str, known: Iterable[str]) -> str | None:
    """Our spelling of another library's keyword, as the rest of a sentence; ``None`` if it is unknown.

    Args:
        name: The keyword.
        known: Options of the method that was called.
    """
    if name in _NEEDLESS:
        return f"{name!r}, which {_NEEDLESS[name]}."
    source, ours = _OTHERS.get(name, ("", ()))
    known = set(known)
    fitting = [spelling for spelling in ours if spelling.partition("=")[0] in known]
    if not fitting:
        return f"{name!r}, which is of {source}." if source else None
    return f"{name!r}{f' ({source})' if source else ''}; write {fitting[0]!r} here."
