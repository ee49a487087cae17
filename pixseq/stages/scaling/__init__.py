"""scaling: plan, train, fit and read a study of how the best model and data sizes grow with compute."""
