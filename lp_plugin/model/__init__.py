"""What is placed: a model as a chain of layers, and what each of them costs."""

from lp_plugin.model.layer_cost import LayerCost
from lp_plugin.model.profile import ModelProfile

__all__ = ["LayerCost", "ModelProfile"]
