"""Other libraries' names for our options, so that errors can name ours."""

from __future__ import annotations

from collections.abc import Iterable

from precond.step.calls import LOSS_WORDS

#: Name -> its library, and our spelling: the option, with its value where the name alone is not enough.
#: Several spellings where methods differ; the first whose option the method has is shown.
_OTHERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "learning_rate": ("kfac-jax", ("lr",)),
    "wd": ("", ("weight_decay",)),
    **dict.fromkeys(LOSS_WORDS - {"loss_fn"}, ("", ("loss_fn",))),
    "beta": ("", ("betas", "curvature_ema", "momentum")),
    "betas": ("torch.optim.AdamW", ("curvature_ema", "momentum")),
    "eps": ("torch.optim.AdamW", ("damping",)),
    "epsilon": ("Distributed Shampoo", ("eps", "damping")),
    # torch.optim
    "dampening": ("torch.optim.SGD", ("momentum",)),
    **dict.fromkeys(("line_search_fn", "tolerance_grad", "tolerance_change"), ("torch.optim.LBFGS", ("damping_rule",))),
    "max_iter": ("torch.optim.LBFGS", ("iterations", "max_steps")),
    "history_size": ("torch.optim.LBFGS", ("window",)),
    # SOAP
    "precondition_frequency": ("SOAP", ("inverse_update_period", "curvature_update_period")),
    "max_precondition_dim": ("pytorch-optimizer", ("max_dim",)),
    "max_precond_dim": ("SOAP", ("max_dim",)),
    "precondition_1d": ("SOAP", ("rotate_vectors",)),
    "shampoo_beta": ("SOAP", ("curvature_ema",)),
    # Muon
    "ns_steps": ("torch.optim.Muon", ("polynomial",)),
    "ns_coefficients": ("torch.optim.Muon", ("polynomial",)),
    "adjust_lr_fn": ("torch.optim.Muon", ("scaling",)),
    "use_adjusted_lr": ("pytorch-optimizer", ("scaling",)),
    "use_muon": ("Muon", ("orthogonalize",)),
    **dict.fromkeys(("adamw_params", "muon_params"), ("Muon", ("params=param_groups(model, Muon, batch)",))),
    **dict.fromkeys(("adamw_lr", "adam_lr"), ("Muon", ("params=param_groups(..., options={'head': {'lr': ...}})",))),
    **dict.fromkeys(("adamw_betas", "adam_betas"), ("Muon", ("betas",))),
    **dict.fromkeys(("adamw_eps", "adam_eps"), ("Muon", ("eps",))),
    "adamw_wd": ("Muon", ("params=param_groups(model, Muon, batch, weight_decay=...)",)),
    # Distributed Shampoo
    "max_preconditioner_dim": ("Distributed Shampoo", ("block_size", "max_dim")),
    "grafting_config": ("Distributed Shampoo", ("grafting",)),
    "start_preconditioning_step": ("Distributed Shampoo", ("inverse_update_period=Refresh(10, burn_in=...)",)),
    "use_decoupled_weight_decay": ("Distributed Shampoo", ("weight_decay=WeightDecay(1e-4, 'decoupled')",)),
    "use_nesterov": ("Distributed Shampoo", ("momentum=Momentum(0.9, nesterov=True)",)),
    "beta3": ("Distributed Shampoo", ("betas",)),
    **dict.fromkeys(("inv_root_override", "exponent_multiplier"), ("Distributed Shampoo", ("exponent",))),
    "use_merge_dims": ("Distributed Shampoo", ("merge_dims",)),
    # pytorch-optimizer and torch_optimizer, which follow the same papers
    "update_period": ("pytorch-optimizer", ("curvature_update_period", "inverse_update_period")),
    "preconditioning_compute_steps": ("pytorch-optimizer", ("inverse_update_period",)),
    "statistics_compute_steps": ("pytorch-optimizer", ("curvature_update_period",)),
    "graft_type": ("pytorch-optimizer", ("grafting",)),
    "inverse_exponent_override": ("pytorch-optimizer", ("exponent",)),
    "matrix_eps": ("pytorch-optimizer", ("damping", "eps")),
    "diagonal_eps": ("pytorch-optimizer", ("eps",)),
    "no_preconditioning_for_layers_with_dim_gt": ("pytorch-optimizer", ("max_dim", "block_size")),
    "shape_interpretation": ("pytorch-optimizer", ("merge_dims",)),
    "p": ("pytorch-optimizer", ("gamma",)),
    "rho": ("Sophia", ("gamma",)),
    "hessian_update_interval": ("", ("curvature_update_period",)),
    **dict.fromkeys(
        ("weight_decouple", "decoupled_weight_decay", "decouple_weight_decay"),
        ("pytorch-optimizer", ("weight_decay=WeightDecay(1e-2, 'decoupled')",)),
    ),
    "fixed_decay": ("pytorch-optimizer", ("weight_decay=WeightDecay(1e-2, 'independent')",)),
    # PSGD
    "max_size_triangular": ("PSGD", ("max_dim",)),
    "precond_lr": ("PSGD", ("preconditioner_lr",)),
    "lr_preconditioner": ("PSGD", ("preconditioner_lr",)),
    **dict.fromkeys(
        ("preconditioner_update_probability", "pre_conditioner_update_probability"),
        ("PSGD", ("curvature_update_period",)),
    ),
    # GaLore
    "update_proj_gap": ("GaLore", ("inverse_update_period",)),
    # SINGD
    "T": ("singd", ("curvature_update_period",)),
    "beta1": ("singd", ("preconditioner_lr",)),
    # K-FAC of several repositories
    "stat_decay": ("kfac_pytorch", ("curvature_ema",)),
    "TCov": ("kfac_pytorch", ("curvature_update_period",)),
    **dict.fromkeys(("TInv", "Tinv", "T_inv"), ("kfac_pytorch", ("inverse_update_period",))),
    **dict.fromkeys(("kl_max", "kl_clip_max"), ("", ("kl_clip",))),
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
    # words that several libraries use
    "cov_ema_decay": ("", ("curvature_ema",)),
    "curvature_update_interval": ("", ("curvature_update_period",)),
    "curvature_update_freq": ("", ("curvature_update_period",)),
    "inverse_update_interval": ("", ("inverse_update_period",)),
    "inverse_update_freq": ("", ("inverse_update_period",)),
    "update_freq": ("", ("inverse_update_period", "curvature_update_period")),
}

#: Options of ``torch.optim`` that change no result.
KERNELS = frozenset({"foreach", "fused", "capturable", "differentiable"})

#: Options that have no counterpart -> why none is needed.
_NEEDLESS = {
    "hessian_distribution": "is of pytorch-optimizer; the random vectors have signs as entries",
    **dict.fromkeys(
        ("use_gc", "rectify", "degenerated_to_sgd", "correct_bias", "use_bias_correction"),
        "changes the method of other libraries; averages here are always without bias",
    ),
    **dict.fromkeys(
        (
            *("compute_method", "compute_eigenvalue_outer_product", "symmetry_aware", "colocate_factors", "loglevel"),
            *("inv_dtype", "factor_dtype", "allreduce_bucket_cap_mb", "assignment_strategy", "update_factors_in_hook"),
        ),
        "says how kfac-pytorch computes; nothing has to be said of it here",
    ),
    **dict.fromkeys(
        (
            *("distributed_config", "shampoo_pt2_compile_config", "use_pytorch_compile", "preconditioner_dtype"),
            *("root_inv_dtype", "track_root_inv_residuals"),
        ),
        "says how Distributed Shampoo computes; factors are in float32 at least",
    ),
    **dict.fromkeys(
        ("grad_clip", "max_grad_norm", "clip_grad_norm", "clip_grad", "gradient_clip_val"),
        "is of the loop: call torch.nn.utils.clip_grad_norm_ before step(); kl_clip bounds a step by the curvature",
    ),
    "batch_averaged": "is of kfac_pytorch; the reduction of the loss is read off the loss",
    **dict.fromkeys(KERNELS, "says how torch.optim runs its kernels"),
    **dict.fromkeys(
        ("warmup", "warmup_steps", "num_warmup_steps", "total_steps", "num_training_steps", "lr_decay"),
        "is of a schedule: give the optimizer to one of torch.optim.lr_scheduler",
    ),
    **dict.fromkeys(("device", "dtype"), "follows the parameters: move the model, model.to(...), before"),
    "shards": (
        "is of methods that keep matrices of the gradients of single parameters, such as SOAP and Muon; those of this "
        "method belong to whole parameters"
    ),
    "closure": "is of the step: optimizer.step(closure)",
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
