"""Asking a model: log-likelihoods of given text, and generated answers."""
