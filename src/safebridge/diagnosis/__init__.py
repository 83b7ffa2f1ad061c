"""The diagnosis: whether, where and why a model's text safety fails on pictures, in one report."""
