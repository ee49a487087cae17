"""Scaling studies, clients of the stages: plan, train, fit and read how the best model and data grow with compute."""
