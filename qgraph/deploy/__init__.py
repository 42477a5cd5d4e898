"""Deployment: what a phone's or a browser's application needs of a model, in one folder, proved before it is given."""

from qgraph.deploy.job import PLATFORMS, Deployment, deploy

__all__ = ["PLATFORMS", "Deployment", "deploy"]
