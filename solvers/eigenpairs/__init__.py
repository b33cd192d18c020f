"""Leading eigenpairs and singular triplets, with residuals."""
