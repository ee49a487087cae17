"""Logistic regression by scikit-learn, in the form of logistic.LogisticPath: slower, what that is held against."""

from __future__ import annotations

import numpy as np

from pixseq.numerics.logistic import Classifier, measure


class ScikitPath:
    """Fits of one set of rows for one C after another, each from the last, or from `after`, of another path."""

    def __init__(
        self,
        X: np.ndarray,
        labels: np.ndarray,
        max_iter: int = 1000,
        tol: float = 1e-4,
        after: Classifier | None = None,
    ):
        from sklearn.linear_model import LogisticRegression

        self.X, self.labels = X, labels
        self.model = LogisticRegression(max_iter=max_iter, tol=tol, warm_start=True)
        if after is not None:
            weights, intercept = after.weights.astype(X.dtype), after.intercept.astype(X.dtype)
            two = len(intercept) == 2  # of two classes it fits the difference alone
            self.model.coef_ = (weights[:, 1:] - weights[:, :1]).T if two else np.ascontiguousarray(weights.T)
            self.model.intercept_ = intercept[1:] - intercept[:1] if two else intercept

    def fit(self, c: float) -> Classifier:
        """What scikit-learn finds for one C, its objective and gradient measured as ours are."""
        self.model.C = c
        self.model.fit(self.X, self.labels)
        weights, intercept = self.model.coef_.T.astype(np.float64), self.model.intercept_.astype(np.float64)
        if len(intercept) == 1:
            weights, intercept = np.hstack([-weights / 2, weights / 2]), np.array([-intercept[0] / 2, intercept[0] / 2])
        objective, gradient = measure(self.X, self.labels, c, weights, intercept)
        n_iter = int(self.model.n_iter_.max())
        done = n_iter < self.model.max_iter
        return Classifier(self.model.classes_, weights, intercept, objective, gradient, done, n_iter)
