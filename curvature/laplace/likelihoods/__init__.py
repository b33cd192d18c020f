"""The likelihoods of a posterior: the loss that stands for one, and what it says about an observation."""
