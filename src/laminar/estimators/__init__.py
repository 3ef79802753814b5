"""Estimators that follow scikit-learn: the only classes of laminar that change in place."""
