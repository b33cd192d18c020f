"""Matrices of one loss over data: Hessian, Gauss-Newton, Fisher, Jacobian, kernels, gradients of examples."""
